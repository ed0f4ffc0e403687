"""Promises about the package itself: light import, lazy names, stubs that match, errors that are all raised somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_to_nnef
from torch_to_nnef import exceptions

TESTS = Path(__file__).parent


def test_importing_the_package_imports_neither_torch_nor_numpy_heavy_work():
    code = "import sys, torch_to_nnef; torch_to_nnef.__version__; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [n for n in torch_to_nnef.__all__ if n != "__version__"])
def test_public_names_resolve_and_are_documented(name):
    assert getattr(torch_to_nnef, name).__doc__
    assert name in dir(torch_to_nnef)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = torch_to_nnef.nothing_of_the_kind


def test_the_native_stub_is_what_the_module_has(tmp_path):
    # Names for types that only the stub needs.
    allowed = tmp_path / "allowed"
    allowed.write_text(
        "".join(f"torch_to_nnef._native.{name}\n" for name in ("Bytes", "Encoder", "FloatName", "Floats", "__all__"))
    )
    command = [
        sys.executable,
        "-m",
        "mypy.stubtest",
        "torch_to_nnef._native",
        "--ignore-disjoint-bases",
        "--allowlist",
        str(allowed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout


# Errors that nothing can raise yet, with what will.
NOT_YET = {"T2NErrorStrictNNEFSpec": "KhronosNNEF"}


@pytest.mark.parametrize("name", sorted(n for n in vars(exceptions) if n.startswith("T2NError")))
def test_every_error_derives_from_the_base_and_is_raised_by_a_test(name):
    error = getattr(exceptions, name)
    assert issubclass(error, exceptions.T2NError)
    aliases = {n for n, e in vars(exceptions).items() if e is error}
    used = any(f"raises({alias}" in text or f", {alias})" in text for alias in aliases for text in texts())
    assert used or name in NOT_YET or name == "T2NError"


def texts():
    return [path.read_text() for path in TESTS.rglob("test_*.py") if path.name != Path(__file__).name]


PRIVATE = re.compile(r"torch\._[a-zA-Z]|_pytree|fx\.experimental|utils\._sympy")


def test_private_parts_of_torch_are_named_in_one_file():
    package = Path(torch_to_nnef.__file__).parent
    named = {path.name for path in package.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert named == {"torch_internals.py"}
