"""Convolutions: NCHW with OIHW filters, as NNEF has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch_to_nnef.graph.ir import Shape
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(
    e: Emitter,
    input: Ref,
    weight: Ref,
    bias: Ref | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Ref:
    """Cross-correlation of input (N, C, *) with weight (O, C / groups, *), plus bias (O)."""
    spatial = weight.rank - 2
    pads = [(p, p) for p in per_axis(padding, spatial)]
    return _conv(e, input, weight, bias, stride, pads, dilation, groups)


@lowers(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def conv_padding(
    e: Emitter,
    input: Ref,
    weight: Ref,
    bias: Ref | None = None,
    stride: Sequence[int] = (1,),
    padding: str = "valid",
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Ref:
    """The same with padding "valid" or "same"; an odd total puts the larger half behind, as torch does."""
    spatial = weight.rank - 2
    kernel = [k for k in weight.shape[2:] if isinstance(k, int)]
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, per_axis(dilation, spatial), strict=True)]
    return _conv(e, input, weight, bias, stride, [(t // 2, t - t // 2) for t in total], dilation, groups)


def _conv(
    e: Emitter,
    x: Ref,
    weight: Ref,
    bias: Ref | None,
    stride: Sequence[int],
    padding: list[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Ref:
    if not x.dtype.is_floating_point:
        raise e.refuse("convolution of integers: tract has it for 8 bits only; cast to float")
    spatial = weight.rank - 2
    batched = x.rank == weight.rank
    x = _batched(e, x, weight)
    if e.is_quantized(weight) and groups == 1 and weight.shape[2:] == (1,) * spatial and not any(map(sum, padding)):
        result = _pointwise(e, x, weight, bias, per_axis(stride, spatial))
        return result if batched else e.squeeze(result, [0])
    biases = [] if bias is None else [e.unsqueeze(bias, [0])]
    result = e.op(
        "conv",
        e.beside(weight, x),
        weight,
        *biases,
        out=e.out.shape if batched else (1, *e.out.shape),
        border="constant",
        padding=padding,
        stride=per_axis(stride, spatial),
        dilation=per_axis(dilation, spatial),
        groups=groups,
    )
    if e.is_quantized(weight):  # or tract multiplies a scale that follows (batch norm) into the blocks, which it cannot
        result = e.apart(result)
    result = e.cast(result, e.out.dtype)
    return result if batched else e.squeeze(result, [0])


def _pointwise(e: Emitter, x: Ref, weight: Ref, bias: Ref | None, stride: Sequence[int]) -> Ref:
    """A packed filter of one element: the einsum tract makes of it, with the filter first (see `linear`)."""
    if any(step > 1 for step in stride):
        # By a pool of one element, whose dynamic sizes tract writes as it does those of a convolution.
        ones, strided = [1] * x.rank, (*x.shape[:2], *e.out.shape[-len(stride) :])
        window: dict[str, Any] = {
            "size": ones,
            "padding": [(0, 0)] * x.rank,
            "stride": [1, 1, *stride],
            "dilation": ones,
        }
        x = e.op("max_pool", x, out=strided, hint="strided", border="ignore", **window)
    x, around = e.beside(weight, x), "abc"[: len(stride)]
    matrix = e.op("squeeze", weight, out=weight.shape[:2], hint="matrix", axes=list(range(2, weight.rank)))
    expr, shape = f"oi,ni{around}->no{around}", (x.shape[0], weight.shape[0], *x.shape[2:])
    if bias is None:
        return e.op("tract_core_einsum", [matrix, x], out=shape, dtype=x.dtype, expr=expr, acc="f32")
    lead = [0, *range(2, weight.rank)]
    return e.op("t2n_linear", matrix, x, bias, out=shape, dtype=x.dtype, expr=expr, lead=lead)


@lowers(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    e: Emitter,
    input: Ref,
    weight: Ref,
    bias: Ref | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Ref:
    """The transpose of a convolution: input (N, C, *), weight (C, O / groups, *), bias (O)."""
    x = _batched(e, input, weight)
    spatial = weight.rank - 2
    result = transposed(
        e,
        x,
        _output_first(e, weight, groups),
        bias,
        out=e.out.shape if x is input else (1, *e.out.shape),
        stride=per_axis(stride, spatial),
        padding=per_axis(padding, spatial),
        more=per_axis(output_padding, spatial),
        dilation=per_axis(dilation, spatial),
        groups=groups,
    )
    return result if x is input else e.squeeze(result, [0])


def transposed(
    e: Emitter,
    x: Ref,
    weight: Ref,
    bias: Ref | None,
    *,
    out: Shape,
    stride: list[int],
    padding: list[int],
    more: list[int],
    dilation: list[int],
    groups: int = 1,
) -> Ref:
    """`x` (N, C, *) scattered by weight (O, C / groups, *), `more` elements longer on each axis than the arguments say."""
    if not x.dtype.is_floating_point:
        raise e.refuse("transposed convolution of integers; cast to float")
    # tract crops the result by the padding and cannot extend it: zeros behind the input do, each as long as a stride.
    zeros = [max(0, -((p - m) // s)) for p, m, s in zip(padding, more, stride, strict=True)]
    if any(zeros):
        shape = (*x.shape[:2], *(d + z for d, z in zip(x.shape[2:], zeros, strict=True)))
        x = e.op("pad", x, out=shape, padding=[(0, 0), (0, 0), *((0, z) for z in zeros)], border="constant", value=0.0)
    behind = [p + z * s - m for p, z, s, m in zip(padding, zeros, stride, more, strict=True)]
    biases = [] if bias is None else [e.unsqueeze(bias, [0])]
    image = e.op(
        "deconv",
        x,
        weight,
        *biases,
        out=out,
        border="constant",
        padding=list(zip(padding, behind, strict=True)),
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    return e.cast(image, x.dtype)


def _output_first(e: Emitter, weight: Ref, groups: int) -> Ref:
    """(C, O / groups, *) -> (O, C / groups, *), the layout tract wants; it does this once, when it loads the constant."""
    channels, outputs, *kernel = weight.shape
    if not isinstance(channels, int) or not isinstance(outputs, int):
        raise e.refuse("the number of channels is dynamic")
    if groups == 1:
        order = [1, 0, *range(2, weight.rank)]
        return e.op("transpose", weight, out=(outputs, channels, *kernel), axes=order)
    grouped = e.reshape(weight, (groups, channels // groups, outputs, *kernel))
    order = [0, 2, 1, *range(3, grouped.rank)]
    turned = e.op("transpose", grouped, out=tuple(grouped.shape[i] for i in order), axes=order)
    return e.reshape(turned, (groups * outputs, channels // groups, *kernel))


def _batched(e: Emitter, x: Ref, weight: Ref) -> Ref:
    return x if x.rank == weight.rank else e.unsqueeze(x, [0])


def per_axis(values: int | Sequence[int], count: int) -> list[int]:
    """ATen's habit of one number for all spatial axes, spelled out."""
    values = [values] if isinstance(values, int) else list(values)
    return values * count if len(values) == 1 else values
