"""`OffloadedTensor`: what it promises, on tensors that lie in a scratch file and in safetensors files."""

import copy
import io
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torch_to_nnef.compress import DEFAULT_COMPRESSION, call_method, offloaded_tensor_qtensor
from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorMisuse,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)
from torch_to_nnef.export_tensors import export_tensors_to_nnef
from torch_to_nnef.quantize.rows import recording, weight_error
from torch_to_nnef.tensor import ModTensorUpdater, OffloadedTensor
from torch_to_nnef.tensor.extents import ByteFile, Extent, cut
from torch_to_nnef.tensor.offload import as_stored, loaded, offload, offloaded_safetensors, scratch_in
from torch_to_nnef.tensor.quant import QTensorTractScaleOnly, load_safetensors, quantize_q40, save_safetensors

LAZY = {
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "data": lambda t: t.data,
    "contiguous": lambda t: t.contiguous(),
    "cpu": lambda t: t.cpu(),
    "half": lambda t: t.half(),
    "to": lambda t: t.to(device="cpu", dtype=torch.bfloat16),
    "twice": lambda t: t.half().float(),
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(24, -1),
    "ellipsis": lambda t: t[...],
    "select": lambda t: t[-1],
    "slice": lambda t: t[1:3],
    "slice of slice": lambda t: t[1:6][2:4],
    "empty": lambda t: t[4:2],
    "chunk": lambda t: t.chunk(4),
    "split": lambda t: t.split([1, 5]),
    "cat": lambda t: torch.cat([t, t[:2]]),
    "cat inside": lambda t: torch.cat([t, t], -2),
    "stack": lambda t: torch.stack([t, t]),
    "stack inside": lambda t: torch.stack([t[0], t[1]], 1),
    "cast part": lambda t: t.double()[2],
}
READS = {
    "add": lambda t: t + 1,
    "transpose": lambda t: t.transpose(0, 1),
    "step": lambda t: t[::2],
    "inner slice": lambda t: t[:, 1:3],
    "sum": lambda t: t.sum(),
    "mixed cat": lambda t: torch.cat([t, torch.ones(1, 4, 8)]),
    "cat of dtypes": lambda t: torch.cat([t, t.half()]),
    "linear": lambda t: nn.functional.linear(torch.ones(2, 8), t[0]),
}


@pytest.fixture
def plain():
    return torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))


def both(tensors):
    return tensors if isinstance(tensors, (tuple, list)) else [tensors]


@pytest.mark.parametrize("name", LAZY)
def test_stays_on_disk(plain, name):
    for source in (offload(plain), nn.Parameter(offload(plain)), nn.Parameter(offload(plain), requires_grad=False)):
        for mine, wanted in zip(both(LAZY[name](source)), both(LAZY[name](plain)), strict=True):
            assert isinstance(mine, OffloadedTensor)
            assert (mine.shape, mine.dtype, mine.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
            assert torch.equal(mine.load(), wanted)
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("name", READS)
def test_computes_on_plain_values(plain, name):
    result = READS[name](offload(plain))
    assert type(result) is torch.Tensor
    assert torch.equal(result, READS[name](plain))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: torch.select(t, 0, 6),
        lambda t: torch.select(t, 0, -7),
        lambda t: t.split([1, 2]),
        lambda t: t.view(5, -1),
        lambda t: torch.cat([t, t[0]]),
        lambda t: torch.stack([t, t[:2]]),
        lambda t: t.split(2, 3),
        lambda t: torch.ops.aten.slice(t, 3, 0, 1),
        lambda t: torch.stack([t, t], 4),
        lambda t: t[0, 0, 0].select(0, 0),
        lambda t: t[0, 0, 0][1:],
        lambda t: t[0, 0, 0].split(1),
    ],
)
def test_what_torch_refuses_is_refused(plain, wrong):
    for tensor in (plain, offload(plain)):
        with pytest.raises((RuntimeError, IndexError)):
            wrong(tensor)


def test_torch_does_not_write_where_there_is_no_memory(plain):
    tensor = offload(plain)
    assert tensor.share_memory_() is tensor
    with pytest.raises(T2NErrorMisuse):
        tensor.apply_(abs)
    assert torch.equal(tensor.load(), plain)


def test_reading_as_python_and_numpy(plain):
    tensor = offload(plain)
    assert tensor.tolist() == plain.tolist()
    assert (tensor.numpy() == plain.numpy()).all()
    assert tensor[0, 0, 0].item() == plain[0, 0, 0].item()
    assert "scratch file" in repr(tensor)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 1),
        lambda t: t[0].zero_(),
        lambda t: t.copy_(torch.ones(6, 4, 8)),
        lambda t: t.fill_(2),
        lambda t: t.set_(torch.ones(6, 4, 8)),
        lambda t: t.resize_(3),
        lambda t: setattr(t, "data", torch.ones(6, 4, 8)),
        lambda t: torch.add(torch.ones(6, 4, 8), 1, out=t),
        lambda t: torch._foreach_add_([t], 1),
    ],
)
def test_it_cannot_be_written_to(plain, write):
    tensor = offload(plain)
    with pytest.raises(T2NErrorMisuse, match="cannot be written to"):
        write(tensor)
    assert torch.equal(tensor, plain)


def test_copies_refer_to_the_file_and_pickles_hold_the_values(plain):
    tensor = nn.Parameter(offload(plain))
    copied = copy.deepcopy(tensor)
    assert isinstance(copied, OffloadedTensor)
    assert isinstance(copied, nn.Parameter)
    assert copied.extents == tensor.extents
    unpickled = pickle.loads(pickle.dumps(tensor))
    assert type(unpickled) in (torch.Tensor, nn.Parameter)
    assert torch.equal(unpickled, plain)
    buffer = io.BytesIO()
    torch.save({"w": tensor}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["w"], plain)


def test_a_module_holds_it_like_any_parameter(plain):
    layer = nn.Linear(32, 16)
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(offload(weight))
    state = layer.state_dict()
    assert isinstance(state["weight"], OffloadedTensor)
    layer.half()
    assert layer.weight.dtypes == (torch.float32, torch.float16)
    layer.float()
    assert torch.equal(layer.weight, weight.half().float())
    x = torch.ones(2, 32, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], weight.half().float().sum(0))
    assert type(layer.weight.grad) is torch.Tensor
    other = nn.Linear(32, 16)
    other.load_state_dict(state)
    assert torch.equal(other.weight, weight)
    with pytest.raises(RuntimeError, match="cannot be written to"):
        layer.load_state_dict(other.state_dict())
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer.weight, weight)


def test_ties_are_kept_by_the_updater():
    net = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    net["b"].weight = net["a"].weight
    places = ModTensorUpdater(net)
    held = places.update_by_name("a.weight", offload(net["a"].weight))
    assert isinstance(held, OffloadedTensor)
    assert net["a"].weight is net["b"].weight is held


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_safetensors_files(tmp_path, dtype):
    tensors = {
        "m": (100 * torch.randn(5, 7)).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = offloaded_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, dtype)
        assert torch.equal(tensor.load(), tensors[name])


def test_the_file_may_lose_its_name(tmp_path):
    save_file({"w": torch.arange(8.0)}, tmp_path / "x.safetensors")
    found = offloaded_safetensors(tmp_path / "x.safetensors")
    save_file({"w": torch.zeros(8)}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(tmp_path / "x.safetensors")
    assert torch.equal(found["w"], torch.arange(8.0))


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        header(b"{"),
        header(b"[]"),
        header(b'{"w": 1}'),
        header(b'{"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)),
        header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(4)),
        header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', bytes(4)),
        header(b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)),
        header(b'{"w": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}', bytes(4)),
        header(b'{"w": {"dtype": "F32", "data_offsets": [0, 4]}}', bytes(4)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(T2NErrorInconsistentTensor, match=r"x\.safetensors"):
        offloaded_safetensors(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(T2NErrorNotFoundFile):
        offloaded_safetensors(tmp_path / "x.safetensors")


def test_a_file_cut_short_later_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(8.0)}, path)
    found = offloaded_safetensors(path)["w"]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(T2NErrorInconsistentTensor, match="ends 4 bytes before"):
        found.load()


def test_cutting_runs_of_bytes(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(64)))
    file = ByteFile.open(tmp_path / "x")
    runs = (Extent(file, 40, 8), Extent(file, 0, 4), Extent(file, 10, 6))
    content = b"".join(bytes(range(64))[e.offset : e.offset + e.nbytes] for e in runs)
    for start in range(19):
        for stop in range(start, 19):
            parts = cut(runs, start, stop)
            assert b"".join(bytes(range(64))[e.offset : e.offset + e.nbytes] for e in parts) == content[start:stop]


def test_pieces_of_casts(plain):
    tensor = offload(plain.half()).float()
    assert [(start, len(piece)) for start, piece in tensor.pieces(100)] == [(0, 100), (100, 92)]
    assert torch.equal(torch.cat([piece.clone() for _, piece in tensor.pieces(100)]), plain.half().float().view(-1))


@pytest.mark.parametrize(
    ("chain", "kept"),
    [((torch.bfloat16, torch.float32), 1), ((torch.bfloat16, torch.float16), 2), ((torch.float32,), 1)],
)
def test_as_stored_has_the_same_values(plain, chain, kept):
    tensor = offload(plain.to(chain[0])).to(chain[-1])
    assert len(as_stored(tensor).dtypes) == kept
    assert torch.equal(as_stored(tensor).to(tensor.dtype), tensor)


# -- the scratch file


def test_scratch_has_no_name_and_goes_with_its_tensors(tmp_path):
    with scratch_in(tmp_path):
        first, second = offload(torch.arange(100.0)), offload(torch.arange(50))
    assert not list(tmp_path.iterdir())
    assert first.extents[0].file is second.extents[0].file
    file = first.extents[0].file._file
    assert torch.equal(second, torch.arange(50))
    del first
    assert not file.closed
    del second
    assert file.closed


def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    with scratch_in(tmp_path):
        tensor = offload(torch.arange(4))
        with Path("/dev/full").open("r+b", buffering=0) as full:
            monkeypatch.setattr(tensor.extents[0].file, "_file", full)
            with pytest.raises(T2NErrorRuntime, match=r"cannot write 32 bytes to a scratch file in .*No space left"):
                offload(torch.arange(4))


def test_a_folder_that_is_not_there(tmp_path):
    with scratch_in(tmp_path / "none"), pytest.raises(T2NErrorRuntime, match="scratch file"):
        offload(torch.arange(4))


def test_threads_read_their_own_bytes(tmp_path):
    tensors = [offload(torch.full((50_000,), i)) for i in range(4)]
    wrong = []

    def read(index):
        wrong.extend(index for _ in range(50) if not (tensors[index].load() == index).all())

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- with the rest of the house


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantizing_gives_the_same_bits(stored, dtype):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(stored)
    held, lying = weight.to(dtype), offload(weight).to(dtype)
    for encoder in ("scale_search", "min_max"):
        wanted, found = quantize_q40(held, encoder, 0.99), quantize_q40(lying, encoder, 0.99)
        assert found.dtype == wanted.dtype
        assert found.is_identical(wanted)
        assert weight_error(lying, found) == pytest.approx(weight_error(held, wanted), rel=1e-12)
        exact = held.double()
        noise, signal = float((wanted.decompress().double() - exact).square().sum()), float(exact.square().sum())
        assert weight_error(held, wanted)[1] == pytest.approx((noise / signal) ** 0.5, rel=1e-4)


def test_packed_weights_on_disk_are_the_same_tensor(plain, tmp_path):
    packed = quantize_q40(torch.randn(64, 96), name="w")
    lying = packed.offload()
    assert isinstance(lying.u8_blob, OffloadedTensor)
    assert isinstance(lying.qscheme.scale, OffloadedTensor)
    assert lying.packed_nbytes == packed.packed_nbytes
    assert lying.nnef_name == "w"
    assert torch.equal(lying.decompress(), packed.decompress())
    assert torch.equal(lying.decompress_slice(64, 640), packed.decompress_slice(64, 640))
    assert lying.is_identical(packed)
    assert torch.equal(lying.half() @ torch.ones(96).half(), packed.half() @ torch.ones(96).half())
    assert copy.deepcopy(lying).u8_blob.extents == lying.u8_blob.extents
    assert pickle.loads(pickle.dumps(lying)).is_identical(packed)
    with pytest.raises(T2NErrorMisuse):
        lying.copy_(packed)
    export_tensors_to_nnef({"a": packed, "b": lying, "c": plain, "d": offload(plain)}, tmp_path)
    assert (tmp_path / "a.dat").read_bytes() == (tmp_path / "b.dat").read_bytes()
    assert (tmp_path / "c.dat").read_bytes() == (tmp_path / "d.dat").read_bytes()
    save_safetensors({"a": lying, "tied": lying, "d": offload(plain)}, tmp_path / "x.safetensors")
    back = load_safetensors(tmp_path / "x.safetensors")
    assert back["a"].is_identical(packed)
    assert back["tied"] is back["a"]
    assert torch.equal(back["d"], plain)


@pytest.mark.parametrize("method", ["q40", "min_max_q4_0_all"])
def test_a_method_leaves_what_it_makes_of_weights_on_disk_there(method, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.Linear(64, 64, bias=False))
    net[2].weight = nn.Parameter(torch.randn(64, 64))
    twin = copy.deepcopy(net)
    places = ModTensorUpdater(net)
    for _, tensor in list(places.tensors()):
        places.update_by_ref(tensor, offload(tensor))
    seen = []
    with scratch_in(tmp_path), recording() as mine:
        call_method(DEFAULT_COMPRESSION[method], net, progress=lambda *step: seen.append(step))
    with recording() as theirs:
        call_method(DEFAULT_COMPRESSION[method], twin)
    assert mine == theirs
    assert [step[:2] for step in seen] == [(0, 32768), (8192, 32768), (16384, 32768), (32768, 32768)]
    for (name, lying), (_, held) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        if isinstance(held, QTensorTractScaleOnly):
            assert isinstance(lying.u8_blob, OffloadedTensor), name
            assert lying.is_identical(held)
        else:
            assert isinstance(lying, OffloadedTensor)
    ids = torch.arange(6)[None]
    assert torch.equal(net(ids), twin(ids))


def test_a_method_of_others_may_use_one_function(plain):
    weight = torch.randn(32, 64)

    def by_hand(tensor):
        assert type(tensor) is torch.Tensor
        return quantize_q40(tensor, name="layer")

    held, lying = (offloaded_tensor_qtensor(by_hand, t, "q40") for t in (weight, offload(weight)))
    assert type(held.u8_blob) is torch.Tensor
    assert isinstance(lying.u8_blob, OffloadedTensor)
    assert held.nnef_name == lying.nnef_name == "layer.q40"
    assert lying.is_identical(held)
    assert loaded(plain) is plain
