"""Adaptive pooling: window i of an axis of S to O covers floor(i S / O) to ceil((i + 1) S / O)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.pool import Windows, max_with_index, mean_pool
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.separable import along
from torch_to_nnef.op.statement import Ref
from torch_to_nnef.torch_internals import FloorDiv

aten = torch.ops.aten


@lowers(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def adaptive_avg_pool(e: Emitter, x: Ref, output_size: Sequence[Dim]) -> Ref:
    """Mean of each window: a pooling if all have one size, else one product per axis."""
    spatial = len(output_size)
    axes = range(x.rank - spatial, x.rank)
    if all(o == 1 for o in output_size):
        return e.op("mean_reduce", x, out=e.out.shape, axes=list(axes))
    if windows := _even(x, output_size):
        return mean_pool(e, x, windows, e.out.shape)
    for axis, size in zip(axes, output_size, strict=True):
        if size != x.shape[axis]:
            x = along(e, x, axis, _means(e, x.shape[axis], size))
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
        x = x if size == x.shape[axis] else _slices(e, x, axis, size)
    return [x]


def _even(x: Ref, output_size: Sequence[Dim]) -> Windows | None:
    """Windows of one size that do not overlap, if the sizes allow it."""
    sizes = x.shape[-len(output_size) :]
    pairs = [(s, o) for s, o in zip(sizes, output_size, strict=True) if isinstance(s, int) and isinstance(o, int)]
    if len(pairs) < len(sizes) or any(s % o for s, o in pairs):
        return None
    size = [s // o for s, o in pairs]
    return Windows(size, size, [1] * len(size), [(0, 0)] * len(size))


def _means(e: Emitter, before: Dim, after: Dim) -> torch.Tensor | Ref:
    """(after, before): what torch makes of each unit vector; of dynamic sizes, 1 / length inside of each window."""
    if isinstance(before, int) and isinstance(after, int):
        return torch.nn.functional.adaptive_avg_pool1d(torch.eye(before)[None], after)[0].T
    inputs, outputs = e.scalar(before, torch.int64), e.scalar(after, torch.int64)

    def times(factor: Ref) -> Ref:
        return e.binary("mul", factor, inputs, torch.int64)

    def over(total: Ref) -> Ref:
        return e.unsqueeze(e.binary("div", total, outputs, torch.int64), [1])

    index = e.arange(0, 1, after, torch.int64)
    begin = over(times(index))
    rest = e.binary("sub", outputs, 1, torch.int64) if isinstance(outputs, Ref) else outputs - 1
    end = over(e.binary("add", times(e.binary("add", index, 1, torch.int64)), rest, torch.int64))
    position = e.unsqueeze(e.arange(0, 1, before, torch.int64), [0])
    inside = e.op("and", e.op("ge", position, begin, dtype=torch.bool), e.op("lt", position, end, dtype=torch.bool))
    length = e.cast(e.op("sub", end, begin), torch.float32)
    return e.op("div", e.cast(inside, torch.float32), length)


def _bounds(before: Dim, after: int, index: int) -> tuple[Dim, Dim]:
    """First position of a window, and the one behind its last."""
    if isinstance(before, int):
        return index * before // after, -(-(index + 1) * before // after)
    return FloorDiv(index * before, after), FloorDiv((index + 1) * before + after - 1, after)


def _slices(e: Emitter, x: Ref, axis: int, after: Dim) -> Ref:
    """A slice and a reduction a window."""
    if not isinstance(after, int):
        raise e.refuse("adaptive pooling to a dynamic size: the number of windows must be static")
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    parts = []
    for index in range(after):
        begin, end = _bounds(x.shape[axis], after, index)
        parts.append(e.op("max_reduce", e.slice(x, axis, begin, end - begin), out=shape, axes=[axis]))
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
