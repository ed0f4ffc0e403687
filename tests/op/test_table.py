"""One row an op: exported through the public API and run in tract against torch, at other sizes where an axis is dynamic."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@dataclass(frozen=True)
class Row:
    name: str
    function: object
    inputs: tuple
    axes: dict = field(default_factory=dict)


def x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape, high=5):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def flags(*shape):
    return x(*shape, seed=2) > 0


B = {0: "B"}
BS = {0: "B", 1: "S"}


def unary(function, name=None, positive=False, scale=3.0):
    values = x(3, 5).abs() + 0.1 if positive else scale * x(3, 5)
    return Row(name or function.__name__, lambda t: function(t), (values,), {"args_0": B})


ROWS = [
    *[unary(f) for f in (torch.abs, torch.ceil, torch.cos, torch.exp, torch.floor, torch.neg, torch.sigmoid, torch.sign, torch.sin)],
    *[unary(f) for f in (torch.square, torch.tanh, torch.erf, torch.round, torch.relu, F.silu, F.gelu, F.hardswish, F.hardsigmoid)],
    *[unary(f) for f in (F.mish, F.relu6, F.selu, F.logsigmoid, F.softplus, F.elu, F.leaky_relu, F.hardtanh, F.celu, F.softsign)],
    *[unary(f, positive=True) for f in (torch.log, torch.reciprocal, torch.rsqrt, torch.sqrt)],
    *[unary(f, scale=0.3) for f in (torch.acos, torch.asin, torch.atanh, torch.tan, torch.expm1, torch.cosh, torch.sinh, torch.asinh)],
    *[unary(f) for f in (torch.atan, torch.trunc)],
    *[unary(f, positive=True) for f in (torch.log10, torch.log1p, torch.log2)],
    unary(lambda t: torch.acosh(t.abs() + 1), "acosh"),
    unary(lambda t: torch.isnan(torch.log(t)), "isnan"),
    unary(lambda t: torch.remainder(t, 1.5), "remainder"),
    unary(lambda t: torch.floor_divide(t, 0.7), "floor_divide"),
    unary(lambda t: torch.div(t, 0.7, rounding_mode="trunc"), "div_trunc"),
    unary(lambda t: torch.fmod(t, 1.5), "fmod"),
    unary(lambda t: torch.clamp(t, t.mean(-1, keepdim=True), torch.tensor(1.0)), "clamp_tensor"),
    unary(lambda t: t.prod(-1), "prod"),
    unary(lambda t: t.flip(0, 1), "flip"),
    unary(lambda t: t.roll(2, -1), "roll"),
    unary(torch.erfc),
    unary(lambda t: F.cosine_similarity(t, t.flip(1)), "cosine_similarity"),
    unary(lambda t: t.cumsum(-1), "cumsum"),
    unary(lambda t: t.cumsum(0), "cumsum_dynamic"),
    unary(lambda t: t.max(-1), "max_dim"),
    unary(lambda t: t.min(1, keepdim=True), "min_dim"),
    unary(lambda t: t.topk(2, -1), "topk"),
    unary(lambda t: t.topk(3, 1, largest=False), "topk_smallest"),
    unary(lambda t: t.sort(-1), "sort"),
    unary(lambda t: t.sort(-1, descending=True), "sort_descending"),
    unary(lambda t: t.tril(-1) + t.triu(1), "tril_triu"),
    unary(lambda t: F.gelu(t, approximate="tanh"), "gelu_tanh"),
    unary(lambda t: F.softplus(t, beta=2.0, threshold=3.0), "softplus_beta"),
    unary(lambda t: F.elu(t, alpha=0.5), "elu_alpha"),
    unary(lambda t: F.softplus(t * 100), "softplus_large"),
    unary(lambda t: t.pow(3), "pow3"),
    unary(lambda t: t**2, "pow2"),
    unary(lambda t: 2.0 - t, "rsub"),
    unary(lambda t: torch.clamp(t, -1, 1), "clamp"),
    unary(lambda t: torch.clamp(t, min=0.5), "clamp_min"),
    unary(lambda t: t / 3, "div_scalar"),
    unary(lambda t: t.to(torch.int64).to(torch.float32), "casts"),
    unary(lambda t: torch.where(t > 0, t, -1.0), "where_scalar"),
    unary(lambda t: t.masked_fill(t < 0, float("-inf")).softmax(-1), "masked_fill_inf"),
    unary(lambda t: t.softmax(0), "softmax0"),
    unary(lambda t: F.log_softmax(t, dim=-1), "log_softmax"),
    unary(lambda t: (t + 1).relu_().mul_(2), "in_place"),
    unary(lambda t: F.normalize(t, dim=1), "normalize"),
    Row("add_broadcast", lambda a, b: a + b, (x(3, 4, 5), x(5)), {"args_0": B}),
    Row("add_alpha", lambda a, b: torch.add(a, b, alpha=0.5), (x(3, 4), x(3, 4)), {"args_0": B, "args_1": B}),
    Row("sub_ranks", lambda a, b: a - b, (x(4), x(3, 4)), {"args_1": B}),
    Row("int_plus_float", lambda a, b: a * b + 1, (ids(3, 4), x(3, 4)), {"args_0": B, "args_1": B}),
    Row("int_div", lambda a: a / 2, (ids(3, 4),), {"args_0": B}),
    Row("maximum", lambda a, b: torch.maximum(a, torch.minimum(b, a)), (x(3, 4), x(4)), {"args_0": B}),
    Row("compare", lambda a, b: (a > b) | (a <= 0.1) & (a != b) ^ (b == a), (x(3, 4), x(3, 4)), {"args_0": B, "args_1": B}),
    Row("compare_int", lambda a: ~(a >= 2), (ids(3, 4),), {"args_0": B}),
    Row("where", lambda c, a, b: torch.where(c, a, b), (flags(3, 4), x(3, 4), x(4)), {"args_0": B, "args_1": B}),
    Row("linear_rank1", lambda a, w: F.linear(a, w), (x(5), x(3, 5))),
    Row("linear_rank4", lambda a, w, b: F.linear(a, w, b), (x(2, 3, 4, 5), x(6, 5), x(6)), {"args_0": {0: "B", 2: "S"}}),
    Row("addmm", lambda b, a, w: torch.addmm(b, a, w, beta=0.5, alpha=2.0), (x(6), x(3, 5), x(5, 6)), {"args_1": B}),
    Row("bmm", lambda a, b: torch.bmm(a, b), (x(2, 3, 4), x(2, 4, 5)), {"args_0": {0: "B", 1: "S"}, "args_1": B}),
    Row("matmul_vector", lambda a, b: a @ b, (x(3, 4), x(4)), {"args_0": B}),
    Row("matmul_broadcast", lambda a, b: a @ b, (x(2, 3, 4, 5), x(5, 6)), {"args_0": {0: "B", 2: "S"}}),
    Row("einsum", lambda a, b: torch.einsum("bsd,btd->bst", a, b), (x(2, 3, 4), x(2, 5, 4)), {"args_0": BS, "args_1": B}),
    Row("mean", lambda a: a.mean((1, 2)), (x(2, 3, 4),), {"args_0": BS}),
    Row("mean_all", lambda a: a.mean(), (x(2, 3, 4),), {"args_0": B}),
    Row("sum_keepdim", lambda a: a.sum(-1, keepdim=True), (x(2, 3, 4),), {"args_0": BS}),
    Row("sum_int", lambda a: a.sum(), (ids(3, 4),), {"args_0": B}),
    Row("amax_amin", lambda a: a.amax(1) - a.amin(1), (x(2, 3, 4),), {"args_0": BS}),
    Row("argmax", lambda a: a.argmax(-1), (x(3, 7),), {"args_0": B}),
    Row("any_all", lambda a: (a > 0).any(1) & (a > -5).all(1), (x(3, 7),), {"args_0": B}),
    Row("var", lambda a: a.var(-1), (x(3, 7),), {"args_0": B}),
    Row("std_unbiased_off", lambda a: a.std(-1, unbiased=False), (x(3, 7),), {"args_0": B}),
    Row("view", lambda a: a.view(a.shape[0], a.shape[1], 2, 4).transpose(1, 2), (x(2, 3, 8),), {"args_0": BS}),
    Row("flatten", lambda a: a.flatten(1), (x(2, 3, 4),), {"args_0": B}),
    Row("flatten_dynamic", lambda a: a.flatten(0, 1), (x(2, 3, 4),), {"args_0": BS}),
    Row("unflatten", lambda a: a.unflatten(-1, (2, 4)), (x(2, 8),), {"args_0": B}),
    Row("permute", lambda a: a.permute(2, 0, 1), (x(2, 3, 4),), {"args_0": BS}),
    Row("t", lambda a: a.t(), (x(2, 3),), {"args_0": B}),
    Row("squeeze", lambda a: a.squeeze(1).unsqueeze(-1), (x(2, 1, 4),), {"args_0": B}),
    Row("expand", lambda a: a.expand(-1, 3, -1), (x(2, 1, 4),), {"args_0": B}),
    Row("repeat", lambda a: a.repeat(2, 1, 3), (x(2, 4),), {"args_0": B}),
    Row("cat", lambda a, b: torch.cat([a, b, a], 1), (x(2, 3), x(2, 4)), {"args_0": BS, "args_1": B}),
    Row("stack", lambda a, b: torch.stack([a, b], -1), (x(2, 3), x(2, 3)), {"args_0": B, "args_1": B}),
    Row("slice", lambda a: a[:, 1:-1, ::2], (x(2, 5, 6),), {"args_0": B}),
    Row("slice_dynamic", lambda a: a[:, -2:] + a[:, :2], (x(2, 5),), {"args_0": B}),
    Row("slice_open", lambda a: a[:, 1:], (x(2, 5),), {"args_0": {1: "S"}}),
    Row("select", lambda a: a[:, 0] + a[:, -1], (x(2, 5, 3),), {"args_0": B}),
    Row("split", lambda a: a.split([2, 3], 1), (x(2, 5),), {"args_0": B}),
    Row("chunk", lambda a: a.chunk(3, -1), (x(2, 7),), {"args_0": B}),
    Row("unbind", lambda a: a.unbind(1), (x(2, 3, 4),), {"args_0": B}),
    Row("glu", lambda a: F.glu(a, -1), (x(2, 8),), {"args_0": B}),
    Row("pad", lambda a: F.pad(a, (1, 2, 0, 3), value=0.5), (x(2, 3, 4),), {"args_0": B}),
    Row("pad_reflect", lambda a: F.pad(a, (2, 1), mode="reflect"), (x(2, 3, 6),), {"args_0": B}),
    Row("pad_replicate", lambda a: F.pad(a, (2, 1), mode="replicate"), (x(2, 3, 6),), {"args_0": B}),
    Row("embedding", lambda i, w: F.embedding(i, w), (ids(2, 3), x(5, 4)), {"args_0": BS}),
    Row("gather", lambda a, i: a.gather(1, i), (x(3, 5), ids(3, 2)), {"args_0": B, "args_1": B}),
    Row("index_select", lambda a, i: a.index_select(1, i), (x(3, 5), ids(4)), {"args_0": B, "args_1": {0: "S"}}),
    Row("index_negative", lambda a, i: a[i - 3], (x(5, 4), ids(3)), {"args_1": B}),
    Row("index_pair", lambda a, i, j: a[i, j], (x(5, 5, 2), ids(3), ids(2, 3)), {"args_1": B, "args_2": {1: "B"}}),
    Row("arange", lambda a: a + torch.arange(a.shape[1]), (x(2, 4),), {"args_0": BS}),
    Row("arange_step", lambda a: a + torch.arange(1, 9, 2), (x(2, 4),), {"args_0": B}),
    Row("add_size", lambda a, i: (a * a.shape[1] + i.shape[0], i + i.shape[0] * 2), (x(2, 4), ids(2)), {"args_0": BS, "args_1": B}),
    Row("arange_from", lambda a: a + torch.arange(2, a.shape[1] + 2), (x(2, 4),), {"args_0": BS}),
    Row("causal_by_hand", lambda a: a.masked_fill(torch.arange(a.shape[0])[:, None] < torch.arange(a.shape[1]), -1.0), (x(3, 4),), {"args_0": BS}),
    Row("full", lambda a: a + torch.full((a.shape[0], 1), 2.5) + torch.ones_like(a) + torch.zeros(4), (x(2, 4),), {"args_0": B}),
    Row("bool_of_int", lambda a: a.to(torch.bool), (ids(3, 4, high=2),), {"args_0": B}),
    Row("prelu", lambda a, w: F.prelu(a, w), (x(2, 3, 4), x(3)), {"args_0": B}),
    Row("layer_norm", lambda a, w, b: F.layer_norm(a, (3, 4), w, b), (x(2, 3, 4), x(3, 4), x(3, 4)), {"args_0": B}),
    Row("layer_norm_plain", lambda a: F.layer_norm(a, (4,), eps=1e-12), (x(2, 3, 4),), {"args_0": BS}),
    Row("rms_norm", lambda a, w: F.rms_norm(a, (4,), w, eps=1e-6), (x(2, 3, 4), x(4)), {"args_0": BS}),
    Row("instance_norm", lambda a, w, b: F.instance_norm(a, weight=w, bias=b), (x(2, 3, 5, 4), x(3), x(3)), {"args_0": {0: "B", 2: "H"}}),
    Row("adaptive_max_pool2d", lambda a: F.adaptive_max_pool2d(a, 1), (x(2, 3, 5, 4),), {"args_0": {0: "B", 2: "H"}}),
    Row("group_norm", lambda a, w, b: F.group_norm(a, 2, w, b), (x(2, 4, 5), x(4), x(4)), {"args_0": B}),
    Row("group_norm_dynamic", lambda a: F.group_norm(a, 2), (x(2, 4, 5, 6),), {"args_0": {0: "B", 2: "H"}}),
    Row("sdpa", F.scaled_dot_product_attention, (x(2, 3, 4, 8), x(2, 3, 5, 8), x(2, 3, 5, 8)), {"args_0": {0: "B", 2: "S"}, "args_1": B, "args_2": B}),
    Row("sdpa_bool_mask", lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m), (x(2, 3, 4, 8), flags(4, 4)), {"args_0": B}),
    Row("sdpa_float_mask", lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m), (x(2, 3, 4, 8), x(2, 1, 4, 4)), {"args_0": B, "args_1": B}),
    Row("sdpa_causal", lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3), (x(2, 3, 4, 8),), {"args_0": {0: "B", 2: "S"}}),
    Row("sdpa_gqa", lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), (x(2, 6, 4, 8), x(2, 2, 4, 8)), {"args_0": {0: "B", 2: "S"}, "args_1": {0: "B", 2: "S"}}),
    Row("conv1d", lambda a, w, b: F.conv1d(a, w, b, stride=2, padding=1), (x(2, 4, 9), x(6, 4, 3), x(6)), {"args_0": {0: "B", 2: "T"}}),
    Row("conv1d_same", lambda a, w: F.conv1d(a, w, padding="same"), (x(2, 4, 9), x(6, 4, 5)), {"args_0": {0: "B", 2: "T"}}),
    Row("conv1d_unbatched", lambda a, w: F.conv1d(a, w), (x(4, 9), x(6, 4, 3)), {"args_0": {1: "T"}}),
    Row("conv2d", lambda a, w, b: F.conv2d(a, w, b, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (x(2, 3, 9, 8), x(5, 3, 3, 2), x(5)), {"args_0": {0: "B", 2: "H", 3: "W"}}),
    Row("conv2d_groups", lambda a, w: F.conv2d(a, w, groups=2), (x(2, 4, 6, 6), x(6, 2, 3, 3)), {"args_0": B}),
    Row("conv2d_depthwise", lambda a, w: F.conv2d(a, w, groups=4, padding="same"), (x(2, 4, 6, 6), x(4, 1, 3, 3)), {"args_0": {0: "B", 2: "H"}}),
    Row("conv3d", lambda a, w: F.conv3d(a, w, padding=1), (x(2, 2, 4, 5, 6), x(3, 2, 3, 3, 3)), {"args_0": B}),
    Row("upsample_nearest1d", lambda a: F.interpolate(a, scale_factor=3), (x(2, 3, 5),), {"args_0": {0: "B", 2: "T"}}),
    Row("upsample_nearest2d", lambda a: F.interpolate(a, scale_factor=(2, 3)), (x(2, 3, 5, 4),), {"args_0": {0: "B", 2: "H"}}),
    Row("upsample_nearest2d_size", lambda a: F.interpolate(a, size=(7, 10)), (x(2, 3, 5, 4),), {"args_0": B}),
    Row("upsample_bilinear2d", lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"), (x(2, 3, 5, 4),), {"args_0": {0: "B", 2: "H"}}),
    Row("upsample_bilinear2d_corners", lambda a: F.interpolate(a, size=(9, 7), mode="bilinear", align_corners=True), (x(2, 3, 5, 4),), {"args_0": B}),
    Row("upsample_linear1d_down", lambda a: F.interpolate(a, size=3, mode="linear"), (x(2, 3, 8),), {"args_0": B}),
    Row("conv_transpose1d", lambda a, w, b: F.conv_transpose1d(a, w, b, stride=2, padding=1), (x(2, 4, 9), x(4, 6, 3), x(6)), {"args_0": {0: "B", 2: "T"}}),
    Row("conv_transpose2d", lambda a, w: F.conv_transpose2d(a, w, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (x(2, 4, 5, 6), x(4, 3, 3, 3)), {"args_0": {0: "B", 2: "H"}}),
    Row("conv_transpose2d_groups", lambda a, w: F.conv_transpose2d(a, w, groups=2), (x(2, 4, 5, 6), x(4, 3, 3, 3)), {"args_0": B}),
    Row("conv_transpose1d_output_padding", lambda a, w: F.conv_transpose1d(a, w, stride=2, padding=1, output_padding=1), (x(2, 4, 9), x(4, 6, 3)), {"args_0": B}),
    Row("max_pool1d", lambda a: F.max_pool1d(a, 3, 2, padding=1), (x(2, 4, 9),), {"args_0": {0: "B", 2: "T"}}),
    Row("max_pool2d", lambda a: F.max_pool2d(-a.abs(), (3, 2), (2, 2), (1, 0), (1, 2)), (x(2, 3, 9, 8),), {"args_0": {0: "B", 2: "H"}}),
    Row("avg_pool1d", lambda a: F.avg_pool1d(a, 3, 2), (x(2, 4, 9),), {"args_0": {0: "B", 2: "T"}}),
    Row("avg_pool2d_counted", lambda a: F.avg_pool2d(a, 3, 2, padding=1), (x(2, 3, 8, 9),), {"args_0": {0: "B", 2: "H"}}),
    Row("avg_pool2d_not_counted", lambda a: F.avg_pool2d(a, 3, 2, padding=1, count_include_pad=False), (x(2, 3, 8, 9),), {"args_0": {0: "B", 2: "H"}}),
    Row("adaptive_avg_pool2d", lambda a: F.adaptive_avg_pool2d(a, 1), (x(2, 3, 8, 9),), {"args_0": {0: "B", 2: "H"}}),
    Row("adaptive_avg_pool2d_window", lambda a: F.adaptive_avg_pool2d(a, (2, 3)), (x(2, 3, 8, 9),), {"args_0": B}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_op_gives_the_same_in_tract(row, tmp_path):
    target = TractNNEF.latest(dynamic_axes=row.axes)
    export_model_to_nnef(Call(row.function), row.inputs, tmp_path / "op.nnef", target, compression_level=None)


@pytest.mark.parametrize(
    ("module", "shape", "axes"),
    [
        (nn.BatchNorm1d(4), (3, 4, 5), {0: "B", 2: "T"}),
        (nn.BatchNorm1d(4), (3, 4), {0: "B"}),
        (nn.BatchNorm2d(4, affine=False), (2, 4, 5, 6), {0: "B", 2: "H"}),
        (nn.MultiheadAttention(16, 4, batch_first=True), (2, 5, 16), {0: "B", 1: "S"}),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16), {0: "B", 1: "S"}),
        (
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu"),
            (2, 5, 16),
            {0: "B"},
        ),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Dropout2d(), nn.MaxPool2d(2)),
            (2, 3, 9, 9),
            {0: "B"},
        ),
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), (3, 4), {0: "B"}),
    ],
    ids=["bn1d", "bn1d_rank2", "bn2d", "mha", "encoder", "encoder_norm_first", "conv_stack", "mlp"],
)
def test_module_gives_the_same_in_tract(module, shape, axes, tmp_path):
    torch.manual_seed(0)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    forward = Call(lambda t: module(t, t, t)[0]) if isinstance(module, nn.MultiheadAttention) else module
    if isinstance(module, nn.MultiheadAttention):
        forward.inner = module
    name = "args_0" if isinstance(forward, Call) else next(iter(module.forward.__annotations__), "input")
    inputs = {"Call": "args_0", "TransformerEncoderLayer": "src"}
    name = inputs.get(type(forward).__name__, "input")
    target = TractNNEF.latest(dynamic_axes={name: axes})
    export_model_to_nnef(forward, x(*shape), tmp_path / "module.nnef.tar", target)
