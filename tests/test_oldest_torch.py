"""The oldest torch that `pyproject.toml` admits: the tiny way and the op table, in a venv of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_to_nnef

ROOT = Path(__file__).parents[1]
# What the package needs, and what these tests do.
NEEDS = ("expecttest", "hypothesis", "numpy", "pytest", "pytest-timeout", "rich", "safetensors")
TESTS = ("tests/test_tiny.py", *(f"tests/op/test_{family}.py" for family in ("table", "conv", "math", "rnn")))
UNLIKE = (
    "tests/test_tiny.py::test_the_version_comes_from_one_place",  # this venv has the source, not the package
    "tests/op/test_table.py::test_op_gives_the_same_in_tract[int_div]",  # refused: torch 2.6 types it wrongly
    "tests/op/test_rnn.py::test_a_loop_over_a_dynamic_length_says_what_to_use",  # it says less of what it cannot capture
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_oldest_torch_exports_the_same(tmp_path):
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={oldest}.0", *NEEDS], check=True)
    environment = os.environ | {"PYTHONPATH": str(Path(torch_to_nnef.__file__).parents[1])}
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    options += [word for test in UNLIKE for word in ("--deselect", test)]
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
