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
    """Whether `work()` is true in a forked child, within a minute."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # kills where threads are waited for that the fork left behind
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1] == 0


def main(folder):
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
