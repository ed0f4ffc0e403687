"""Nodes of ours for 8-bit arithmetic: `t2n::quantize`, `dequantize`, integer products and what brings their sums back to 8 bits.

Codes are int8 whatever torch has: an unsigned code c with zero point z is c - 128 with z - 128. Sums are int32. Torch runs most of
these implementations in tests alone; they say what tract has to compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_to_nnef.torch_internals import OpOverload

CODES = (-128, 127)


def _define(signature: str, compute: Callable[..., Tensor]) -> OpOverload:
    name = signature.split("(")[0]
    torch.library.define(f"t2n::{name}", signature.removeprefix(name), tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"t2n::{name}", "CompositeExplicitAutograd", compute)
    overload: OpOverload = getattr(torch.ops.t2n, name).default
    return overload


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """clamp(round_half_even(x * (1 / scale)) + zero_point, low, high), as `quantized_decomposed::quantize_per_tensor`."""
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, low, high).to(torch.int8)


def _dequantize(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """(codes - zero_point) * scale in f32."""
    return (codes.to(torch.float32) - zero_point) * scale


def _dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """(codes - zero_point) * scale, one of each or one for each index of `axis`."""
    shape = [-1 if i == axis else 1 for i in range(codes.dim())]
    shifted = codes.to(torch.float32) - (0 if zero_point is None else zero_point.to(torch.float32).reshape(shape))
    return shifted * scale.reshape(shape)


def _linear(codes: Tensor, weight: Tensor, zero_point: int, axis: int) -> Tensor:
    """Sums of (codes - zero_point) times weight [N, K] or (N, K, 1, ...), over `axis` of K, which then has N."""
    inputs = (codes.to(torch.int32) - zero_point).movedim(axis, -1)
    return (inputs @ weight.to(torch.int32).flatten(1).mT).to(torch.int32).movedim(-1, axis)


def _convolve(
    codes: Tensor,
    weight: Tensor,
    zero_point: int,
    stride: Sequence[int],
    before: Sequence[int],
    behind: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Sums (N, O, *) of (codes (N, C, *) - zero_point) with weight (O, C / groups, *), of zeros around it."""
    pads = [p for pair in reversed(list(zip(before, behind, strict=True))) for p in pair]
    x = functional.pad(codes.to(torch.float64) - zero_point, pads)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
    return convolve(x, weight.to(torch.float64), None, list(stride), 0, list(dilation), groups).to(torch.int32)


def _rescale(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Sums * scale + bias in f32; both have the rank of the sums and one element, or one a channel."""
    scaled = sums.to(torch.float32) * scale
    return scaled if bias is None else scaled + bias


def _requantized(sums: Tensor, bias: Tensor, axis: int, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """clamp(round_half_even((sums + bias) * scale) + zero_point, low, high); bias int32 [N]."""
    shape = [-1 if i == axis % sums.dim() else 1 for i in range(sums.dim())]
    scaled = torch.round((sums + bias.reshape(shape)).to(torch.float64) * scale)
    return torch.clamp(scaled + zero_point, low, high).to(torch.int8)


def _linear_requantized(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor,
    zero_point: int,
    axis: int,
    scale: float,
    out_zero_point: int,
    low: int,
    high: int,
) -> Tensor:
    return _requantized(_linear(codes, weight, zero_point, axis), bias, axis, scale, out_zero_point, low, high)


def _convolve_requantized(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor,
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
) -> Tensor:
    sums = _convolve(codes, weight, zero_point, stride, before, behind, dilation, groups)
    return _requantized(sums, bias, 1, scale, out_zero_point, low, high)


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    """table[codes + 128], of 256 codes."""
    return table[codes.to(torch.int64) + 128]


def _clamp_codes(codes: Tensor, low: int, high: int) -> Tensor:
    return codes.clamp(low, high)


def _embed(indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Rows of a weight [V, D] in 8 bits, dequantized; scale and zero_point [V] or [1]."""
    shifted = codes[indices].to(torch.float32)
    if zero_point is not None:
        shifted -= zero_point.expand(len(codes))[indices, None]
    return shifted * scale.expand(len(codes))[indices, None]


def _dequantize_chosen(codes: Tensor, scale: Tensor, zero_point: Tensor, low: int) -> Tensor:
    """(codes - zero_point) * scale, with codes from `low` to `low` + 255 held as floats, and a scale known only at run time."""
    return (codes - zero_point) * scale


def _rescale_chosen(
    sums: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    shift: int,
) -> Tensor:
    """(sums - (zero_point - shift) * weight_sums) * scale * weight_scale + bias: `sums` of codes less `shift` with 8-bit weights."""
    scaled = (sums.to(torch.float32) - (zero_point - shift) * weight_sums) * (scale * weight_scale)
    return scaled if bias is None else scaled + bias


_WINDOW = "int[] stride, int[] before, int[] behind, int[] dilation, int groups"
_TO_CODES = "float scale, int out_zero_point, int low, int high"
quantize = _define("quantize(Tensor x, float scale, int zero_point, int low, int high) -> Tensor", _quantize)
dequantize = _define("dequantize(Tensor codes, float scale, int zero_point) -> Tensor", _dequantize)
dequantize_weight = _define(
    "dequantize_weight(Tensor codes, Tensor scale, Tensor? zero_point, int axis) -> Tensor", _dequantize_weight
)
linear = _define("integer_linear(Tensor codes, Tensor weight, int zero_point, int axis) -> Tensor", _linear)
convolve = _define(f"integer_conv(Tensor codes, Tensor weight, int zero_point, {_WINDOW}) -> Tensor", _convolve)
rescale = _define("rescale(Tensor sums, Tensor scale, Tensor? bias) -> Tensor", _rescale)
linear_requantized = _define(
    f"integer_linear_requantized(Tensor codes, Tensor weight, Tensor bias, int zero_point, int axis, {_TO_CODES}) -> Tensor",
    _linear_requantized,
)
convolve_requantized = _define(
    f"integer_conv_requantized(Tensor codes, Tensor weight, Tensor bias, int zero_point, {_WINDOW}, {_TO_CODES}) -> Tensor",
    _convolve_requantized,
)
look_up = _define("look_up(Tensor codes, Tensor table) -> Tensor", _look_up)
clamp_codes = _define("clamp_codes(Tensor codes, int low, int high) -> Tensor", _clamp_codes)
embed = _define("integer_embedding(Tensor indices, Tensor codes, Tensor scale, Tensor? zero_point) -> Tensor", _embed)


# Torch runs this one, since a reference of dynamic quantization has it.
dequantize_chosen = _define(
    "dequantize_chosen(Tensor codes, Tensor scale, Tensor zero_point, int low) -> Tensor", _dequantize_chosen
)
torch.library.register_fake("t2n::dequantize_chosen", lambda codes, *rest: torch.empty_like(codes))
rescale_chosen = _define(
    "rescale_chosen(Tensor sums, Tensor scale, Tensor zero_point, Tensor weight_scale, Tensor weight_sums, Tensor? bias, int shift)"
    " -> Tensor",
    _rescale_chosen,
)


def is_depthwise(weight_shape: Sequence[Any], groups: int) -> bool:
    """Whether each channel has its own filters: sums of few codes, which f32 holds exactly.

    tract 0.23.9 computes them in f32 four to five times as fast as with its 8-bit kernels, which have no such case.
    """
    window = math.prod(weight_shape[2:])
    return groups > 1 and weight_shape[1] == 1 and window * 128 * 255 < 1 << 24


PRODUCTS = frozenset({linear, convolve, linear_requantized, convolve_requantized})
