"""`.dat` files alone: from memory, and from files of weights."""

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from torch_to_nnef import _native, export_tensors_from_disk_to_nnef, export_tensors_to_nnef
from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorNotImplemented,
    T2NErrorRuntime,
)
from torch_to_nnef.tensor import NamedTensor
from torch_to_nnef.tensor.quant import QScalePerGroupF16, QTensor, quantize_q40, save_safetensors

DTYPES = [
    torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def values(path, dtype):
    """What `path` holds, as a plain tensor."""
    _, shape, payload = _native.read_dat(path)
    return torch.from_numpy(payload).view(dtype).reshape(shape)


@pytest.fixture
def stores(tmp_path):
    """The same tensors in every form a file of weights has."""
    tensors = {"encoder.weight": weight(4, 32), "encoder.bias": weight(4, seed=1), "step": torch.tensor(7)}
    save_file(tensors, tmp_path / "w.safetensors")
    for name, zipped in [("w.pt", True), ("w.pth", True), ("w.bin", False)]:
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert not zipfile.is_zipfile(tmp_path / "w.bin")
    return tmp_path, tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path, dtype):
    tensor = (weight(3, 5) * 9).abs().to(dtype)
    assert export_tensors_to_nnef({"a.b": tensor}, tmp_path / "out") == [tmp_path / "out/a.b.dat"]
    back = values(tmp_path / "out/a.b.dat", dtype)
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_layouts_are_written_in_logical_order(tmp_path):
    base = weight(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(3, 6),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base),
        "named": NamedTensor(base, "another"),
    }
    export_tensors_to_nnef(tensors, tmp_path)
    for name, tensor in tensors.items():
        back = values(tmp_path / f"{name}.dat", torch.float32)
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor.detach().as_subclass(torch.Tensor))


def test_a_slash_makes_a_folder_and_other_files_stay(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    (tmp_path / "a.dat").write_text("old")
    paths = export_tensors_to_nnef({"layer/0/w": weight(2), "a": weight(3)}, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == ["layer/0/w.dat", "a.dat"]
    assert files(tmp_path) == ["a.dat", "kept.txt", "layer/0/w.dat"]
    assert torch.equal(values(tmp_path / "a.dat", torch.float32), weight(3))


def test_packed_tensors_stay_packed(tmp_path):
    q = quantize_q40(weight(8, 64))
    export_tensors_to_nnef({"w": q}, tmp_path)
    dtype, shape, blocks = _native.read_dat(tmp_path / "w.dat")
    codes, scales = (plane.view(torch.uint8).numpy() for plane in q.planes())
    assert (dtype, shape) == ("q40", [8, 64])
    np.testing.assert_array_equal(blocks.reshape(-1, 18)[:, :2], scales.reshape(-1, 2))
    np.testing.assert_array_equal(blocks.reshape(-1, 18)[:, 2:], codes.reshape(-1, 16))


def test_a_packed_class_of_the_user_writes_itself(tmp_path):
    class Mine(QTensor):
        def write_in_file(self, dirpath, label, inference_target=None):
            path = dirpath / f"{label}.dat"
            path.write_bytes(self.decompress_to_u8().numpy().tobytes())
            return path

    fp = weight(2, 4)
    scheme = QScalePerGroupF16(4, torch.full((2, 1), 0.25, dtype=torch.float16), n_bits=8)
    export_tensors_to_nnef({"a/w": Mine(fp, scheme)}, tmp_path)
    assert (tmp_path / "a/w.dat").read_bytes() == scheme.quantize_as_u8(fp).numpy().tobytes()
    with pytest.raises(T2NErrorNotImplemented, match="`w`: QTensor has no file format"):
        export_tensors_to_nnef({"w": QTensor(fp, scheme)}, tmp_path)


HOSTILE = [
    "../w", "a/../../w", "/w", "a//w", "", ".", "..", ".hidden", "a/.b", "a\0b", "a\nb", "a\\b", "w" * 300, "\ud800", 3,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_are_refused_before_anything_is_written(tmp_path, name):
    for tensors in ({"fine": weight(2), name: weight(2)}, {name: quantize_q40(weight(2, 32))}):
        with pytest.raises(T2NErrorInvalidArgument):
            export_tensors_to_nnef(tensors, tmp_path / "deep/out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("w", "W"), ("a/w", "A/W"), ("a.dat/w", "a"), ("É", "é")])
def test_names_that_a_host_confuses_are_refused(tmp_path, names):
    with pytest.raises(T2NErrorInvalidArgument, match="collides"):
        export_tensors_to_nnef(dict.fromkeys(names, weight(2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (torch.ones(2, dtype=torch.bfloat16), T2NErrorNotImplemented, "bfloat16.*`bad`.*float"),
        (torch.ones(2, dtype=torch.complex64), T2NErrorNotImplemented, "complex64.*`bad`"),
        (torch.empty(2, device="meta"), T2NErrorInvalidArgument, "`bad` has no dense data"),
        (torch.eye(3).to_sparse(), T2NErrorInvalidArgument, "`bad` has no dense data"),
        (torch.zeros([1] * 9), T2NErrorInvalidArgument, '"bad".*8 dimensions'),
        (torch.zeros(1).expand(2**30), T2NErrorInvalidArgument, '"bad".*4 GiB'),
        (np.zeros(2), T2NErrorInvalidArgument, "`bad` is a ndarray"),
    ],
)
def test_what_a_dat_cannot_hold_is_refused_before_anything_is_written(tmp_path, tensor, error, text):
    with pytest.raises(error, match=text):
        export_tensors_to_nnef({"fine": weight(2), "bad": tensor}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "a").write_text("mine")
    for output_dir, name in [(tmp_path / "a", "w"), (tmp_path, "a/w")]:
        with pytest.raises(T2NErrorRuntime, match="cannot write"):
            export_tensors_to_nnef({name: weight(2)}, output_dir)
    assert files(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin"])
def test_every_store_gives_the_same_files(stores, suffix):
    folder, tensors = stores
    paths = export_tensors_from_disk_to_nnef(str(folder / f"w.{suffix}"), str(folder / "out"))
    assert sorted(p.name for p in paths) == sorted(f"{name}.dat" for name in tensors) == files(folder / "out")
    for name, tensor in tensors.items():
        assert torch.equal(values(folder / "out" / f"{name}.dat", tensor.dtype), tensor)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_filter_and_check_see_names_and_tensors(stores, suffix):
    folder, tensors = stores
    asked, found = [], {}
    export_tensors_from_disk_to_nnef(
        folder / f"w.{suffix}",
        folder / "out",
        filter_key=lambda name: asked.append(name) or name.startswith("encoder"),
        fn_check_found_tensors=found.update,
    )
    assert sorted(asked) == sorted(tensors)
    assert sorted(found) == ["encoder.bias", "encoder.weight"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    assert files(folder / "out") == ["encoder.bias.dat", "encoder.weight.dat"]


def test_a_check_that_says_no_stops_the_export(stores):
    folder, _ = stores

    def refuse(found):
        raise KeyError("mine")

    for verdict in (False, np.bool_(False)):
        with pytest.raises(T2NErrorInvalidArgument, match=r"refused.*step"):
            export_tensors_from_disk_to_nnef(
                folder / "w.pt", folder / "out", fn_check_found_tensors=lambda _, v=verdict: v
            )
    with pytest.raises(KeyError, match="mine"):
        export_tensors_from_disk_to_nnef(folder / "w.pt", folder / "out", fn_check_found_tensors=refuse)
    with pytest.raises(T2NErrorInvalidArgument, match=r"no tensor to write.*encoder\.weight"):
        export_tensors_from_disk_to_nnef(folder / "w.pt", folder / "out", filter_key=lambda _: False)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_packed_tensors_on_disk_stay_packed(tmp_path, suffix):
    q = quantize_q40(weight(8, 64), name="w")
    store = tmp_path / f"q.{suffix}"
    save_safetensors({"w": q}, store) if suffix == "safetensors" else torch.save({"w": q}, store)
    export_tensors_from_disk_to_nnef(store, tmp_path / "disk")
    export_tensors_to_nnef({"w": q}, tmp_path / "memory")
    assert _native.read_dat(tmp_path / "disk/w.dat")[0] == "q40"
    assert (tmp_path / "disk/w.dat").read_bytes() == (tmp_path / "memory/w.dat").read_bytes()


class Code:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"w": Code(tmp_path / "run")}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(T2NErrorInconsistentTensor, match="could run code"):
        export_tensors_from_disk_to_nnef(tmp_path / "w.pt", tmp_path / "out")
    assert files(tmp_path) == ["w.pt"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_damaged_stores_raise_typed_errors(stores, suffix, share):
    folder, _ = stores
    whole = (folder / f"w.{suffix}").read_bytes()
    damaged = folder / f"damaged.{suffix}"
    damaged.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(T2NErrorInconsistentTensor, match=f"damaged.{suffix}"):
        export_tensors_from_disk_to_nnef(damaged, folder / "out")
    assert not (folder / "out").exists()


def test_what_is_not_a_store_of_tensors(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(T2NErrorInvalidArgument, match=r"suffix.*\.safetensors"):
        export_tensors_from_disk_to_nnef(tmp_path / "w.npz", tmp_path / "out")
    with pytest.raises(T2NErrorNotFoundFile):
        export_tensors_from_disk_to_nnef(tmp_path / "missing.pt", tmp_path / "out")
    torch.save([weight(2)], tmp_path / "list.pt")
    with pytest.raises(T2NErrorInvalidArgument, match="holds a list"):
        export_tensors_from_disk_to_nnef(tmp_path / "list.pt", tmp_path / "out")
    torch.save({"epoch": 3, "state_dict": {"w": weight(2)}}, tmp_path / "nested.pt")
    with pytest.raises(T2NErrorInvalidArgument, match="`epoch` is a int"):
        export_tensors_from_disk_to_nnef(tmp_path / "nested.pt", tmp_path / "out")
    assert files(tmp_path / "out") == []
