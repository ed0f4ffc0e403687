"""8-bit weights and the codes of activations: torch's own quantizers are the reference, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef.exceptions import (
    T2NErrorImpossibleQuantization,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
    T2NErrorNotImplemented,
)
from torch_to_nnef.tensor.offload import offload
from torch_to_nnef.tensor.quant import (
    Affine8,
    Lzma,
    QParams,
    QTensorInt8,
    load_safetensors,
    quantize_int8,
    save_safetensors,
)

U8 = QParams(0.03, 120, torch.uint8, 0, 255)
I8 = QParams(0.02, -7, torch.int8, -128, 127)


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def q():
    return quantize_int8(weight(8, 6), input_qparams=U8, name="fc.weight")


def in_module(packed, module):
    module.weight = nn.Parameter(packed, requires_grad=False)
    return module


# -- codes of activations


@pytest.mark.parametrize("qparams", [U8, I8, QParams(0.01, 0, torch.int8, -127, 127)], ids=str)
def test_codes_of_activations_are_those_of_torch(qparams):
    x = torch.cat([weight(1000) * 3, torch.tensor([0.0, 1e9, -1e9, 0.015, -0.015, 0.045])])
    fields = (qparams.scale, qparams.zero_point, qparams.quant_min, qparams.quant_max, qparams.dtype)
    codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, *fields)
    assert torch.equal(qparams.quantize(x), codes)
    assert torch.equal(qparams.dequantize(codes), (codes.float() - qparams.zero_point) * qparams.scale)
    assert torch.equal(qparams.fake(x), qparams.dequantize(codes))
    assert qparams.fake(x[qparams.fake(x) == 0]).eq(0).all()
    for dtype in (torch.float16, torch.float64):
        assert qparams.fake(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-42, 1e-42), (-1e30, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_range_is_covered_and_zero_is_exact(low, high, dtype):
    qparams = QParams.of_range(low, high, dtype)
    ends = qparams.fake(torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)]))
    assert ends[1] == 0
    # The zero point is rounded, so an end may lie half a step beyond the last code.
    assert (ends - torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])).abs().max() <= 0.51 * qparams.scale
    assert qparams.scale == float(torch.tensor(qparams.scale, dtype=torch.float32))


@pytest.mark.parametrize(
    "fields",
    [
        (0.1, 0, torch.int16, -128, 127),
        (0.1, 0, torch.int8, -129, 127),
        (0.1, 256, torch.uint8, 0, 255),
        (0.0, 0, torch.int8, -128, 127),
        (float("nan"), 0, torch.int8, -128, 127),
        (float("inf"), 0, torch.int8, -128, 127),
    ],
)
def test_what_are_no_codes(fields):
    with pytest.raises(T2NErrorInvalidArgument):
        QParams(*fields)


@pytest.mark.parametrize("bound", [float("inf"), float("nan")])
def test_no_range_of_numbers_that_are_none(bound):
    with pytest.raises(T2NErrorImpossibleQuantization):
        QParams.of_range(-1.0, bound, torch.uint8)


# -- weights


# torch's own 8-bit tensors are announced to go.
as_torch = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")


@as_torch
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_values_are_those_of_torch_per_channel(axis):
    w = weight(6, 5, 3)
    q = quantize_int8(w, axis=axis)
    scales = w.abs().amax([d for d in range(3) if d != axis % 3]) / 127
    torchs = torch.quantize_per_channel(w, scales, torch.zeros_like(scales), axis % 3, torch.qint8)
    assert torch.equal(q.scale, scales)
    assert torch.equal(q.codes, torchs.int_repr())
    assert torch.equal(q.decompress(), torchs.dequantize())
    assert (q.axis, q.codes.dtype, q.shape, q.codes.min() >= -127) == (axis % 3, torch.int8, w.shape, True)


@as_torch
def test_values_are_those_of_torch_per_tensor():
    w = weight(6, 5)
    q = quantize_int8(w, per_channel=False)
    torchs = torch.quantize_per_tensor(w, float(w.abs().max() / 127), 0, torch.qint8)
    assert torch.equal(q.codes, torchs.int_repr())
    assert torch.equal(q.decompress(), torchs.dequantize())
    assert (q.axis, q.scale.shape, q.zero_point.tolist()) == (None, (1,), [0])


def test_large_weights_are_quantized_in_pieces(monkeypatch):
    w = weight(64, 30)
    whole = quantize_int8(w)
    monkeypatch.setattr("torch_to_nnef.tensor.chunks.flat_chunks.__defaults__", (1, 100))
    for same in (w, offload(w), w.t().contiguous().t()):
        assert quantize_int8(same).is_identical(whole)
    assert torch.equal(quantize_int8(w, axis=1).decompress(), quantize_int8(w.t()).decompress().t())
    squares = [float(t.square().sum()) for t in (w, whole.decompress() - w)]
    assert whole.squared_error(w) == pytest.approx(squares)


def test_codes_of_any_zero_point():
    codes = torch.randint(0, 256, (4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale, zero_point = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 100.25, 7.0, 255.0])
    q = QTensorInt8.from_codes(codes, scale, zero_point, 0)
    assert torch.equal(q.decompress(), (codes - zero_point[:, None]) * scale[:, None])
    assert torch.equal(q.codes, codes)
    assert q.zero_point.dtype == torch.float32
    assert q.packed_nbytes == 12 + 16 + 16
    assert torch.equal(q.decompress_slice(2, 11), q.decompress().flatten()[2:11])
    assert torch.equal(QTensorInt8(q.decompress(), q.qscheme).codes, codes)
    per_tensor = QTensorInt8.from_codes(codes, scale[:1], torch.tensor([3]), None)
    assert torch.equal(per_tensor.decompress(), (codes.float() - 3) * 0.1)
    assert torch.equal(per_tensor.decompress_slice(1, 5), per_tensor.decompress().flatten()[1:5])


def test_channels_of_zeros():
    w = weight(3, 4)
    w[1] = 0
    q = quantize_int8(w)
    assert torch.equal(q.decompress()[1], torch.zeros(4))
    # A bias is counted in steps of the weight's scale times that of the input, in 32 bits.
    assert q.scale.min() >= q.scale.max() * 2.0**-16
    nothing = quantize_int8(torch.zeros(3, 4))
    assert torch.equal(nothing.decompress(), torch.zeros(3, 4))
    assert bool((nothing.scale > 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_codes_of_numbers_that_are_none(bad):
    w = weight(3, 4)
    w[2, 1] = bad
    with pytest.raises(T2NErrorImpossibleQuantization, match="fc"):
        quantize_int8(w, name="fc")
    with pytest.raises(T2NErrorImpossibleQuantization):
        quantize_int8(torch.zeros(0, 3))
    with pytest.raises(T2NErrorImpossibleQuantization):
        QTensorInt8(w, quantize_int8(weight(3, 4)).qscheme)


def test_parts_that_do_not_fit_are_refused(q):
    codes, one = torch.zeros(4, 3, dtype=torch.int8), torch.ones(1)
    for scale, zero_point, axis in ((one, one, 0), (torch.ones(4), one, 0), (torch.ones(4), torch.ones(4), None)):
        with pytest.raises(T2NErrorInconsistentTensor):
            QTensorInt8.from_codes(codes, scale, zero_point, axis)
    for wrong in ((codes.int(), one, one, None), (codes, one * 0, one, None), (codes, torch.ones(4), torch.ones(4), 2)):
        with pytest.raises(T2NErrorInvalidArgument):
            QTensorInt8.from_codes(*wrong)
    with pytest.raises(T2NErrorInconsistentTensor):
        QTensorInt8.from_packed(torch.zeros(11, dtype=torch.uint8), (4, 3), q.qscheme)


# -- a tensor as the other packed ones


@pytest.mark.parametrize("codecs", [(), (Lzma(),)], ids=str)
@pytest.mark.parametrize("qparams", [None, I8], ids=["weight only", "input codes"])
def test_every_copy_is_packed_and_bit_identical(codecs, qparams, tmp_path):
    found = quantize_int8(weight(8, 6), input_qparams=qparams)
    q = QTensorInt8(weight(8, 6), found.qscheme, torch.float16, codecs)
    assert torch.equal(q.codes, found.codes)
    q.nnef_name = "w"
    buffer = io.BytesIO()
    torch.save({"w": q}, buffer)
    buffer.seek(0)
    save_safetensors({"w": q, "tied": q.detach()}, tmp_path / "w.safetensors")
    loaded = load_safetensors(tmp_path / "w.safetensors")
    copies = {
        "clone": q.clone(), "detach": q.detach(), "deepcopy": copy.deepcopy(q), "pickle": pickle.loads(pickle.dumps(q)),
        "torch.save": torch.load(buffer, weights_only=True)["w"], "safetensors": loaded["w"], "tied": loaded["tied"],
        "float": q.float().half(), "contiguous": q.contiguous(), "parameter": nn.Parameter(q, requires_grad=False),
        "device": q.to_device("cpu"), "disk": q.offload(),
    }  # fmt: skip
    for how, other in copies.items():
        assert type(other) is QTensorInt8, how
        assert other.is_identical(q), how
        assert (other.input_qparams, other.dtype, other.nnef_name) == (qparams, torch.float16, "w"), how
        assert torch.equal(other.decompress(), q.decompress()), how


def test_in_a_module(q):
    assert q.to("meta").decompress().shape == (8, 6)
    layer = in_module(q, nn.Linear(6, 8))
    twin = in_module(quantize_int8(weight(8, 6, seed=1), input_qparams=U8), nn.Linear(6, 8))
    twin.load_state_dict(layer.state_dict())
    assert twin.weight.is_identical(q)
    assert layer.half().weight.dtype == torch.float16
    assert layer(weight(2, 6).half()).dtype == torch.float16
    with pytest.raises(T2NErrorMisuse):
        layer.weight.add_(1)
    # Codes without the meaning of their inputs would compute something else.
    other = in_module(quantize_int8(weight(8, 6), input_qparams=I8), nn.Linear(6, 8))
    with pytest.raises(RuntimeError, match="assign=True"):
        other.load_state_dict(layer.state_dict())
    with pytest.raises(T2NErrorNotImplemented):
        q.write_in_file("/tmp", "w")


@pytest.mark.parametrize("qparams", [None, U8], ids=["weight only", "input codes"])
@pytest.mark.parametrize(
    "fn",
    [
        lambda w: w + 1, lambda w: w.t() * 2, lambda w: w[1:3].sum(0), lambda w: w.sum(), lambda w: w.unbind(0)[2] * 1,
        lambda w: torch.cat([w, w]), lambda w: torch.split(w, 4)[1].exp(), lambda w: w.to(torch.int32), lambda w: w.t().contiguous(),
        lambda w: functional.embedding(torch.tensor([3, 0]), w), lambda w: w.unsqueeze(0).permute(1, 2, 0) + 0, lambda w: w @ w.t(),
        lambda w: w.t().reshape(-1) - 1, lambda w: w[0][1].item(), lambda w: torch.zeros(8, 6).copy_(w),
    ],
)  # fmt: skip
def test_any_other_function_runs_on_the_value_and_returns_plain(fn, qparams):
    w = quantize_int8(weight(8, 6), input_qparams=qparams)
    result, expected = fn(w), fn(w.decompress())
    if isinstance(expected, torch.Tensor):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    else:
        assert result == expected


# -- inputs of products are rounded


PRODUCTS = {
    "linear": ((3, 6), (8, 6), functional.linear),
    "linear of more axes": ((2, 3, 6), (8, 6), functional.linear),
    "linear with bias": ((3, 6), (8, 6), lambda x, w: functional.linear(x, w, torch.ones(8))),
    "linear of a vector": ((6,), (8, 6), functional.linear),
    "x @ w": ((2, 3, 6), (6, 8), lambda x, w: x @ w),
    "w @ x": ((6, 5), (8, 6), lambda x, w: w @ x),
    "w @ v": ((6,), (8, 6), lambda x, w: w @ x),
    "addmm": ((3, 6), (6, 8), lambda x, w: torch.addmm(torch.ones(8), x, w)),
    "bmm": ((4, 3, 6), (4, 6, 8), torch.bmm),
    "einsum": ((2, 3, 6), (8, 6), lambda x, w: torch.einsum("btk,nk->btn", x, w)),
    "half of the weight": ((3, 6), (8, 6), lambda x, w: functional.linear(x, w.chunk(2)[1])),
    "heads": ((3, 6), (8, 6), lambda x, w: functional.linear(x, w.view(2, 4, 6)[1])),
    "conv1d": ((2, 4, 9), (8, 4, 3), lambda x, w: functional.conv1d(x, w, torch.ones(8), stride=2)),
    "conv2d": ((2, 4, 9, 9), (8, 2, 3, 3), lambda x, w: functional.conv2d(x, w, padding="same", groups=2)),
    "conv3d": ((2, 4, 5, 5, 5), (8, 4, 3, 3, 3), functional.conv3d),
}


# Torch makes no views of wrapper subclasses in inference mode.
WAYS = [
    (c, g)
    for c in PRODUCTS
    for g in ("grad", "no_grad", "inference_mode")
    if g != "inference_mode" or c not in ("half of the weight", "heads")
]


@pytest.mark.parametrize("qparams", [U8, I8], ids=["u8", "i8"])
@pytest.mark.parametrize(("case", "grad"), WAYS)
def test_the_input_of_a_product_is_rounded(case, qparams, grad):
    shape, weight_shape, fn = PRODUCTS[case]
    x, q = weight(*shape, seed=1), quantize_int8(weight(*weight_shape), input_qparams=qparams)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[grad]
    with context():
        result = fn(x, q)
    assert type(result) is torch.Tensor
    assert torch.equal(result, fn(qparams.fake(x), q.decompress()))
    assert not torch.equal(result, fn(x, q.decompress()))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_attention_of_torch_rounds_its_inputs(cross):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    module.in_proj_weight = nn.Parameter(quantize_int8(module.in_proj_weight, input_qparams=U8), requires_grad=False)
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain.load_state_dict(module.state_dict() | {"in_proj_weight": module.in_proj_weight.decompress()})
    x, y = weight(2, 5, 8), weight(2, 4, 8, seed=1)
    memory = y if cross else x
    with torch.no_grad():
        result = module(x, memory, memory)[0]
        torch.testing.assert_close(result, plain(U8.fake(x), U8.fake(memory), U8.fake(memory))[0], rtol=0, atol=1e-6)
        assert (result - plain(x, memory, memory)[0]).abs().max() > 1e-4


def test_gradients_are_not_rounded(q):
    layer = nn.Sequential(in_module(q, nn.Linear(6, 8)))
    x = weight(3, 6, seed=1).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(x.grad, (2 * y).detach() @ q.decompress())
    conv = in_module(quantize_int8(weight(8, 4, 3), input_qparams=U8), nn.Conv1d(4, 8, 3))
    x = weight(2, 4, 9).requires_grad_()
    y = conv(x)
    y.sum().backward()
    expected = functional.conv_transpose1d(torch.ones_like(y), conv.weight.decompress())
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_traces_through(q, strict):
    model = nn.Sequential(in_module(q, nn.Linear(6, 8)), nn.ReLU())
    x = weight(3, 6)
    program = torch.export.export(model, (x,), strict=strict)
    assert isinstance(program.state_dict["0.weight"], QTensorInt8)
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(program.run_decompositions().module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_traces_through(q):
    model = nn.Sequential(in_module(q, nn.Linear(6, 8)), nn.ReLU())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = weight(3, 6).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, model(x))
    y.sum().backward()
    grad, x.grad = x.grad, None
    model(x).sum().backward()
    assert torch.equal(x.grad, grad)
    with torch.no_grad():
        model[0].weight = nn.Parameter(quantize_int8(weight(8, 6), input_qparams=I8), requires_grad=False)
        assert torch.equal(compiled(x), model(x))


def test_the_scheme_is_data(q):
    state = q.qscheme.as_plain()
    same = Affine8.from_plain({**state, "scale": q.scale, "zero_point": q.zero_point})
    assert (same.axis, same.quant_min, same.input_qparams) == (0, -127, U8)
