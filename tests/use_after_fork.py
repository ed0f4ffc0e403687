"""In a process of its own (`spawn` starts it anew, `fork` must not inherit pytest): the whole way, then again in children."""

import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorRuntime
from torch_to_nnef.tensor.extents import ByteFile, Scratch

WIDTH = 1024  # rows enough for tract to use threads


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, WIDTH)).eval()


def digest(_=None):
    """Of an archive, quantized and checked."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.nnef.tar"
        assert quantize_and_verify(net(), torch.ones(1, WIDTH), path).ok
        return hashlib.sha256(path.read_bytes()).hexdigest()


def in_fork(work):
    """Whether `work()` is true in a forked child, in time."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)  # kills where threads are waited for that the fork left behind
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1] == 0


def reads(file, place):
    """Whether 64 KiB of a file that holds `i` at `4 * i` are right, many times."""
    found, expected = bytearray(1 << 16), torch.arange(place, place + (1 << 14), dtype=torch.int32).numpy().tobytes()
    for _ in range(500):
        file.read_into(4 * place, memoryview(found))
        if found != expected:
            return False
    return True


def scratch_is_refused(scratch):
    try:
        scratch.append(memoryview(b"mine"))
    except T2NErrorRuntime:
        return True
    return False


def files(folder):
    path = folder / "numbers"
    path.write_bytes(torch.arange(1 << 16, dtype=torch.int32).numpy().tobytes())
    file, scratch = ByteFile.open(path), Scratch(folder)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if reads(file, 0) and scratch_is_refused(scratch) else 1)
    assert reads(file, 1 << 15), "read beside a child"
    assert os.waitpid(pid, 0)[1] == 0, "read beside the parent"


def main(folder):
    files(Path(folder))
    torch.set_num_threads(1)  # GNU's OpenMP itself does not survive a fork
    path, x = Path(folder) / "net.nnef.tar", torch.ones(64, WIDTH)
    assert quantize_and_verify(net(), x, path).ok
    model, expected = TractModel.load(path, threads=2), digest()
    outputs = model.run(x.numpy())

    def same():
        return all((model.run(x.numpy())[name] == value).all() for name, value in outputs.items())

    assert same()
    assert in_fork(same), "a model loaded before"
    assert in_fork(lambda: digest() == expected and in_fork(same)), "the whole way, and in a fork of a fork"
    assert same(), "afterwards, in the parent"
    for method, workers in {"fork": 2, "spawn": 1}.items():
        with multiprocessing.get_context(method).Pool(workers) as pool:
            assert pool.map_async(digest, range(workers)).get(timeout=120) == [expected] * workers, method


if __name__ == "__main__":
    main(sys.argv[1])
