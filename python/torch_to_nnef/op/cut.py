"""Parts of axes: slices, splits, windows, rolls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import sympy
import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.graph.tdim import dim_text
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.index import at_least_1d, flat, permuted
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# What torch writes for an open end.
_OPEN = 2**63 - 1


@lowers(aten.slice.Tensor)
def slice_(e: Emitter, x: Ref, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1) -> Ref:
    """x[start:end:step] on one axis."""
    axis = dim % x.rank
    if x.shape == e.out.shape:
        return x
    begin, stop = bounds(e, x.shape[axis], start, end, step, e.out.shape[axis])
    return e.slice(x, axis, begin, e.out.shape[axis], step, stop)


def bounds(e: Emitter, size: Dim, start: Dim | None, end: Dim | None, step: int, length: Dim) -> tuple[Dim, Dim]:
    """Begin and end of a slice, both counted from the front and within [0, size].

    Over a dynamic axis torch cuts what lies outside, or not, and says so by the length alone; the bounds that give it are taken.
    """
    if all(isinstance(v, int) or v is None for v in (size, start, end)):
        begin, stop, _ = slice(start, end, step).indices(int(size))
        return begin, max(begin, stop)
    begins = [start + size, 0] if isinstance(start, int) and start < 0 else [start or 0]
    stops = [size] if end is None or end == _OPEN else [end + size] if isinstance(end, int) and end < 0 else [end, size]
    for begin, stop in itertools.product(begins, stops):
        if all(_cut(begin, stop, step, sizes) == _at(length, sizes) for sizes in _sizes(size, begin, stop, length)):
            return begin, stop
    raise e.refuse(f"[{start}:{end}:{step}] of {size} elements, cut to {length}; give bounds within the axis")


def _sizes(*dims: Dim) -> list[dict[sympy.Basic, int]]:
    """Two choices of large, prime-like numbers for all symbols in `dims`."""
    symbols = sorted(set().union(*(dim.free_symbols for dim in dims if not isinstance(dim, int))), key=str)
    return [{symbol: scale + 2 * i for i, symbol in enumerate(symbols)} for scale in (1009, 10007)]


def _at(dim: Dim, sizes: Mapping[sympy.Basic, int]) -> int:
    if isinstance(dim, int):
        return dim
    dim_text(dim)  # refuses what tract has no form for, nor sympy a number
    return int(dim.subs(sizes))


def _cut(begin: Dim, stop: Dim, step: int, sizes: Mapping[sympy.Basic, int]) -> int:
    return -((_at(begin, sizes) - _at(stop, sizes)) // step)


def joined(e: Emitter, parts: Sequence[Ref], axis: int) -> Ref:
    """Parts of one dtype along an axis, in order."""
    if len(parts) == 1:
        return parts[0]
    length = sum((part.shape[axis] for part in parts), 0)
    shape = (*parts[0].shape[:axis], length, *parts[0].shape[axis + 1 :])
    return e.op("concat", list(parts), out=shape, dtype=parts[0].dtype, axis=axis)


@lowers(aten.narrow.default, aten.narrow_copy.default)
def narrow(e: Emitter, x: Ref, dim: int, start: Dim, length: Dim) -> Ref:
    """`length` elements of one axis."""
    axis = dim % x.rank
    begin = x.shape[axis] + start if isinstance(start, int) and start < 0 else start
    return e.slice(x, axis, begin, length)


@lowers(aten.select.int)
def select(e: Emitter, x: Ref, dim: int, index: Dim) -> Ref:
    """One element of an axis."""
    axis = dim % x.rank
    begin = x.shape[axis] + index if isinstance(index, int) and index < 0 else index
    return e.squeeze(e.slice(x, axis, begin, 1), [axis])


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.unbind_copy.int)
def split(e: Emitter, x: Ref, dim: int = 0) -> list[Ref]:
    """Pieces along one axis, as long as torch computed them; `unbind` also drops the axis."""
    axis, begin, parts = dim % x.rank, 0, list[Ref]()
    for piece in e.node.outputs:
        unbound = len(piece.shape) < x.rank
        length = 1 if unbound else piece.shape[axis]
        part = e.slice(x, axis, begin, length)
        parts.append(e.squeeze(part, [axis]) if unbound else part)
        begin = begin + length
    return parts


@lowers(aten.roll.default)
def roll(e: Emitter, x: Ref, shifts: Sequence[Dim], dims: Sequence[int] = ()) -> Ref:
    """Axes turned around: what leaves at the end comes back at the front; without dims, the flattened tensor."""
    if not dims:
        return e.reshape(_rolled(e, flat(e, x), 0, shifts[0]), x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        x = _rolled(e, x, e.axis(dim, x.rank), shift) if x.rank else x
    return x


def _rolled(e: Emitter, x: Ref, axis: int, shift: Dim) -> Ref:
    size = x.shape[axis]
    if not isinstance(shift, int):
        raise e.refuse("a roll by a dynamic amount; concatenate two slices")
    if not isinstance(size, int):
        # Not known is whether shift < size. -shift = shift * (size - 1) modulo size, which is not negative.
        positions = e.arange(shift * (size - 1) if shift > 0 else -shift, 1, size, torch.int64)
        turns = e.binary("div", positions, size, torch.int64)
        source = e.binary("sub", positions, e.binary("mul", turns, size, torch.int64), torch.int64)
        return e.op("tract_core_gather", x, source, out=x.shape, axis=axis)
    if not size or not (moved := shift % size):
        return x
    return joined(e, [e.slice(x, axis, size - moved, moved), e.slice(x, axis, 0, size - moved)], axis)


@lowers(aten.unfold.default)
def unfold(e: Emitter, x: Ref, dimension: int, size: int, step: int) -> Ref:
    """Windows along one axis, `step` apart; what is in a window becomes the last axis."""
    axis = e.axis(dimension, x.rank)
    x = at_least_1d(e, x)
    starts = e.arange(0, step, e.out.shape[axis] if len(e.out.shape) > x.rank else 1, torch.int64)
    places = e.binary("add", e.unsqueeze(starts, [1]), e.arange(0, 1, size, torch.int64), torch.int64)
    shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    windows = e.op("tract_core_gather", x, places, out=shape, axis=axis)
    order = [i for i in range(x.rank + 1) if i != axis + 1]
    return e.reshape(permuted(e, windows, [*order, axis + 1]), e.out.shape)
