"""Run as a program: quantize or export a checkpoint on disk with no more address space than promised. `WHAT CHECKPOINT FOLDER LARGEST`

WHAT: `export` (`t2n_export_llm_to_tract`) or `shards` (`t2n quantize-shards`). LARGEST: bytes of the largest tensor. A small model goes
first: what it takes at most is the baseline. Prints that, the limit and the peak, in bytes.
"""

import json
import resource
import sys
from pathlib import Path

from export_in_child import memory
from tiny import tiny_llama

from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.shards import quantize_shards

SLACK = 64 << 20


def run(what, checkpoint, folder):
    options = LlmOptions(
        local_dir=checkpoint,
        export_dirpath=folder,
        compression_method="q40",
        device_map="t2n_offload_disk",
        no_verify=True,
    )
    if what == "export":
        export_llm(options)
    else:
        assert quantize_shards(options).complete


if __name__ == "__main__":
    what, checkpoint, folder, largest = sys.argv[1], *map(Path, sys.argv[2:4]), int(sys.argv[4])
    run(what, tiny_llama(folder.parent / "tiny"), folder.parent / "tiny-out")
    baseline = memory("VmPeak")
    limit = baseline + largest * 6 // 5 + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run(what, checkpoint, folder)
    print(json.dumps({"baseline": baseline, "limit": limit, "peak": memory("VmPeak")}))
