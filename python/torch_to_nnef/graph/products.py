"""Products on codes: linears, convolutions and look-ups of 8-bit weights, whose integer sums one scale a channel brings back to floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.graph.codes import as_codes
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.rewriting import Rewriting
from torch_to_nnef.graph.uses import is_transpose
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.torch_internals import OpOverload

aten = torch.ops.aten

# A product -> where its weight and its other factor are.
FACTORS: Mapping[OpOverload, tuple[int, int]] = {
    aten.linear.default: (1, 0),
    aten.mm.default: (1, 0),
    aten.matmul.default: (1, 0),
    aten.addmm.default: (2, 1),
    aten.conv1d.default: (1, 0),
    aten.conv1d.padding: (1, 0),
    aten.conv2d.default: (1, 0),
    aten.conv2d.padding: (1, 0),
    aten.conv3d.default: (1, 0),
    aten.conv3d.padding: (1, 0),
}
CONVOLUTIONS = frozenset(op for op in FACTORS if op._schema.name.startswith("aten::conv"))
NORMALIZATIONS: Mapping[OpOverload, int] = {
    aten.batch_norm.default: 7,
    aten._native_batch_norm_legit_no_training.default: 6,
}  # where epsilon is
# How close to 1 the slope of a norm is that does nothing but shift.
_ONE = 1e-6
_SCALE, _BIAS = ".sums_scale", ".sums_bias"


def multiplied(graph: Graph) -> Graph:
    """Products of dequantized codes with dequantized weights as integer products, and the scale of their sums."""
    rewriting = Rewriting(graph)
    for node in graph.nodes:
        if not _embedded(rewriting, node) and not _product(rewriting, node) and not _normalized(rewriting, node):
            rewriting.keep(node)
    return rewriting.done()


@dataclass(frozen=True)
class _Factor:
    """A weight of the graph in 8 bits, with its scale along the axis of the output's channels."""

    codes: Value
    scale: torch.Tensor
    fqn: str


def _factor(rewriting: Rewriting, value: Value, matrix_is_transposed: bool = False) -> _Factor | None:
    """Codes [N, K] or (O, I, *) of a weight that is dequantized, and maybe turned; None if tract cannot multiply them."""
    turned = matrix_is_transposed
    while (maker := rewriting.maker(value)) is not None and is_transpose(maker):
        value, turned = maker.args[0], not turned
    if maker is None or maker.target is not ops.dequantize_weight:
        return None
    codes, scale, zero_point, axis = maker.args
    scales, fqn = rewriting.tensor(scale), rewriting.weights[codes.name]
    if scales is None or zero_point is not None or (scales.numel() > 1 and axis != int(turned)):
        return None
    if turned:
        codes = rewriting.store(rewriting.tensors[fqn].mT.contiguous(), f"{fqn}.transposed")
    return _Factor(codes, scales, fqn)


def _product(rewriting: Rewriting, node: Node) -> bool:
    """A linear or a convolution of codes: integer sums, brought back to floats."""
    if node.target not in FACTORS:
        return False
    weight, x = (rewriting.current(node.args[i]) for i in FACTORS[node.target])
    convolution, linear = node.target in CONVOLUTIONS, node.target is aten.linear.default
    factor = _factor(rewriting, weight, not convolution and not linear)
    bias = _bias(rewriting, node)
    if factor is None or bias is _ELSEWHERE or len(weight.shape) < 2 or (not convolution and len(weight.shape) != 2):
        return False
    if not convolution and _with_chosen_scale(rewriting, node, factor, x, bias):
        return True
    if (codes := as_codes(rewriting, x, node)) is None:
        return False
    out = node.outputs[0]
    batched = not convolution or len(x.shape) == len(weight.shape)
    value = codes.value
    if not batched:
        value = rewriting.add(aten.unsqueeze.default, (value, 0), node, (1, *value.shape), torch.int8)
    shape = out.shape if batched else (1, *out.shape)
    window = _window(node, weight) if convolution else ()
    axis = 1 if convolution else len(shape) - 1
    if convolution and not _is_pointwise(weight, *window):
        target, args = ops.convolve, (value, factor.codes, codes.zero_point, *window)
    else:
        target, args = ops.linear, (value, factor.codes, codes.zero_point, axis)
    sums = rewriting.add(target, args, node, shape, torch.int32)
    # In this shape, since tract takes eight times as long to multiply with what is unsqueezed.
    broadcast = [-1 if i == axis else 1 for i in range(len(shape))]
    scale = (factor.scale.to(torch.float64) * codes.scale).to(torch.float32)
    scales = rewriting.store(scale.reshape(broadcast), f"{factor.fqn}{_SCALE}")
    rescaled = (sums, scales, _stored_bias(rewriting, bias, broadcast, factor.fqn))
    if batched:
        rewriting.add(ops.rescale, rescaled, node, shape, out.dtype, out.name)
    else:
        result = rewriting.add(ops.rescale, rescaled, node, shape, out.dtype)
        rewriting.add(aten.squeeze.dim, (result, 0), node, out.shape, out.dtype, out.name)
    return True


def _stored_bias(rewriting: Rewriting, bias: Value | None, shape: Sequence[int], fqn: str) -> Value | None:
    if bias is None:
        return None
    added = loaded(rewriting.tensors[rewriting.weights[bias.name]]).detach().to(torch.float32)
    return rewriting.store(added.reshape(shape), f"{fqn}{_BIAS}")


def _with_chosen_scale(rewriting: Rewriting, node: Node, factor: _Factor, x: Value, bias: Value | None) -> bool:
    """A linear of codes whose scale and zero point are computed of their own range: dynamic quantization."""
    maker, out = rewriting.maker(x), node.outputs[0]
    if maker is None or maker.target is not ops.dequantize_chosen:
        return False
    values, scale, zero_point, low = maker.args
    shift, axis = low + 128, len(x.shape) - 1
    codes = rewriting.add(ops.quantize, (values, 1.0, -shift, *ops.CODES), node, x.shape, torch.int8)
    sums = rewriting.add(ops.linear, (codes, factor.codes, 0, axis), node, out.shape, torch.int32)
    broadcast = [1] * axis + [-1]
    totals = rewriting.tensors[rewriting.weights[factor.codes.name]].to(torch.int32).sum(1).to(torch.float32)
    stored = (
        rewriting.store(factor.scale.reshape(broadcast), f"{factor.fqn}{_SCALE}"),
        rewriting.store(totals.reshape(broadcast), f"{factor.fqn}.totals"),
        _stored_bias(rewriting, bias, broadcast, factor.fqn),
    )
    rewriting.add(ops.rescale_chosen, (sums, scale, zero_point, *stored, shift), node, out.shape, out.dtype, out.name)
    return True


_ELSEWHERE = object()


def _bias(rewriting: Rewriting, node: Node) -> Any:
    """The bias of a product, one number a channel; `_ELSEWHERE` if it is something else."""
    if node.target in (aten.mm.default, aten.matmul.default):
        return None
    if node.target is aten.addmm.default:
        weighted = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")) or node.args[3:]
        bias = _ELSEWHERE if weighted else node.args[0]
    else:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if isinstance(bias, Value):
        bias = rewriting.current(bias)
        return bias if len(bias.shape) == 1 and rewriting.tensor(bias) is not None else _ELSEWHERE
    return bias


def _is_pointwise(
    weight: Value,
    stride: Sequence[int],
    before: Sequence[int],
    behind: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether a convolution is a linear of each pixel."""
    return groups == 1 and {*weight.shape[2:], *stride} == {1} and not any((*before, *behind))


def _window(node: Node, weight: Value) -> tuple[Any, ...]:
    """Stride, padding before and behind, dilation and groups, one number an axis."""
    spatial = len(weight.shape) - 2
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args[3:], strict=False)) | {n: v for n, v in node.kwargs.items() if n in names}
    stride, dilation = (_per_axis(given.get(name, 1), spatial) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        sizes = zip(weight.shape[2:], dilation, strict=True)
        total = [d * (int(k) - 1) if padding == "same" else 0 for k, d in sizes]
        before, behind = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = behind = _per_axis(padding, spatial)
    return stride, before, behind, dilation, given.get("groups", 1)


def _per_axis(numbers: int | Sequence[int], count: int) -> list[int]:
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return numbers * count if len(numbers) == 1 else numbers


def _normalized(rewriting: Rewriting, node: Node) -> bool:
    """Batch norm of rescaled sums: another scale and bias for each channel."""
    if node.target not in NORMALIZATIONS:
        return False
    maker = rewriting.maker(rewriting.current(node.args[0]))
    if maker is None or maker.target is not ops.rescale:
        return False
    sums, scale, bias = maker.args
    broadcast = [-1 if i == 1 else 1 for i in range(len(sums.shape))]
    if len(sums.shape) < 3:
        return False
    gamma, beta, mean, variance = node.args[1:5]
    if any(v is not None and rewriting.tensor(v) is None for v in (bias, gamma, beta)) or mean is None:
        return False

    def values_of(value: Value | None, default: float) -> torch.Tensor:
        tensor = None if value is None else rewriting.tensor(value)
        given = torch.tensor([default]) if tensor is None else loaded(tensor).detach()
        return given.to(torch.float64).reshape(broadcast)

    slope = torch.rsqrt(values_of(variance, 1) + node.args[NORMALIZATIONS[node.target]]) * values_of(gamma, 1)
    offset = (values_of(bias, 0) - values_of(mean, 0)) * slope + values_of(beta, 0)
    out, name = node.outputs[0], rewriting.weights[scale.name].removesuffix(_SCALE)
    if bool(((slope - 1).abs() < _ONE).all()):  # folded into the weight before
        slope = torch.ones([1] * len(sums.shape), dtype=torch.float64)
    parts = (values_of(scale, 1) * slope, f"{name}.normalized{_SCALE}"), (offset, f"{name}.normalized{_BIAS}")
    folded = [rewriting.store(tensor.to(torch.float32), fqn) for tensor, fqn in parts]
    rewriting.add(ops.rescale, (sums, *folded), node, out.shape, out.dtype, out.name)
    return True


def _embedded(rewriting: Rewriting, node: Node) -> bool:
    """Rows of an 8-bit table: looked up as codes."""
    if node.target is not aten.embedding.default:
        return False
    maker, out = rewriting.maker(rewriting.current(node.args[0])), node.outputs[0]
    if maker is None or maker.target is not ops.dequantize_weight:
        return False
    codes, scale, zero_point, axis = maker.args
    if axis != 0:
        return False
    rewriting.add(ops.embed, (node.args[1], codes, scale, zero_point), node, out.shape, out.dtype, out.name)
    return True
