"""An export holds a weight at a time: the packed ones of one, never a model."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shards import Llama, write_checkpoint

from torch_to_nnef import _native
from torch_to_nnef.tensor.offload import offloaded_safetensors
from torch_to_nnef.tensor.quant import quantize_q40

CHILD = Path(__file__).with_name("export_in_child.py")
MIB, GIB = 1 << 20, 1 << 30
# 4.5 bits a weight.
PACKED = 4.5 / 8

# 170 million weights in a few layers, since capture costs by layers: 340 MB in bf16, 680 in f32, 96 packed.
TWIN = Llama(hidden=2048, intermediate=8192, layers=2, heads=16, key_value_heads=8, vocabulary=8192)


def export(checkpoint, folder, method, dtype="f32"):
    program = [sys.executable, str(CHILD), str(checkpoint), str(folder), method, dtype]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    yield write_checkpoint(folder / "checkpoint", TWIN, shard_bytes=64 * MIB)
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(twin, tmp_path):
    found = export(twin, tmp_path / "out", "min_max_q4_0_all")
    grown = found["peak"] - found["before"]
    # The largest weight packed, twice (planes, and what the archive makes of them), pieces of 1 M values, and 40 MB for the graph.
    # Holding the packed model would take 96 MB, the largest weight in f32 67 MB, the checkpoint 340 MB.
    assert grown < 2 * PACKED * TWIN.largest() + 48 * MIB, f"{grown / MIB:.0f} MiB"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tiny", "tiny-out"}
