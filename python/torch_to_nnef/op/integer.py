"""8-bit arithmetic. Codes are plain i8 tensors and sums i32: tract's typed quantized tensors are read wrongly by some of its operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.op import fragments_integer
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.product import AXES
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

_LOW, _HIGH = ops.CODES


@lowers(ops.quantize)
def quantize(e: Emitter, x: Ref, scale: float, zero_point: int, low: int, high: int) -> Ref:
    """Codes: clamp(round_half_even(x / scale) + zero_point, low, high). tract's cast from f32 to i8 saturates."""
    inverse, x = 1.0 / scale, e.cast(x, torch.float32)
    # Integers of this size are exact in f32: the zero point is added where the rounding constant is taken off.
    rounding = fragments_integer.ROUNDING - zero_point
    if (low, high) == ops.CODES:
        return e.op("t2n_quantize", x, dtype=torch.int8, inverse=inverse, rounding=rounding)
    return e.op(
        "t2n_quantize_within", x, dtype=torch.int8,
        inverse=inverse, rounding=rounding, low=float(low), high=float(high),
    )  # fmt: skip


@lowers(ops.dequantize)
def dequantize(e: Emitter, codes: Ref, scale: float, zero_point: int) -> Ref:
    """(codes - zero_point) * scale."""
    value = e.op("t2n_dequantize", codes, dtype=torch.float32, zero_point=float(zero_point), scale=scale)
    return e.cast(value, e.out.dtype)


@lowers(ops.dequantize_weight)
def dequantize_weight(e: Emitter, codes: Ref, scale: Ref, zero_point: Ref | None, axis: int) -> Ref:
    """The floats of an 8-bit weight, for what tract does not compute with codes."""
    value = e.cast(codes, torch.float32)
    if zero_point is not None:
        value = e.op("sub", value, _along(e, zero_point, axis, codes.rank))
    return e.cast(e.op("mul", value, _along(e, scale, axis, codes.rank)), e.out.dtype)


@lowers(ops.linear)
def linear(e: Emitter, codes: Ref, weight: Ref, zero_point: int, axis: int) -> Ref:
    """Sums of (codes - zero_point) * weight, i32."""
    matrix, expr = _matrix(e, weight), _einsum(codes.rank, axis)
    sums = e.op(
        "tract_core_einsum", [matrix, codes], out=e.out.shape, dtype=torch.int32,
        expr=expr.format(rest=""), acc="i32", output="i32",
    )  # fmt: skip
    if zero_point == 0:
        return sums
    shape = [-1 if i == axis else 1 for i in range(codes.rank)]
    correction = e.constant(_zero_point_sums(e, weight, zero_point).reshape(shape), "zero_point")
    return e.op("add", sums, correction, out=e.out.shape)


@lowers(ops.linear_requantized)
def linear_requantized(
    e: Emitter,
    codes: Ref,
    weight: Ref,
    bias: Ref,
    zero_point: int,
    axis: int,
    scale: float,
    out_zero_point: int,
    low: int,
    high: int,
) -> Ref:
    """Sums, bias, scale, zero point and saturation in one operator."""
    if zero_point:
        bias = e.constant(e.tensor(bias) + _zero_point_sums(e, weight, zero_point), "bias")
    matrix, expr = _matrix(e, weight), _einsum(codes.rank, axis)
    result = e.op(
        "tract_core_einsum_q", [matrix, codes], out=e.out.shape, dtype=torch.int8,
        expr=expr.format(rest=",o,,,,,,"), acc="i32", output="i8", bias=bias,
        a0=0, a_scale=scale, b0=0, b_scale=1.0, c0=out_zero_point, c_scale=1.0,
    )  # fmt: skip
    return _clamped(e, result, low, high)


def _einsum(rank: int, axis: int) -> str:
    """The weight first, as everywhere; `rest` are the axes of further inputs."""
    before, behind = AXES[:axis], AXES[axis : rank - 1]
    return f"ok,{before}k{behind}{{rest}}->{before}o{behind}"


def _matrix(e: Emitter, weight: Ref) -> Ref:
    return e.squeeze(weight, range(2, weight.rank))


@lowers(ops.convolve)
def convolve(
    e: Emitter,
    codes: Ref,
    weight: Ref,
    zero_point: int,
    stride: Sequence[int],
    before: Sequence[int],
    behind: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Ref:
    """Sums of (codes - zero_point) * weight over windows, i32; what lies around the input is `zero_point`."""
    if ops.is_depthwise(weight.shape, groups):
        return _in_floats(e, codes, weight, zero_point, _Window(stride, before, behind, dilation, groups))
    none = e.constant(torch.zeros(e.out.shape[1], dtype=torch.int32), "no_bias")
    window = _Window(stride, before, behind, dilation, groups)
    return _convolved(e, codes, weight, none, window, 1.0, zero_point, 0, "i32")


def _in_floats(e: Emitter, codes: Ref, weight: Ref, zero_point: int, window: _Window) -> Ref:
    """The same integers, held in f32."""
    x = e.cast(codes, torch.float32)
    x = e.op("sub", x, float(zero_point)) if zero_point else x
    return e.op(
        "conv", x, e.cast(weight, torch.float32), out=e.out.shape, border="constant",
        padding=list(zip(window.before, window.behind, strict=True)),
        stride=window.stride, dilation=window.dilation, groups=window.groups,
    )  # fmt: skip


@lowers(ops.convolve_requantized)
def convolve_requantized(
    e: Emitter,
    codes: Ref,
    weight: Ref,
    bias: Ref,
    zero_point: int,
    stride: Sequence[int],
    before: Sequence[int],
    behind: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: float,
    out_zero_point: int,
    low: int,
    high: int,
) -> Ref:
    """The same with bias, scale, zero point and saturation in one operator. `a` is the filter, `b` the input, `c` the output."""
    window = _Window(stride, before, behind, dilation, groups)
    return _clamped(e, _convolved(e, codes, weight, bias, window, scale, zero_point, out_zero_point, "i8"), low, high)


@lowers(ops.rescale)
def rescale(e: Emitter, sums: Ref, scale: Ref, bias: Ref | None) -> Ref:
    """Sums * scale + bias in f32."""
    scale = _repeated(e, scale, sums)
    if bias is None:
        value = e.op("mul", e.cast(sums, torch.float32), scale, out=sums.shape)
    else:
        value = e.op("t2n_rescale", sums, scale, _repeated(e, bias, sums), out=sums.shape, dtype=torch.float32)
    return e.cast(value, e.out.dtype)


@lowers(ops.dequantize_chosen)
def dequantize_chosen(e: Emitter, codes: Ref, scale: Ref, zero_point: Ref, low: int) -> Ref:
    """(codes - zero_point) * scale of codes held as floats."""
    return e.op("mul", e.op("sub", codes, e.lift(zero_point, codes.rank)), e.lift(scale, codes.rank), out=codes.shape)


@lowers(ops.rescale_chosen)
def rescale_chosen(
    e: Emitter,
    sums: Ref,
    scale: Ref,
    zero_point: Ref,
    weight_scale: Ref,
    weight_sums: Ref,
    bias: Ref | None,
    shift: int,
) -> Ref:
    """(sums - (zero_point - shift) * weight_sums) * scale * weight_scale + bias; what is computed once is one row."""
    scale, zero_point = (e.lift(e.cast(parameter, torch.float32), sums.rank) for parameter in (scale, zero_point))
    shifted = e.op("sub", zero_point, float(shift)) if shift else zero_point
    offset = e.op("mul", weight_sums, shifted, out=weight_sums.shape)
    value = e.op("sub", e.cast(sums, torch.float32), offset, out=sums.shape)
    value = e.op("mul", value, e.op("mul", weight_scale, scale, out=weight_scale.shape), out=sums.shape)
    return e.cast(value if bias is None else e.op("add", value, bias, out=sums.shape), e.out.dtype)


def _repeated(e: Emitter, parameter: Ref, sums: Ref) -> Ref:
    """A parameter (1, n, 1...) of `sums` (batch, n, sizes...), once for each of the batch.

    tract 0.23.9 computes with one that repeats only along the last axes 20 times as fast as with one that repeats along the first too.
    A broadcast, or a tile, it would move behind the product; it does not look through a gather.
    """
    batch, last = sums.shape[0], sums.shape[-1]
    if sums.rank < 3 or parameter.shape[1] == 1 or batch == 1 or not isinstance(last, int):
        return parameter
    positions = e.arange(0, 1, batch, torch.int64)
    first = e.op("min", positions, e.constant(torch.zeros(1, dtype=torch.int64), "first"), out=(batch,), hint="first")
    return e.op("tract_core_gather", parameter, first, out=(batch, *parameter.shape[1:]), axis=0, hint="repeated")


@lowers(ops.look_up)
def look_up(e: Emitter, codes: Ref, table: Ref) -> Ref:
    """table[codes + 128]."""
    return e.op("t2n_look_up", table, codes, out=codes.shape, dtype=torch.int8)


@lowers(ops.clamp_codes)
def clamp_codes(e: Emitter, codes: Ref, low: int, high: int) -> Ref:
    """Codes within [low, high]."""
    return _clamped(e, codes, low, high)


@lowers(ops.embed)
def embed(e: Emitter, indices: Ref, codes: Ref, scale: Ref, zero_point: Ref | None) -> Ref:
    """Rows of codes, dequantized."""
    value = e.cast(e.op("tract_core_gather", codes, indices, out=e.out.shape, axis=0), torch.float32)

    def of_rows(parameter: Ref) -> Ref:
        if parameter.shape == (1,):
            return e.lift(parameter, value.rank)
        each = e.op("tract_core_gather", parameter, indices, out=indices.shape, axis=0)
        return e.unsqueeze(each, [indices.rank])

    if zero_point is not None:
        value = e.op("sub", value, of_rows(zero_point))
    return e.cast(e.op("mul", value, of_rows(scale)), e.out.dtype)


@dataclass(frozen=True, slots=True)
class _Window:
    """Of the last axes, one number each."""

    stride: Sequence[int]
    before: Sequence[int]
    behind: Sequence[int]
    dilation: Sequence[int]
    groups: int


def _convolved(
    e: Emitter,
    codes: Ref,
    weight: Ref,
    bias: Ref,
    window: _Window,
    scale: float,
    zero_point: int,
    out_zero_point: int,
    output_dt: str,
) -> Ref:
    """In tract_core_qconv `a` is the filter, `b` the input and `c` the output; it reads `groups`, though it declares `group`."""
    return e.op(
        "tract_core_qconv", codes, weight, bias, out=e.out.shape, dtype=torch.int8 if output_dt == "i8" else torch.int32,
        border="constant", padding=list(zip(window.before, window.behind, strict=True)), stride=window.stride,
        dilation=window.dilation, groups=window.groups, a0=0, a_scale=scale, b0=zero_point, b_scale=1.0,
        c0=out_zero_point, c_scale=1.0, output_dt=output_dt,
    )  # fmt: skip


def _along(e: Emitter, parameter: Ref, axis: int, rank: int) -> Ref:
    """A parameter (1,) or (n,) beside a tensor of `rank`, the n along `axis`."""
    axis %= rank
    return e.unsqueeze(parameter, [i for i in range(rank) if i != axis])


def _zero_point_sums(e: Emitter, weight: Ref, zero_point: int) -> torch.Tensor:
    """What the zero point of the input adds to the sums of each channel."""
    return (e.tensor(weight).flatten(1).to(torch.int32).sum(1) * -zero_point).to(torch.int32)


def _clamped(e: Emitter, codes: Ref, low: int, high: int) -> Ref:
    for operator, limit, free in (("max", low, low <= _LOW), ("min", high, high >= _HIGH)):
        if not free:
            codes = e.op(operator, codes, e.lift(e.full(limit, torch.int8), codes.rank), out=codes.shape)
    return codes
