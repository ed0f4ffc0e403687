"""Pooling. NNEF's windows cover all axes, batch and channels with size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_to_nnef.op.conv import per_axis
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Ref:
    """Largest value of each window; padding never wins."""
    return _pool(e, "max_pool", x, kernel_size, stride, padding, ceil_mode, border="ignore", dilation=dilation)


@lowers(aten.max_pool2d_with_indices.default)
def max_pool_with_indices(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> list[Ref]:
    """Max pooling as decompositions leave it; only the values are given."""
    return [max_pool(e, x, kernel_size, stride, padding, dilation, ceil_mode)]


@lowers(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Ref:
    """Mean of each window, over the padding too if count_include_pad."""
    counted = count_include_pad and any(padding)
    return _pool(
        e,
        "avg_pool",
        x,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        border="constant" if counted else "ignore",
    )


def _pool(
    e: Emitter,
    operator: str,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    border: str,
    dilation: Sequence[int] = (1,),
) -> Ref:
    spatial = _spatial(e)
    kernel, pad = per_axis(kernel_size, spatial), per_axis(padding, spatial)
    steps, spread = per_axis(stride or kernel_size, spatial), per_axis(dilation, spatial)
    if ceil_mode:
        raise e.refuse("ceil_mode=True; pad the input instead")
    lead = x.rank - spatial
    return e.op(
        operator,
        x,
        out=e.out.shape,
        size=[1] * lead + kernel,
        border=border,
        padding=[(0, 0)] * lead + [(p, p) for p in pad],
        stride=[1] * lead + steps,
        dilation=[1] * lead + spread,
    )


def _spatial(e: Emitter) -> int:
    """3 for max_pool3d: the digit of the op's name."""
    return int(next(c for c in e.node.target._schema.name if c.isdigit()))


@lowers(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
def adaptive_max_pool(e: Emitter, x: Ref, output_size: Sequence[int]) -> list[Ref]:
    """The largest of all positions; only the values are given, and only for an output of size 1."""
    if any(o != 1 for o in output_size):
        raise e.refuse(f"adaptive max pooling to {list(output_size)}; size 1 has a lowering")
    spatial = len(output_size)
    return [e.op("max_reduce", x, out=e.out.shape, axes=list(range(x.rank - spatial, x.rank)))]


@lowers(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool(e: Emitter, x: Ref, output_size: Sequence[int]) -> Ref:
    """Mean over windows that give `output_size`; tract has windows of one size only."""
    spatial = len(output_size)
    sizes = x.shape[-spatial:]
    if all(o == 1 for o in output_size):
        return e.op("mean_reduce", x, out=e.out.shape, axes=list(range(x.rank - spatial, x.rank)))
    if not all(isinstance(s, int) and s % o == 0 for s, o in zip(sizes, output_size, strict=True)):
        raise e.refuse(
            f"adaptive pooling of {sizes} to {list(output_size)}: the input must be a static multiple of the output"
        )
    window = [s // o for s, o in zip(sizes, output_size, strict=True) if isinstance(s, int)]
    return _pool(e, "avg_pool", x, window, window, [0], ceil_mode=False, border="ignore")
