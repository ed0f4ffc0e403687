"""One hash a model: whatever the threads, the hash seed, the working folder, the umask, and how often it is exported."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from golden import MODELS, VERSIONS, digests

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())
# Kernels of the oldest CPUs, in torch and its libraries.
OLD_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}


def elsewhere(folder, threads, seed, umask, repeats, **environment):
    """The digests that a process of its own prints, a dict a repeat."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "RAYON_NUM_THREADS": str(threads), **environment}
    command = [sys.executable, HERE / "golden.py", str(threads), str(repeats)]
    run = subprocess.run(command, cwd=folder, env=environment, umask=umask, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_promise_tells_how_many_archives_there_are():
    assert GOLDEN["sha256"].keys() == MODELS.keys()
    assert f"{len(MODELS)} archives" in (HERE.parent / "SECURITY.md").read_text()


@pytest.mark.timeout(900)  # the child waits its turn on a busy machine
def test_another_process_makes_the_same_bytes_as_on_another_cpu(tmp_path):
    (found,) = elsewhere(tmp_path, 3, 12345, 0o077, 1, **OLD_CPU)
    # captures differ between versions
    assert found == (GOLDEN["sha256"] if GOLDEN["versions"] == VERSIONS else digests())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_but_the_model_decides(tmp_path):
    found = []
    for threads, seed, umask in itertools.product((1, 2, 7), (0, 1, 4242), (0o000, 0o077)):
        folder = tmp_path / f"{threads} {seed} {umask} é"
        folder.mkdir()
        found += elsewhere(folder, threads, seed, umask, 2)
    assert len(found) == 36
    assert all(hashes == found[0] for hashes in found)
