"""Order: sorting, order statistics, and search in what is sorted."""

from __future__ import annotations

import math

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.elementwise import compare, select
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.operand import as_ref
from torch_to_nnef.op.reduce import arg, extreme, reduced, total
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref, Unavailable

aten = torch.ops.aten


def largest(e: Emitter, x: Ref, k: Dim, axis: int, descending: bool) -> list[Ref]:
    """The first k along one axis in order, equal ones in their own, and their places. tract orders no booleans."""
    if not x.rank:
        return [x, e.full(0, torch.int64)]
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    numbers = e.cast(x, torch.uint8) if x.dtype is torch.bool else x
    results = [(shape, numbers.dtype), (shape, torch.int64)]
    # A k that is a dimension has to be cast to be known when tract runs, and is then an unknown length to tract: the slice tells it.
    count = k if isinstance(k, int) else as_ref(e, k, torch.int64)
    found = e.ops("tract_core_topk", numbers, results=results, k=count, axis=axis, largest=descending)
    values, places = found if isinstance(k, int) else (e.slice(part, axis, 0, k) for part in found)
    return [e.cast(values, x.dtype), places]


_TIES = Unavailable("which of equal elements torch picks is not said; use the values, or sort with stable=True")


def _picked(x: Ref, results: list[Ref]) -> list[Ref | Unavailable]:
    """Values, and their places of floats: among integers equal ones are the rule."""
    return [results[0], results[1] if x.dtype.is_floating_point else _TIES]


def _sorted(e: Emitter, x: Ref, dim: int, descending: bool, stable: bool | None) -> list[Ref | Unavailable]:
    """Values, and their places unless there are so few values that equal ones are the rule."""
    values, places = _all(e, x, dim, descending)
    return [values, places if stable or x.dtype not in {torch.bool, torch.float16} else _TIES]


@lowers(aten.topk.default)
def topk(
    e: Emitter, x: Ref, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True
) -> list[Ref | Unavailable]:
    """The k largest (or smallest) along one axis, in order, and their places."""
    return _picked(x, _first(e, x, k, dim, largest))


@lowers(aten.sort.default)
def sort(e: Emitter, x: Ref, dim: int = -1, descending: bool = False) -> list[Ref | Unavailable]:
    """All along one axis in order, equal ones in their own, and their places."""
    return _sorted(e, x, dim, descending, stable=False)


@lowers(aten.sort.stable)
def sort_stable(
    e: Emitter, x: Ref, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> list[Ref | Unavailable]:
    """The same: tract's order is stable."""
    return _sorted(e, x, dim, descending, stable)


@lowers(aten.argsort.default)
def argsort(e: Emitter, x: Ref, dim: int = -1, descending: bool = False) -> list[Ref | Unavailable]:
    """Places of the sorted elements."""
    return _sorted(e, x, dim, descending, stable=False)[1:]


@lowers(aten.argsort.stable)
def argsort_stable(e: Emitter, x: Ref, stable: bool, dim: int = -1, descending: bool = False) -> Ref:
    """Places of the sorted elements."""
    return _all(e, x, dim, descending)[1]


@lowers(aten.msort.default)
def msort(e: Emitter, x: Ref) -> Ref:
    """Sorted along the first axis."""
    return _all(e, x, 0, False)[0]


def _first(e: Emitter, x: Ref, k: Dim, dim: int, descending: bool) -> list[Ref]:
    return largest(e, x, k, dim % max(x.rank, 1), descending)


def _all(e: Emitter, x: Ref, dim: int, descending: bool) -> list[Ref]:
    return _first(e, x, x.shape[dim] if x.rank else 1, dim, descending)


@lowers(aten.kthvalue.default)
def kthvalue(e: Emitter, x: Ref, k: Dim, dim: int = -1, keepdim: bool = False) -> list[Ref | Unavailable]:
    """The kth smallest along one axis, and its place."""
    return _picked(x, _kth(e, x, k, dim, keepdim))


@lowers(aten.median.dim)
def median(e: Emitter, x: Ref, dim: int = -1, keepdim: bool = False) -> list[Ref | Unavailable]:
    """The middle of the sorted, the lower of two, and its place."""
    return _picked(x, _median(e, x, dim, keepdim))


@lowers(aten.median.default)
def median_of_all(e: Emitter, x: Ref) -> Ref:
    """The middle of all."""
    return _median(e, _flat(e, x), 0, keepdim=False)[0]


@lowers(aten.nanmedian.dim)
def nanmedian(e: Emitter, x: Ref, dim: int = -1, keepdim: bool = False) -> list[Ref | Unavailable]:
    """The median of those that are numbers."""
    return _picked(x, _nanmedian(e, x, dim, keepdim))


@lowers(aten.nanmedian.default)
def nanmedian_of_all(e: Emitter, x: Ref) -> Ref:
    """The median of all that are numbers."""
    return _nanmedian(e, _flat(e, x), 0, keepdim=False)[0]


def _flat(e: Emitter, x: Ref) -> Ref:
    return e.reshape(x, (math.prod(x.shape),))


def _kth(e: Emitter, x: Ref, k: Dim, dim: int, keepdim: bool) -> list[Ref]:
    if not x.rank:
        return [x, e.full(0, torch.int64)]
    axis = dim % x.rank
    last = [e.slice(part, axis, k - 1, 1) for part in largest(e, x, k, axis, False)]
    return last if keepdim else [e.squeeze(part, [axis]) for part in last]


def _median(e: Emitter, x: Ref, dim: int, keepdim: bool) -> list[Ref]:
    length = x.shape[dim] if x.rank else 1
    if isinstance(length, int):
        return _kth(e, x, (length + 1) // 2, dim, keepdim)
    axis = dim % x.rank
    units = tuple(1 if a == axis else d for a, d in enumerate(x.shape))
    return _middle(e, x, e.broadcast_to(as_ref(e, length, torch.int64), units), axis, keepdim)


def _nanmedian(e: Emitter, x: Ref, dim: int, keepdim: bool) -> list[Ref]:
    """What is no number is sorted last, and not counted."""
    if not x.rank or not x.dtype.is_floating_point:
        return _median(e, x, dim, keepdim)
    axis = dim % x.rank
    absent = e.op("ne", x, x, dtype=torch.bool)
    present = e.op("not", absent)
    last = e.op("select", absent, e.full(math.inf, x.dtype), x, dtype=x.dtype)
    count = reduced(e, "sum_reduce", e.cast(present, torch.int64), axis, keepdim=True)
    values, places = _middle(e, last, count, axis, keepdim)
    some = reduced(e, "any_reduce", present, axis, keepdim)
    return [e.op("select", some, values, e.full(math.nan, x.dtype), dtype=x.dtype), places]


def _middle(e: Emitter, x: Ref, count: Ref, axis: int, keepdim: bool) -> list[Ref]:
    """Of the first `count` in order, the middle one."""
    middle = e.op("max", e.binary("sub", count, 1, torch.int64), e.full(0, torch.int64))
    at = e.op("tract_shr", middle, e.full(1, torch.int64))
    results = [_gather(e, part, at, axis) for part in largest(e, x, x.shape[axis], axis, False)]
    return results if keepdim else [e.squeeze(result, [axis]) for result in results]


def _gather(e: Emitter, x: Ref, places: Ref, axis: int) -> Ref:
    return e.op("tract_core_gather_elements", x, places, out=places.shape, axis=axis)


@lowers(aten.mode.default)
def mode(e: Emitter, x: Ref, dim: int = -1, keepdim: bool = False) -> list[Ref]:
    """The most frequent along one axis, the smallest of several, and its last place: each is compared to each."""
    if not x.rank:
        return [x, e.full(0, torch.int64)]
    axis = dim % x.rank
    values, places = largest(e, x, x.shape[axis], axis, False)
    numbers = e.cast(values, torch.uint8) if x.dtype is torch.bool else values
    same = e.op("eq", e.unsqueeze(numbers, [axis]), e.unsqueeze(numbers, [axis + 1]), dtype=torch.bool)
    counts = reduced(e, "sum_reduce", e.cast(same, torch.int64), axis, keepdim=False)
    first = arg(e, "argmax", counts, axis, keepdim=True)
    # Equal ones are neighbours in their order, so the last is as many places further as there are.
    more = e.binary("sub", reduced(e, "max_reduce", counts, axis, keepdim=True), 1, torch.int64)
    at = e.op("add", first, more)
    results = [_gather(e, part, at, axis) for part in (values, places)]
    return results if keepdim else [e.squeeze(result, [axis]) for result in results]


@lowers(aten.histc.default)
def histc(e: Emitter, x: Ref, bins: int = 100, min: Scalar = 0, max: Scalar = 0) -> Ref:
    """How many lie in each of equal bins between min and max, or between the least and the largest."""
    flat = _flat(e, x)
    ends: list[Ref | Scalar] = [min, max]
    if min == max:
        ends = [extreme(e, operator, flat, None, False) for operator in ("min_reduce", "max_reduce")]
    low, high = (as_ref(e, end, x.dtype) for end in ends)
    same = compare(e, "eq", low, high)
    low, high = (select(e, same, e.binary("add", end, by, x.dtype), end) for end, by in ((low, -1), (high, 1)))
    share = e.binary("div", e.binary("sub", flat, low, x.dtype), e.binary("sub", high, low, x.dtype), x.dtype)
    bin_of = e.cast(
        e.binary("min", e.op("floor", e.binary("mul", share, bins, x.dtype)), bins - 1, x.dtype), torch.int64
    )
    inside = e.binary("and", compare(e, "ge", flat, low), compare(e, "le", flat, high), torch.bool)
    hits = compare(e, "eq", e.unsqueeze(bin_of, [1]), e.arange(0, 1, bins, torch.int64))
    counted = e.binary("and", hits, e.unsqueeze(inside, [1]), torch.bool)
    return total(e, "sum_reduce", counted, 0, keepdim=False)
