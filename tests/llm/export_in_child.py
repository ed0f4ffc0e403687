"""Run as a program: export a checkpoint on disk, and print the most memory that took. `CHECKPOINT FOLDER METHOD [DTYPE]`"""

import json
import sys
import time
from pathlib import Path

from tiny import tiny_llama

from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def export(checkpoint: Path, folder: Path, method: str, dtype: str) -> dict[str, float]:
    """Seconds of each step."""
    options = {
        "compression_method": None if method == "none" else method,
        "force_module_dtype": dtype,
        "no_verify": True,
    }
    report = export_llm(
        LlmOptions(local_dir=checkpoint, export_dirpath=folder, device_map="t2n_offload_disk", **options)
    )
    return dict(report.steps)


if __name__ == "__main__":
    checkpoint, folder, method, dtype = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    # A small one first: what imports and torch.export itself keep is not the model's.
    tiny = tiny_llama(folder.parent / "tiny")
    export(tiny, folder.parent / "tiny-out", method, dtype)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = time.perf_counter()
    steps = export(checkpoint, folder, method, dtype)
    seconds = time.perf_counter() - start
    print(json.dumps({"before": before, "peak": memory("VmHWM"), "seconds": seconds, "steps": steps}))
