"""8-bit arithmetic of captured graphs: every form that is folded, in tract against torch, at other sizes too."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_to_nnef import TractNNEF, export_model_to_nnef
from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.export import Naming, Steps, plan_export
from torch_to_nnef.graph.macs import arithmetic
from torch_to_nnef.tensor.quant import QParams, QTensorInt8, quantize_int8
from torch_to_nnef.torch_internals import quantized_decomposed
from torch_to_nnef.tract_model import TractModel

Q = QParams.of_range
I8, U8 = torch.int8, torch.uint8


def fake(x, q):
    """Quantize and dequantize, as PT2E and reference modules write it."""
    args = (q.scale, q.zero_point, q.quant_min, q.quant_max, q.dtype)
    return quantized_decomposed.dequantize_per_tensor(quantized_decomposed.quantize_per_tensor(x, *args), *args)


def packed(module, q=None, per_channel=True, **kw):
    """The module with its weight in 8 bits; `q`: how its input is rounded."""
    weight = quantize_int8(module.weight, per_channel=per_channel, input_qparams=q, **kw)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


class Chain(nn.Module):
    """`compute(self, x)` between rounding of the input and of the output, with submodules by name."""

    def __init__(self, compute, q_in, q_out, **modules):
        super().__init__()
        self.compute, self.q_in, self.q_out = compute, q_in, q_out
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        y = self.compute(self, fake(x, self.q_in) if self.q_in else x)
        return fake(y, self.q_out) if self.q_out else y


def plan_of(model, x, axes=None):
    return plan_export(model.eval(), x, TractNNEF(dynamic_axes=axes), Naming(["x"]), (), Steps())


def share_of(plan):
    return arithmetic(plan.graph, plan.inputs.sizes()).integer_share


def run(model, x, tmp_path, *more, axes=None):
    """Export, which verifies; then codes of the output in tract and in torch, at the sample and at `more` inputs."""
    torch.manual_seed(1)
    target = TractNNEF(dynamic_axes=axes)
    path = export_model_to_nnef(model.eval(), x, tmp_path / "m.nnef", target, input_names=["x"], compression_level=None)
    tract = TractModel.load(path)
    with torch.no_grad():
        pairs = [(tract.run(i)["output"], model(i).numpy()) for i in (x, *more)]
    return (path / "graph.nnef").read_text(), pairs


def codes_differ(pairs, scale):
    """(largest difference in codes, share that differs)."""
    difference = np.concatenate([np.abs(np.rint((a - b) / scale)).ravel() for a, b in pairs])
    return difference.max(), (difference > 0).mean()


IN, OUT = Q(-3, 3, I8), Q(-2.5, 4, U8)
BATCH = {"x": {0: "B"}}

CONVOLUTIONS = {
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 9, 8)),
    "strided": (nn.Conv2d(3, 8, 3, stride=2, padding=(1, 0)), (2, 3, 9, 8)),
    "dilated": (nn.Conv2d(3, 8, 3, dilation=2), (2, 3, 9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 9, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 9, 8)),
    "pointwise": (nn.Conv2d(3, 8, 1), (2, 3, 9, 8)),
    "same": (nn.Conv2d(3, 8, (2, 4), padding="same"), (2, 3, 9, 8)),
    "conv1d": (nn.Conv1d(3, 8, 5, padding=2), (2, 3, 17)),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 5, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("q_in", [Q(-3, 3, I8), Q(-1, 3, U8)], ids=["i8", "u8"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, q_in, per_channel, tmp_path):
    module, shape = CONVOLUTIONS[name]
    model = Chain(lambda s, x: s.conv(x), q_in, OUT, conv=packed(_like(module), per_channel=per_channel))
    axes = {"x": {0: "B", 2: "H"}}
    other = torch.randn(1, *shape[1:2], shape[2] + 3, *shape[3:])
    text, pairs = run(model, torch.randn(shape), tmp_path, other, axes=axes)
    most, share = codes_differ(pairs, OUT.scale)
    assert most <= 1, "sums are exact: rounding may fall the other way only where both codes are as near"
    # A bias in whole sums is off by half of one at most, a few thousandths of a code.
    assert share < 0.01
    depthwise = name == "depthwise"
    in_kernel = 'output_dt = "i8"' in text or 'output = "i8"' in text
    assert in_kernel is not (per_channel or depthwise)
    assert (" conv(" in text) is depthwise  # exact integers in f32


def _like(module):
    torch.manual_seed(0)
    module.reset_parameters()
    return module.__class__(**{k: getattr(module, k) for k in _ARGUMENTS}, bias=module.bias is not None)


_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


def test_convolution_without_a_batch_axis(tmp_path):
    model = Chain(lambda s, x: s.conv(x), IN, OUT, conv=packed(nn.Conv2d(3, 8, 3)))
    _, pairs = run(model, torch.randn(3, 9, 8), tmp_path)
    assert codes_differ(pairs, OUT.scale)[0] == 0


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("q_in", [Q(-3, 3, I8), Q(-1, 3, U8)], ids=["i8", "u8"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_linear(rank, q_in, per_channel, tmp_path):
    torch.manual_seed(0)
    model = Chain(lambda s, x: s.fc(x), q_in, OUT, fc=packed(nn.Linear(48, 40), per_channel=per_channel))
    shape = (2, 3, 5, 48)[4 - rank :]
    more = [torch.randn(7, *shape[1:])] if rank > 1 else []
    text, pairs = run(model, torch.randn(shape), tmp_path, *more, axes=BATCH if rank > 1 else None)
    most, share = codes_differ(pairs, OUT.scale)
    assert most <= 1
    assert share < 0.01
    assert "einsum_q" in text or per_channel


@pytest.mark.parametrize(
    "compute",
    [
        lambda w, b, x: x @ w.mT,
        lambda w, b, x: torch.mm(x, w.t()),
        lambda w, b, x: torch.addmm(b, x, w.t()),
        lambda w, b, x: F.linear(x, w, b),
    ],
    ids=["matmul", "mm", "addmm", "linear"],
)
def test_every_way_to_multiply_a_matrix(compute, tmp_path):
    fc = packed(nn.Linear(48, 40), IN)
    model = Chain(lambda s, x: compute(s.fc.weight, s.fc.bias, x), None, OUT, fc=fc)
    x = torch.randn(3, 48)
    assert share_of(plan_of(model, x)) == 1
    assert codes_differ(run(model, x, tmp_path)[1], OUT.scale)[0] <= 1


def test_a_matrix_that_is_not_transposed(tmp_path):
    """`x @ w` of w [K, N], scales along N."""
    model = Chain(lambda s, x: x @ s.fc.weight, IN, OUT, fc=packed(nn.Linear(40, 48, bias=False), axis=1))
    x = torch.randn(3, 48)
    assert share_of(plan_of(model, x)) == 1
    assert codes_differ(run(model, x, tmp_path)[1], OUT.scale)[0] == 0


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
def test_graph_quant_says_what_codes_mean(per_channel, tmp_path):
    """Where a weight has one scale, and nothing but integer products read it."""
    fc, table = packed(nn.Linear(8, 4), IN, per_channel), packed(nn.Embedding(5, 8), per_channel=False)
    run(Chain(lambda s, x: s.fc(s.table(x)), None, None, fc=fc, table=table), torch.tensor([1, 4]), tmp_path)
    quant = tmp_path / "m.nnef" / "graph.quant"
    if per_channel:
        assert not quant.exists()
    else:
        scale = str(np.float32(fc.weight.qscheme.scale.item()))
        parameters = f"zero_point = 0, scale = {scale}, bits = 8, signed = true, symmetric = true"
        assert quant.read_text() == f'"fc_weight": zero_point_linear_quantize({parameters});\n'


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 1.5),
    "clamp": lambda x: x.clamp(max=1.0),
    "relu_pool": lambda x: F.max_pool2d(F.relu(x), 2),
    "flatten": lambda x: F.relu(x).flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1)[:, 1:],
}


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("q_out", [Q(0, 4, U8), Q(-2, 2, I8)], ids=["u8", "i8"])
def test_bounds_and_moves_are_folded_into_rounding(name, q_out, per_channel, tmp_path):
    torch.manual_seed(0)
    conv = packed(nn.Conv2d(3, 8, 3, padding=1), per_channel=per_channel)
    model = Chain(lambda s, x: ACTIVATIONS[name](s.conv(x)), IN, q_out, conv=conv)
    text, pairs = run(model, torch.randn(2, 3, 8, 8), tmp_path, torch.randn(5, 3, 8, 8), axes=BATCH)
    most, share = codes_differ(pairs, q_out.scale)
    assert most <= 1
    assert share < 0.01
    assert "relu(" not in text
    body = text[text.index("graph ") :]
    assert body.count("dequantize") == 1  # that of the output


@pytest.mark.parametrize("gamma", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
def test_batch_norm_becomes_a_scale(gamma, per_channel, tmp_path):
    torch.manual_seed(0)
    conv, norm = packed(nn.Conv2d(3, 8, 3), per_channel=per_channel), nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5).mul_(gamma)
        norm.bias.normal_()
    model = Chain(lambda s, x: F.relu(s.norm(s.conv(x))), IN, OUT, conv=conv, norm=norm)
    text, pairs = run(model, torch.randn(2, 3, 8, 8), tmp_path)
    most, share = codes_differ(pairs, OUT.scale)
    assert most <= 1
    assert share < 0.01
    assert "batch_normalization" not in text


@pytest.mark.parametrize("name", ["sigmoid", "hardswish", "leaky_relu", "gelu", "tanh", "silu", "elu"])
def test_a_function_of_codes_is_a_table(name, tmp_path):
    function = getattr(F, name, None) or getattr(torch, name)
    model = Chain(lambda s, x: function(x), Q(-4, 3, U8), Q(-0.5, 2, I8))
    x = torch.linspace(-5, 4, 300).reshape(2, 150)
    text, pairs = run(model, x, tmp_path)
    assert codes_differ(pairs, model.q_out.scale) == (0, 0)
    assert "t2n_look_up(" in text


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + x.flip(1),
        lambda x: x * x,
        lambda x: F.relu(x + 0.5 * x),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.softmax(x, 1),
        lambda x: x.mean((2, 3)),
    ],
    ids=["add", "mul", "add_relu", "avg_pool", "adaptive", "softmax", "mean"],
)
def test_what_has_no_integer_form_is_computed_in_floats(compute, tmp_path):
    model = Chain(lambda s, x: compute(x), IN, OUT)
    _, pairs = run(model, torch.randn(2, 4, 6, 6), tmp_path)
    most, share = codes_differ(pairs, OUT.scale)
    assert most <= 1
    assert share < 0.001


@pytest.mark.parametrize("second", [IN, Q(-1, 2, U8)], ids=["same", "other"])
def test_cat_of_codes(second, tmp_path):
    model = Chain(lambda s, x: torch.cat([x, fake(x * 0.37, second)], 1), IN, IN)
    text, pairs = run(model, torch.randn(2, 4, 6), tmp_path)
    assert codes_differ(pairs, IN.scale) == (0, 0)
    assert ("t2n_look_up(" in text) is (second is not IN)


@pytest.mark.parametrize("axes", [None, BATCH], ids=["2 images", "any number"])
def test_channels_are_repeated_for_each_image(axes, tmp_path):
    """Scale and bias of a channel, since tract is slow where these repeat along the first axis and along the last."""
    model = Chain(lambda s, x: s.conv(x), IN, OUT, conv=packed(nn.Conv2d(3, 8, 3)))
    text, pairs = run(model, torch.randn(2, 3, 9, 8), tmp_path, axes=axes)
    assert text.count("= tract_core_gather(") == 2
    assert codes_differ(pairs, OUT.scale)[0] <= 1
    alone, _ = run(model, torch.randn(1, 3, 9, 8), tmp_path / "alone")
    assert "tract_core_gather" not in alone


def test_rounding_again_to_the_same_codes_is_nothing(tmp_path):
    model = Chain(lambda s, x: F.max_pool2d(fake(F.relu(x), IN), 2), IN, IN)
    text, _ = run(model, torch.randn(2, 4, 6, 6), tmp_path)
    assert text.count("= t2n_quantize") == text.count("= t2n_quantize_within(") == 1
    assert text.count("= t2n_dequantize(") == 1


def test_a_result_read_twice_is_multiplied_once(tmp_path):
    """Its sums are rescaled for the sum in floats, and rounded for the next product."""
    torch.manual_seed(0)
    first, second = (packed(nn.Conv2d(4, 4, 3, padding=1), IN, per_channel=False) for _ in range(2))

    def compute(s, x):
        y = s.first(x)
        return y + s.second(y)

    model = Chain(compute, None, OUT, first=first, second=second)
    text, pairs = run(model, torch.randn(2, 4, 6, 6), tmp_path)
    assert text.count("= tract_core_qconv(") == 2
    assert codes_differ(pairs, OUT.scale)[0] <= 1


def test_shared_weights_are_stored_once(tmp_path):
    first, second = packed(nn.Linear(32, 32), IN), nn.Linear(32, 32)
    second.weight = first.weight
    model = Chain(lambda s, x: s.second(F.relu(s.first(x))), None, OUT, first=first, second=second)
    text, _ = run(model, torch.randn(2, 32), tmp_path)
    assert text.count("shape = [32, 32]") == 1


@pytest.mark.parametrize("per_channel", [True, False])
def test_embedding_stays_in_8_bits(per_channel, tmp_path):
    table = packed(nn.Embedding(20, 8), per_channel=per_channel)
    model = Chain(lambda s, x: s.table(x), None, None, table=table)
    x = torch.randint(20, (2, 5))
    _, pairs = run(model, x, tmp_path, torch.randint(20, (2, 9)), axes={"x": {1: "S"}})
    for tract, reference in pairs:
        np.testing.assert_array_equal(tract, reference)
    assert TractModel.load(tmp_path / "m.nnef").weight_bytes < 20 * 8 + 20 * 4 + 64


def test_unsigned_rows_with_zero_points(tmp_path):
    codes = torch.randint(0, 256, (20, 8), dtype=torch.uint8)
    scale, zero_point = torch.rand(20) + 0.1, torch.randint(0, 256, (20,)).float()
    table = nn.Embedding(20, 8)
    table.weight = nn.Parameter(QTensorInt8.from_codes(codes, scale, zero_point, 0), requires_grad=False)
    model = Chain(lambda s, x: s.table(x), None, None, table=table)
    _, [(tract, reference)] = run(model, torch.randint(20, (2, 5)), tmp_path)
    np.testing.assert_array_equal(tract, reference)


def test_weights_alone_in_8_bits_are_dequantized(tmp_path):
    model = Chain(lambda s, x: s.fc(x), None, None, fc=packed(nn.Linear(48, 40)))
    x = torch.randn(3, 48)
    plan = plan_of(model, x)
    found = arithmetic(plan.graph, {})
    assert [(p.operator, p.module_path, p.macs) for p in found.products] == [("linear", "fc", 3 * 48 * 40)]
    assert found.integer_share == 0
    assert found.products[0].reason == "its weight is in 8 bits, its input is not"
    run(model, x, tmp_path)


def test_a_weight_with_a_zero_point_is_computed_in_floats(tmp_path):
    codes = torch.randint(0, 256, (40, 48), dtype=torch.uint8)
    fc = nn.Linear(48, 40)
    weight = QTensorInt8.from_codes(codes, torch.tensor([0.01]), torch.tensor([100]), None, IN)
    fc.weight = nn.Parameter(weight, requires_grad=False)
    model = Chain(lambda s, x: s.fc(x), None, None, fc=fc)
    run(model, torch.randn(3, 48), tmp_path)


def test_transposed_convolutions_are_computed_in_floats(tmp_path):
    model = Chain(lambda s, x: s.up(x), IN, OUT, up=packed(nn.ConvTranspose2d(3, 4, 2, stride=2), axis=1))
    x = torch.randn(2, 3, 5, 5)
    assert arithmetic(plan_of(model, x).graph, {}).products[0].reason == "tract has no 8-bit kernel for it"
    assert codes_differ(run(model, x, tmp_path)[1], OUT.scale)[0] <= 1


def test_a_scale_known_only_at_run_time_is_refused(tmp_path):
    class Dynamic(nn.Module):
        def forward(self, x):
            scale, zero = quantized_decomposed.choose_qparams(x, -128, 127, 1e-5, I8)
            codes = quantized_decomposed.quantize_per_tensor(x, scale, zero, -128, 127, I8)
            return quantized_decomposed.dequantize_per_tensor(codes, scale, zero, -128, 127, I8)

    with pytest.raises(T2NErrorNotImplemented, match="quantize statically"):
        run(Dynamic(), torch.randn(2, 8), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_codes_are_found(tmp_path, monkeypatch):
    """Slack for rounding is no licence: a wrong zero point fails the check, and says at which codes."""
    from torch_to_nnef.exceptions import T2NErrorIOPytorchTractNotISO
    from torch_to_nnef.op import integer

    right = integer._zero_point_sums
    monkeypatch.setattr(integer, "_zero_point_sums", lambda e, weight, zero_point: right(e, weight, zero_point + 20))
    torch.manual_seed(0)
    fc = packed(nn.Linear(48, 40), per_channel=False)
    with torch.no_grad():
        fc.weight.u8_blob.copy_(torch.randint(60, 120, (48 * 40,), dtype=torch.uint8))
    model = Chain(lambda s, x: s.fc(x), Q(-1, 3, U8), Q(-8, 30, U8), fc=fc)
    with pytest.raises(T2NErrorIOPytorchTractNotISO):
        run(model, torch.randn(3, 48), tmp_path)
