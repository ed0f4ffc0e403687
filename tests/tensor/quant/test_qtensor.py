"""Every row of the QTensor table of promises."""

import copy
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
    T2NErrorNotImplemented,
)
from torch_to_nnef.tensor import ModTensorUpdater, NamedTensor
from torch_to_nnef.tensor.quant import (
    BitPacking,
    Huffman,
    Lzma,
    NibblePacking,
    QScalePerGroupF16,
    QTensor,
    QTensorTractScaleOnly,
    load_safetensors,
    qscale_per_group_f16_min_max_calibration,
    quantize_q40,
    save_safetensors,
)

CODECS = {
    "none": (),
    "nibbles": None,
    "lzma": (Lzma(),),
    "nibbles+lzma": (NibblePacking(), Lzma()),
    "huffman": (Huffman(),),
}


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def q():
    return quantize_q40(weight(8, 64), name="fc.weight")


@pytest.fixture
def generic():
    fp = weight(6, 10)
    return QTensor(fp, qscale_per_group_f16_min_max_calibration(fp, 3, 5), u8_compressors=[BitPacking(3), Huffman()])


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    for layer in (net[0], net[2]):
        layer.weight = nn.Parameter(quantize_q40(layer.weight), requires_grad=False)
    return net


def floats_of(net):
    """The same network on plain dequantized weights."""
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    plain.load_state_dict({k: v.decompress() if isinstance(v, QTensor) else v for k, v in net.state_dict().items()})
    return plain


def packed_bytes(q):
    return q.u8_blob.numpy().tobytes(), q.qscheme.scale.numpy().tobytes()


def test_metadata_is_known_without_dequantizing(q, monkeypatch):
    monkeypatch.setattr(QTensorTractScaleOnly, "decompress", lambda self: pytest.fail("dequantized"))
    assert (q.shape, q.dtype, q.dim(), q.size(), q.stride()) == ((8, 64), torch.float32, 2, (8, 64), (64, 1))
    assert (q.device.type, q.numel(), q.is_contiguous(), q.requires_grad, len(q)) == ("cpu", 512, True, False, 8)
    assert repr(q) == "QTensorTractScaleOnly(shape=(8, 64), dtype=torch.float32, nbytes=288, nnef_name='fc.weight')"


def test_memory_is_the_packed_bytes_alone():
    fp = weight(64, 1024)
    storage = weakref.ref(fp.untyped_storage())
    q = quantize_q40(fp)
    del fp
    assert storage() is None
    assert q.packed_nbytes / q.numel() == 0.5625
    with pytest.raises(RuntimeError):
        q.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "fn",
    [
        lambda w: w + 1, lambda w: w.t(), lambda w: w[1:3], lambda w: w.reshape(-1), lambda w: w.sum(), lambda w: w.unbind(0)[2],
        lambda w: torch.cat([w, w]), lambda w: torch.stack([w, torch.zeros(8, 64)]), lambda w: torch.split(w, 4)[1],
        lambda w: torch.zeros_like(w), lambda w: w.to(torch.int32), lambda w: torch.einsum("nk,mk->nm", w, w), lambda w: abs(w).tolist(),
        lambda w: nn.functional.linear(torch.ones(2, 64), w), lambda w: nn.functional.embedding(torch.tensor([3, 0]), w),
        lambda w: torch.zeros(8, 64).copy_(w), lambda w: w.numpy() if type(w) is torch.Tensor else w.decompress().numpy(),
    ],
)  # fmt: skip
def test_any_function_runs_on_the_value_and_returns_plain(q, fn):
    result, expected = fn(q), fn(q.decompress())
    if isinstance(expected, torch.Tensor):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    else:
        assert type(result) is type(expected)
        assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected))


def write_slice(q):
    q[0] = 1.0


def write_data(q):
    q.data = torch.zeros(8, 64)


def write_requires_grad(q):
    q.requires_grad = True


@pytest.mark.parametrize(
    "write",
    [
        write_slice, write_data, write_requires_grad, lambda q: q.requires_grad_(), lambda q: q.requires_grad_(True),
        lambda q: q.requires_grad_(requires_grad=True), lambda q: nn.Parameter(q), lambda q: q.add_(1), lambda q: q.zero_(),
        lambda q: q.copy_(torch.zeros(8, 64)), lambda q: q.copy_(quantize_q40(torch.ones(4, 128))), lambda q: q.t_(),
        lambda q: torch.add(torch.zeros(8, 64), 1, out=q), lambda q: torch._foreach_add_([torch.zeros(8, 64), q], 1),
        lambda q: q.detach().mul_(2), lambda q: q.data.mul_(2), lambda q: nn.init.zeros_(q), lambda q: q.set_(torch.zeros(8, 64)),
        lambda q: q.index_fill_(0, torch.tensor([0]), 0.0), lambda q: q.__ior__(1), lambda q: q.apply_(abs),
    ],
)  # fmt: skip
def test_writes_are_refused_and_change_nothing(q, write):
    before = packed_bytes(q), q.shape, q.dtype
    with pytest.raises(T2NErrorMisuse):
        write(q)
    assert (packed_bytes(q), q.shape, q.dtype) == before
    assert not q.requires_grad


def test_reading_as_python_and_numpy(q):
    values = q.decompress()
    assert q.tolist() == values.tolist()
    assert (q.numpy() == values.numpy()).all()
    assert (np.asarray(q) == values.numpy()).all()


def test_codes_are_shared_between_processes(model):
    codes = {name: p.clone() for name, p in model.named_parameters()}
    model.share_memory()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, codes[name])
        if isinstance(parameter, QTensor):
            assert all(part.is_shared() for part in (parameter.u8_blob, parameter.qscheme.scale))


@pytest.mark.parametrize(
    "make",
    [
        lambda q: quantize_q40(None), lambda q: QScalePerGroupF16(32, None, 4), lambda q: QTensor(None, q.qscheme),
        lambda q: QTensor(q.decompress(), 3), lambda q: NamedTensor(None, "a"), lambda q: NamedTensor(q, "a"),
        lambda q: ModTensorUpdater(nn.Linear(2, 2)).update_by_name("weight", None),
        lambda q: ModTensorUpdater(nn.Linear(2, 2)).update_by_ref(None, q),
    ],
)  # fmt: skip
def test_what_is_no_tensor_is_refused(q, make):
    with pytest.raises(T2NErrorInvalidArgument, match=r"is expected|nnef_name"):
        make(q)


def test_load_state_dict_of_a_float_is_refused(model):
    before = [packed_bytes(model[i].weight) for i in (0, 2)]
    with pytest.raises(RuntimeError, match="cannot copy a float tensor into QTensorTractScaleOnly"):
        model.load_state_dict(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).state_dict())
    assert [packed_bytes(model[i].weight) for i in (0, 2)] == before


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_of_qtensors_is_bit_identical(model, assign):
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    for layer in (other[0], other[2]):
        layer.weight = nn.Parameter(quantize_q40(layer.weight), requires_grad=False)
    assert not other[0].weight.is_identical(model[0].weight)
    other.load_state_dict(model.state_dict(), assign=assign)
    x = weight(3, 64)
    assert other[0].weight.is_identical(model[0].weight)
    assert isinstance(other[0].weight, nn.Parameter)
    assert torch.equal(other(x), model(x))


def test_copy_between_different_packings_tells_what_to_do(model):
    fp = weight(64, 64)
    scheme = quantize_q40(fp).qscheme
    model[0].weight = nn.Parameter(QTensorTractScaleOnly(fp, scheme, u8_compressors=[Lzma()]), requires_grad=False)
    state = {**model.state_dict(), "0.weight": quantize_q40(fp)}
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict(state)


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_every_copy_is_packed_and_bit_identical(codecs, tmp_path):
    fp = weight(8, 64)
    q = QTensorTractScaleOnly(fp, quantize_q40(fp).qscheme, torch.float16, codecs)
    q.nnef_name = "w"
    buffer = io.BytesIO()
    torch.save({"w": q}, buffer)
    buffer.seek(0)
    save_safetensors({"w": q}, tmp_path / "w.safetensors")
    copies = {
        "clone": q.clone(), "detach": q.detach(), "deepcopy": copy.deepcopy(q), "pickle": pickle.loads(pickle.dumps(q)),
        "torch.save": torch.load(buffer, weights_only=True)["w"], "safetensors": load_safetensors(tmp_path / "w.safetensors")["w"],
        "contiguous": q.contiguous(), "parameter": nn.Parameter(q, requires_grad=False),
    }  # fmt: skip
    for how, other in copies.items():
        assert type(other) is QTensorTractScaleOnly, how
        assert other.is_identical(q), how
        assert (other.dtype, other.nnef_name, packed_bytes(other)) == (torch.float16, "w", packed_bytes(q)), how
    assert copies["clone"].u8_blob.data_ptr() != q.u8_blob.data_ptr()


def test_generic_scheme_and_codecs_survive_every_copy(generic, tmp_path):
    save_safetensors({"g": generic, "plain": torch.ones(2)}, tmp_path / "g.safetensors")
    loaded = load_safetensors(tmp_path / "g.safetensors")
    assert loaded["g"].is_identical(generic)
    assert torch.equal(loaded["plain"], torch.ones(2))
    assert pickle.loads(pickle.dumps(generic)).is_identical(generic)
    assert torch.equal(generic.decompress(), generic.qscheme.quantize_as_torch(weight(6, 10)))


def test_tensors_that_share_codes_alone_are_both_stored(tmp_path):
    q = quantize_q40(weight(4, 64))
    half = QScalePerGroupF16(32, q.qscheme.scale / 2, 4)
    other = QTensorTractScaleOnly.from_packed(q.u8_blob, q.shape, half, q.dtype, q.u8_compressors)
    save_safetensors({"q": q, "other": other, "tied": q.detach()}, tmp_path / "w.safetensors")
    loaded = load_safetensors(tmp_path / "w.safetensors")
    assert loaded["q"].is_identical(q)
    assert loaded["tied"] is loaded["q"]
    assert loaded["other"].is_identical(other)


@pytest.mark.parametrize("names", [("q", "q::u8_blob"), ("q", "q::mine"), ("__metadata__",)])
def test_names_that_the_file_takes_for_something_else_are_refused(tmp_path, names):
    tensors = {name: quantize_q40(weight(4, 64)) if name == "q" else torch.ones(3) for name in names}
    with pytest.raises(T2NErrorInvalidArgument, match=f"`{names[-1]}`: a safetensors file has this name"):
        save_safetensors(tensors, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_deepcopy_of_a_model_keeps_ties(model):
    model.tied = nn.Linear(64, 64)
    model.tied.weight = model[0].weight
    twin = copy.deepcopy(model)
    assert twin.tied.weight is twin[0].weight
    assert twin[0].weight is not model[0].weight
    assert isinstance(twin[0].weight, nn.Parameter)
    assert twin[0].weight.is_identical(model[0].weight)


def test_parameter_of_a_module(model):
    parameter = model[0].weight
    assert isinstance(parameter, QTensor)
    assert isinstance(parameter, nn.Parameter)
    assert dict(model.named_parameters())["0.weight"] is parameter
    assert isinstance(model.state_dict()["0.weight"], QTensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_to_dtype_keeps_the_codes(q, model, dtype):
    converted = q.to(dtype)
    assert (converted.dtype, converted.dequant_to_dtype, converted.decompress().dtype) == (dtype, dtype, dtype)
    assert packed_bytes(converted) == packed_bytes(q)
    assert torch.equal(converted.decompress(), q.decompress().to(dtype))
    assert q.dtype == torch.float32
    before = packed_bytes(model[0].weight)
    model.to(dtype)
    assert isinstance(model[0].weight, QTensor)
    assert isinstance(model[0].weight, nn.Parameter)
    assert (model[0].weight.dtype, packed_bytes(model[0].weight)) == (dtype, before)
    assert model(torch.ones(1, 64, dtype=dtype)).dtype == dtype


def test_half_is_float16(q, model):
    assert q.half().dtype == torch.float16
    assert model.half()[0].weight.dtype == torch.float16


def test_to_device_is_a_new_object(q):
    moved = q.to("meta")
    assert type(moved) is QTensorTractScaleOnly
    assert (moved.device.type, moved.u8_blob.device.type, moved.qscheme.scale.device.type) == ("meta",) * 3
    assert moved.decompress().shape == (8, 64)
    assert q.device.type == "cpu"
    assert q.to_device("cpu") is not q
    assert q.to_device("cpu").is_identical(q)


def test_gradient_flows_to_the_inputs(model):
    x = weight(3, 64).requires_grad_()
    model(x).square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    floats_of(model)(reference).square().sum().backward()
    assert torch.equal(x.grad, reference.grad)
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_traces_through(model, strict):
    x = weight(3, 64)
    program = torch.export.export(model, (x,), strict=strict)
    assert isinstance(program.state_dict["0.weight"], QTensor)
    assert torch.equal(program.module()(x), model(x))
    assert not torch.__future__.get_swap_module_params_on_conversion()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_traces_through(model, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = weight(3, 64).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, model(x))
    y.sum().backward()
    assert x.grad is not None
    model[0].weight = nn.Parameter(quantize_q40(weight(64, 64, seed=7)), requires_grad=False)
    assert torch.equal(compiled(x), model(x))


def test_generic_qtensor_in_a_compiled_graph():
    fp = weight(64, 64)
    layer = nn.Linear(64, 64, bias=False)
    scheme = qscale_per_group_f16_min_max_calibration(fp, 8, 64)
    layer.weight = nn.Parameter(QTensor(fp, scheme), requires_grad=False)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(fp), layer(fp))


def test_subclass_with_its_own_file_format(tmp_path):
    class Mine(QTensor):
        def write_in_file(self, dirpath, label, inference_target=None):
            path = dirpath / f"{label}.dat"
            path.write_bytes(self.decompress_to_u8().numpy().tobytes())
            return path

    fp = weight(2, 4)
    mine = Mine(fp, qscale_per_group_f16_min_max_calibration(fp, 8, 4))
    kept = nn.Parameter(mine, requires_grad=False).half()
    assert type(kept) is Mine
    assert kept.write_in_file(tmp_path, "w").read_bytes() == mine.decompress_to_u8().numpy().tobytes()


def test_base_class_has_no_file_format(generic, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match="QTensorTractScaleOnly"):
        generic.write_in_file(tmp_path, "w")


@pytest.mark.parametrize(
    ("blob", "scale"),
    [
        (torch.zeros(255, dtype=torch.uint8), torch.zeros(16, 1, dtype=torch.float16)),
        (torch.zeros(256, dtype=torch.uint8), torch.zeros(15, 1, dtype=torch.float16)),
        (torch.zeros(256, dtype=torch.int8), torch.zeros(16, 1, dtype=torch.float16)),
        (torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(16, 1, dtype=torch.float16)),
    ],
)
def test_parts_that_do_not_fit_are_refused(blob, scale):
    with pytest.raises(T2NErrorInconsistentTensor):
        QTensorTractScaleOnly.from_packed(
            blob, (8, 64), QScalePerGroupF16(32, scale, 4), u8_compressors=[NibblePacking()]
        )


def test_shared_tensors_are_stored_once(tmp_path, q):
    plain = weight(100, 100)
    save_safetensors({"a": q, "b": q.detach(), "c": plain, "d": plain.detach()}, tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_size < plain.numel() * 4 + 2000
    loaded = load_safetensors(tmp_path / "s.safetensors")
    assert loaded["a"] is loaded["b"]
    assert loaded["c"] is loaded["d"]


def test_damaged_safetensors_are_refused(tmp_path, q):
    path = tmp_path / "s.safetensors"
    save_safetensors({"a": q}, path)
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        whole[:20],
        whole.replace(b"[8, 64]", b"[9, 64]"),
        whole.replace(b"QScalePer", b"QScaleper"),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(T2NErrorInconsistentTensor):
            load_safetensors(path)
