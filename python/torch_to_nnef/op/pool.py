"""Pooling by windows of one size. tract's windows cover all axes of (N, C, *), batch and channels with size 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.conv import per_axis
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Windows:
    """Of the last axes: how large, how far apart, how spread, and what lies around the input."""

    size: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[tuple[int, int]]

    @classmethod
    def of(
        cls,
        e: Emitter,
        x: Ref,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> Windows:
        """Torch's arguments spelled out; rounding up the number of windows is padding behind."""
        spatial = _spatial(e)
        size, steps = per_axis(kernel_size, spatial), per_axis(stride or kernel_size, spatial)
        spread, pads = per_axis(dilation, spatial), per_axis(padding, spatial)
        fields = [d * (k - 1) + 1 for k, d in zip(size, spread, strict=True)]
        behind = pads
        if ceil_mode:
            sizes = zip(x.shape[-spatial:], e.out.shape[-spatial:], fields, steps, pads, strict=True)
            behind = [_behind(e, *axis) for axis in sizes]
        return cls(size, steps, spread, list(zip(pads, behind, strict=True)))


def _behind(e: Emitter, before: Dim, after: Dim, field: int, step: int, pad: int) -> int:
    """Padding behind an axis that makes room for the last window; of a dynamic axis, for the worst size."""
    if isinstance(before, int) and isinstance(after, int):
        return max((after - 1) * step + field - before - pad, 0)
    if pad + step > field:  # torch drops a window that starts beyond the input, for some sizes only
        raise e.refuse("ceil_mode=True on a dynamic axis with a stride this large; pad the input instead")
    return pad + step - 1


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
    windows = Windows.of(e, x, kernel_size, stride, padding, dilation, ceil_mode)
    return pool(e, "max_pool", x, windows, e.out.shape, border="ignore")[0]


@lowers(
    aten.max_pool1d_with_indices.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
)
def max_pool_with_indices(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> list[Ref]:
    """The same with the position of each value in the flattened last axes of the input: the first of equal ones, as in torch."""
    windows = Windows.of(e, x, kernel_size, stride, padding, dilation, ceil_mode)
    return max_with_index(e, x, windows, e.out.shape)


def max_with_index(e: Emitter, x: Ref, windows: Windows, out: tuple[Dim, ...]) -> list[Ref]:
    """Values and flat positions."""
    return pool(e, "max_pool_with_index", x, windows, out, (x.dtype, torch.int64), border="ignore")


@lowers(aten.avg_pool1d.default)
def avg_pool1d(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Ref:
    """Mean of each window, over the padding too if count_include_pad."""
    return avg_pool(e, x, kernel_size, stride, padding, ceil_mode, count_include_pad)


@lowers(aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Ref:
    """The same over two or three axes; the sum over `divisor_override` if given."""
    if not x.dtype.is_floating_point:
        raise e.refuse("pooling of integers: tract averages them as floats and rounds otherwise; cast to float")
    windows = Windows.of(e, x, kernel_size, stride, padding, (1,), ceil_mode)
    if divisor_override is not None:
        total = pool(e, "box", x, windows, e.out.shape, border="constant", normalize=False)[0]
        return e.binary("mul", total, 1 / divisor_override, total.dtype)
    counted = count_include_pad and any(padding)
    if counted and ceil_mode:
        x, windows = _padded(e, x, windows, per_axis(padding, len(windows.size)))
        counted = False
    return mean_pool(e, x, windows, e.out.shape, counted)


def mean_pool(e: Emitter, x: Ref, windows: Windows, out: tuple[Dim, ...], counted: bool = False) -> Ref:
    """Mean of each window; the padding counts as zeros if `counted`."""
    return pool(e, "avg_pool", x, windows, out, border="constant" if counted else "ignore")[0]


def _padded(e: Emitter, x: Ref, windows: Windows, pads: list[int]) -> tuple[Ref, Windows]:
    """The padding that counts written out as zeros; what ceil_mode adds behind it does not count."""
    lead = x.rank - len(pads)
    shape = (*x.shape[:lead], *(d + 2 * p for d, p in zip(x.shape[lead:], pads, strict=True)))
    amounts = [(0, 0)] * lead + [(p, p) for p in pads]
    x = e.op("pad", x, out=shape, padding=amounts, border="constant", value=0.0)
    rest = [(0, max(behind - p, 0)) for (_, behind), p in zip(windows.padding, pads, strict=True)]
    return x, Windows(windows.size, windows.stride, windows.dilation, rest)


def pool(
    e: Emitter,
    operator: str,
    x: Ref,
    windows: Windows,
    out: tuple[Dim, ...],
    dtypes: tuple[torch.dtype, ...] = (),
    **attributes: Any,
) -> list[Ref]:
    """Run a pooling operator over the last axes of `x`, whatever is in front of them; a result each of `dtypes`."""
    spatial = len(windows.size)
    planes = _planes(e, x, spatial)
    shape = (*planes.shape[:2], *out[-spatial:])
    results = e.ops(
        operator,
        planes,
        results=[(shape, dtype) for dtype in dtypes or (x.dtype,)],
        size=[1, 1, *windows.size],
        padding=[(0, 0), (0, 0), *windows.padding],
        stride=[1, 1, *windows.stride],
        dilation=[1, 1, *windows.dilation],
        **attributes,
    )
    return [e.reshape(result, out) for result in results]


def _planes(e: Emitter, x: Ref, spatial: int) -> Ref:
    """(N, C, *) with the static number of channels tract asks for."""
    lead = x.shape[:-spatial]
    if len(lead) == 2 and isinstance(lead[1], int):
        return x
    return e.reshape(x, (math.prod(lead), 1, *x.shape[-spatial:]))


def _spatial(e: Emitter) -> int:
    """3 for max_pool3d: the digit of the op's name."""
    return int(next(c for c in e.node.target._schema.name if c.isdigit()))


@lowers(aten.max_unpool2d.default)
def max_unpool2d(e: Emitter, x: Ref, indices: Ref) -> Ref:
    """Zeros with the values of `x` at flat `indices`: the inverse of max pooling with indices."""
    return _unpool(e, x, indices, 2)


@lowers(aten.max_unpool3d.default)
def max_unpool3d(e: Emitter, x: Ref, indices: Ref, stride: Sequence[int], padding: Sequence[int]) -> Ref:
    """The same over volumes; the size of the output says what stride and padding make."""
    return _unpool(e, x, indices, 3)


def _unpool(e: Emitter, x: Ref, indices: Ref, spatial: int) -> Ref:
    lead, plane = e.out.shape[:-spatial], math.prod(e.out.shape[-spatial:])
    flat = (math.prod(lead), math.prod(x.shape[-spatial:]))
    zeros = e.broadcast_to(e.full(0.0), (flat[0], plane))
    values, where = (e.reshape(t, flat) for t in (x, indices))
    filled = e.op("tract_core_scatter_elements", zeros, where, values, out=zeros.shape, axis=1)
    return e.reshape(filled, e.out.shape)
