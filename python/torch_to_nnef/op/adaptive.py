"""Adaptive pooling: window i of an axis of S to O covers floor(i S / O) to ceil((i + 1) S / O)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._sympy.functions import FloorDiv

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.pool import Windows, max_with_index, mean_pool
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.separable import along
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def adaptive_avg_pool(e: Emitter, x: Ref, output_size: Sequence[Dim]) -> Ref:
    """Mean of each window: a pooling if all have one size, else one product per axis, or slices of a dynamic axis."""
    spatial = len(output_size)
    axes = range(x.rank - spatial, x.rank)
    if all(o == 1 for o in output_size):
        return e.op("mean_reduce", x, out=e.out.shape, axes=list(axes))
    if windows := _even(x, output_size):
        return mean_pool(e, x, windows, e.out.shape)
    for axis, size in zip(axes, output_size, strict=True):
        before = x.shape[axis]
        if size == before:
            continue
        if isinstance(before, int) and isinstance(size, int):
            x = along(e, x, axis, _means(before, size))
        else:
            x = _slices(e, "mean_reduce", x, axis, size)
    return e.cast(x, e.out.dtype)


@lowers(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(e: Emitter, x: Ref, output_size: Sequence[Dim]) -> list[Ref]:
    """Largest value of each window and its flat position; of a dynamic axis that is not reduced to 1, the values alone."""
    spatial = len(output_size)
    axes = range(x.rank - spatial, x.rank)
    if all(o == 1 for o in output_size):
        return _largest_of_all(e, x, spatial)
    if windows := _even(x, output_size):
        return max_with_index(e, x, windows, e.out.shape)
    sizes = x.shape[-spatial:]
    if all(isinstance(d, int) for d in (*sizes, *output_size)):
        return _uneven_max(e, x, [int(s) for s in sizes], [int(o) for o in output_size])
    for axis, size in zip(axes, output_size, strict=True):
        x = x if size == x.shape[axis] else _slices(e, "max_reduce", x, axis, size)
    return [x]


def _even(x: Ref, output_size: Sequence[Dim]) -> Windows | None:
    """Windows of one size that do not overlap, if the sizes allow it."""
    sizes = x.shape[-len(output_size) :]
    pairs = [(s, o) for s, o in zip(sizes, output_size, strict=True) if isinstance(s, int) and isinstance(o, int)]
    if len(pairs) < len(sizes) or any(s % o for s, o in pairs):
        return None
    size = [s // o for s, o in pairs]
    return Windows(size, size, [1] * len(size), [(0, 0)] * len(size))


def _means(before: int, after: int) -> torch.Tensor:
    """(after, before): what torch makes of each unit vector."""
    return torch.nn.functional.adaptive_avg_pool1d(torch.eye(before)[None], after)[0].T


def _bounds(before: Dim, after: int, index: int) -> tuple[Dim, Dim]:
    """First position of a window, and the one behind its last."""
    if isinstance(before, int):
        return index * before // after, -(-(index + 1) * before // after)
    return FloorDiv(index * before, after), FloorDiv((index + 1) * before + after - 1, after)


def _slices(e: Emitter, reduce: str, x: Ref, axis: int, after: Dim) -> Ref:
    """A slice and a reduction a window."""
    if not isinstance(after, int):
        raise e.refuse("adaptive pooling to a dynamic size: the number of windows must be static")
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    parts = []
    for index in range(after):
        begin, end = _bounds(x.shape[axis], after, index)
        parts.append(e.op(reduce, e.slice(x, axis, begin, end - begin), out=shape, axes=[axis]))
    return e.op("concat", parts, out=(*shape[:axis], after, *shape[axis + 1 :]), dtype=x.dtype, axis=axis)


def _largest_of_all(e: Emitter, x: Ref, spatial: int) -> list[Ref]:
    lead = x.shape[:-spatial]
    axis = len(lead)
    plane = 1
    for size in x.shape[-spatial:]:
        plane = plane * size
    values = e.op("max_reduce", x, out=e.out.shape, axes=list(range(axis, x.rank)))
    first = e.op("argmax_reduce", e.reshape(x, (*lead, plane)), out=(*lead, 1), dtype=torch.int64, axes=[axis])
    return [values, e.reshape(first, e.out.shape)]


def _uneven_max(e: Emitter, x: Ref, sizes: list[int], after: list[int]) -> list[Ref]:
    """Windows of one size after repeating the last element of short ones, which changes no maximum."""
    taken, windows = [], []
    for size, count in zip(sizes, after, strict=True):
        bounds = [_bounds(size, count, i) for i in range(count)]
        widest = max(int(end - begin) for begin, end in bounds)
        taken.append([min(int(begin) + k, int(end) - 1) for begin, end in bounds for k in range(widest)])
        windows.append(widest)
    lead = x.rank - len(sizes)
    for axis, positions in enumerate(taken, start=lead):
        if positions != list(range(x.shape[axis])):
            shape = (*x.shape[:axis], len(positions), *x.shape[axis + 1 :])
            x = e.op("tract_core_gather", x, e.constant(torch.tensor(positions), "positions"), out=shape, axis=axis)
    steps = Windows(windows, windows, [1] * len(windows), [(0, 0)] * len(windows))
    values, where = max_with_index(e, x, steps, e.out.shape)
    plane = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    original = e.constant(plane[torch.meshgrid(*map(torch.tensor, taken), indexing="ij")].flatten(), "positions")
    return [values, e.op("tract_core_gather", original, where, out=e.out.shape, dtype=torch.int64, axis=0)]
