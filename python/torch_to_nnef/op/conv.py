"""Convolutions: NCHW with OIHW filters, as NNEF has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    spatial = weight.rank - 2
    batched = x.rank == weight.rank
    if not batched:
        x = e.unsqueeze(x, [0])
    biases = [] if bias is None else [e.unsqueeze(bias, [0])]
    result = e.op(
        "conv",
        x,
        weight,
        *biases,
        out=e.out.shape if batched else (1, *e.out.shape),
        border="constant",
        padding=padding,
        stride=per_axis(stride, spatial),
        dilation=per_axis(dilation, spatial),
        groups=groups,
    )
    return result if batched else e.squeeze(result, [0])


def per_axis(values: int | Sequence[int], count: int) -> list[int]:
    """ATen's habit of one number for all spatial axes, spelled out."""
    values = [values] if isinstance(values, int) else list(values)
    return values * count if len(values) == 1 else values
