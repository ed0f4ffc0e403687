"""No way leads from a file to code in it: pickles are refused, or read by torch's list of allowed classes."""

import ast
import os
import pickle
import zipfile
from pathlib import Path

import malformed
import numpy as np
import pytest
import torch

import torch_to_nnef
from torch_to_nnef import export_tensors_from_disk_to_nnef, isolated
from torch_to_nnef.exceptions import T2NError
from torch_to_nnef.quantize.calibration import Calibration
from torch_to_nnef.tensor.quant import load_safetensors

PACKAGE = Path(torch_to_nnef.__file__).parent
# Callables that build what a file says, and what they must be told not to.
GUARDED = {
    "torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.lib.format.read_array": ("allow_pickle", False),
    "np.lib.format.write_array": ("allow_pickle", False),
}  # fmt: skip
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "_pickle", "cPickle"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "np.fromregex",
    "torch.jit.load",
    "torch.package.PackageImporter",
}


def test_the_package_has_no_call_that_unpickles():
    faults, names = [], {name.rpartition(".")[2] for name in (*GUARDED, *FORBIDDEN_CALLS)}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                faults += [f"{path}:{node.lineno}: {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
            elif isinstance(node, ast.Call) and ast_name(node.func) in names:
                name = ast.unparse(node.func)
                given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                guard = GUARDED.get(name.replace("numpy.", "np."))
                if (
                    name in FORBIDDEN_CALLS
                    or (guard and given.get(guard[0]) is not guard[1])
                    or given.get("allow_pickle")
                    or given.get("weights_only") is False
                ):
                    faults.append(f"{path}:{node.lineno}: {name}")
    assert faults == []


def ast_name(function):
    return getattr(function, "attr", getattr(function, "id", None))


class Poison:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def poison(tmp_path):
    """A folder that unpickling would make; it must not be there after the test."""
    path = tmp_path / "unpickled"
    yield Poison(path)
    assert not path.exists()


def test_the_poison_works(tmp_path):
    pickle.loads(pickle.dumps(Poison(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested"])
def test_tensors_from_disk(tmp_path, poison, suffix, form):
    path = tmp_path / f"m.{suffix}"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"w": poison}, protocol=2))
    else:
        value = {"w": torch.zeros(2), "x": poison} if form == "nested" else {"w": poison}
        torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(T2NError):
        export_tensors_from_disk_to_nnef(path, tmp_path / "out")
    with pytest.raises(T2NError):
        load_safetensors(path)


def npz(path, poison, form):
    array = np.array([poison], dtype=object)
    if form == "object array":
        np.savez(path, x=array)
    elif form == "npy":
        path.write_bytes(b"")
        with path.open("wb") as file:
            np.save(file, array)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"x": poison}))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy" if form == "pickle as npy" else "x.pkl", pickle.dumps(poison))


@pytest.mark.parametrize("form", ["object array", "npy", "pickle", "pickle as npy", "pickle beside"])
def test_arrays(tmp_path, poison, form):
    path, archive = tmp_path / "x.npz", tmp_path / "m.tar"
    npz(path, poison, form)
    archive.write_bytes(malformed.SOUND)
    for use in (
        isolated.load_arrays, lambda path: isolated.run(archive, path), lambda path: isolated.verify(archive, [path]),
        lambda path: list(Calibration.of_npz(path, {})),
    ):  # fmt: skip
        with pytest.raises(T2NError):
            use(path)
    with pytest.raises(T2NError, match="Python objects"):
        isolated.run(archive, {"x": np.array([poison], dtype=object)})
