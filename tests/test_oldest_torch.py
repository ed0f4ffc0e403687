"""The oldest torch that `pyproject.toml` admits: the tiny way and the op table, in a venv of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_to_nnef

ROOT = Path(__file__).parents[1]
# What the package needs, and what these tests do. The version of the installed package is another's matter: this venv has the source.
NEEDS = ("expecttest", "hypothesis", "numpy", "pytest", "pytest-timeout", "rich", "safetensors")
TESTS = ("tests/test_tiny.py", "tests/op/test_table.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_oldest_torch_exports_the_same(tmp_path):
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={oldest}.0", *NEEDS], check=True)
    environment = os.environ | {"PYTHONPATH": str(Path(torch_to_nnef.__file__).parents[1])}
    options = (
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--deselect",
        "tests/test_tiny.py::test_the_version_comes_from_one_place",
    )
    done = subprocess.run(
        [python, "-m", "pytest", *options, *TESTS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"\d{3} passed", done.stdout)
