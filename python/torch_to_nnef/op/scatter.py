"""Writing into a copy of a tensor: scatters, index_put, masks and slices."""

from __future__ import annotations

from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim, Shape
from torch_to_nnef.op.cut import bounds, joined
from torch_to_nnef.op.divide import floor_divide
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.index import MASKS, Places, at_least_1d, flat, permuted
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# torch's reduction -> tract's; a mean is a sum, divided later.
_REDUCTIONS = {
    "add": "add",
    "sum": "add",
    "mean": "add",
    "multiply": "mul",
    "prod": "mul",
    "amax": "max",
    "amin": "min",
}
# tract does not reduce booleans; on 0 and 1 as bytes, "or" is the larger and "and" the smaller.
_OF_FLAGS = {"add": "max", "mul": "min", "max": "max", "min": "min"}


def _write(e: Emitter, operator: str, x: Ref, index: Ref, updates: Ref, reduction: str = "none", **attrs: Any) -> Ref:
    """A copy of `x` with `updates` at `index`, combined with what stands there by tract's `reduction`."""
    if x.dtype is torch.bool and reduction != "none":
        flags = [e.cast(side, torch.uint8) for side in (x, updates)]
        written = _write(e, operator, flags[0], index, flags[1], _OF_FLAGS[reduction], **attrs)
        return e.binary("ne", written, 0, torch.uint8, result=torch.bool)
    return e.op(operator, x, index, updates, out=x.shape, reduction=reduction, **attrs)


def write_along(e: Emitter, x: Ref, dim: int, index: Ref, updates: Ref, reduction: str = "none") -> Ref:
    """`_write` along one axis; `index` and `updates` have one shape, which may be shorter than that of `x`."""
    target, index, updates = (at_least_1d(e, side) for side in (x, index, updates))
    axis = e.axis(dim, x.rank)
    written = _write(e, "tract_core_scatter_elements", target, index, updates, reduction, axis=axis)
    return e.reshape(written, x.shape)


def _cut(e: Emitter, x: Ref, shape: Shape) -> Ref:
    """The leading corner of `x`: scatters read no more of it than the index says."""
    for axis, (size, wanted) in enumerate(zip(x.shape, shape, strict=True)):
        x = x if size == wanted else e.slice(x, axis, 0, wanted)
    return x


def across(e: Emitter, index: Ref, dim: int, shape: Shape) -> Ref:
    """A vector of indices along one axis, the same for all others: how torch's index_* functions mean it."""
    axis = e.axis(dim, len(shape))
    index = at_least_1d(e, index)
    return e.broadcast_to(e.unsqueeze(index, [i for i in range(len(shape)) if i != axis]) if shape else index, shape)


@lowers(aten.scatter.src, aten.scatter_add.default)
def scatter(e: Emitter, x: Ref, dim: int, index: Ref, src: Ref) -> Ref:
    """Elements of src written, or added, where index says."""
    reduction = "add" if e.node.target is aten.scatter_add.default else "none"
    return write_along(e, x, dim, index, _cut(e, src, index.shape), reduction)


@lowers(aten.scatter.value)
def scatter_value(e: Emitter, x: Ref, dim: int, index: Ref, value: Scalar) -> Ref:
    """One number written where index says."""
    return write_along(e, x, dim, index, e.broadcast_to(e.full(value), index.shape))


@lowers(aten.scatter.reduce)
def scatter_with(e: Emitter, x: Ref, dim: int, index: Ref, src: Ref, reduce: str) -> Ref:
    """Elements of src added or multiplied where index says."""
    return write_along(e, x, dim, index, _cut(e, src, index.shape), _REDUCTIONS[reduce])


@lowers(aten.scatter.value_reduce)
def scatter_value_with(e: Emitter, x: Ref, dim: int, index: Ref, value: Scalar, reduce: str) -> Ref:
    """One number added or multiplied where index says."""
    return write_along(e, x, dim, index, e.broadcast_to(e.full(value), index.shape), _REDUCTIONS[reduce])


@lowers(aten.scatter_reduce.two)
def scatter_reduce(e: Emitter, x: Ref, dim: int, index: Ref, src: Ref, reduce: str, include_self: bool = True) -> Ref:
    """Elements of src combined where index says, with what stood there or without."""
    return _reduced(e, x, dim, index, _cut(e, src, index.shape), reduce, include_self)


@lowers(aten.index_reduce.default)
def index_reduce(e: Emitter, x: Ref, dim: int, index: Ref, source: Ref, reduce: str, include_self: bool = True) -> Ref:
    """Slices of source combined along one axis where index says."""
    return _reduced(e, x, dim, across(e, index, dim, source.shape), source, reduce, include_self)


def _reduced(e: Emitter, x: Ref, dim: int, index: Ref, updates: Ref, reduce: str, include_self: bool) -> Ref:
    if not include_self:
        x = write_along(e, x, dim, index, e.broadcast_to(e.full(_neutral(reduce, x.dtype)), index.shape))
    total = write_along(e, x, dim, index, updates, _REDUCTIONS[reduce])
    if reduce != "mean":
        return total
    before = e.broadcast_to(e.full(int(include_self)), x.shape)
    count = write_along(e, before, dim, index, e.broadcast_to(e.full(1), index.shape), "add")
    count = e.binary("max", count, 1, x.dtype)
    if not x.dtype.is_floating_point:
        return floor_divide(e, total, count)
    return e.binary("div", total, count, x.dtype)


def _neutral(reduce: str, dtype: torch.dtype) -> Scalar:
    """What a reduction of nothing else gives back unchanged."""
    if reduce in ("amax", "amin"):
        if dtype is torch.bool:
            return reduce == "amin"
        if dtype.is_floating_point:
            return float("inf") if reduce == "amin" else float("-inf")
        return torch.iinfo(dtype).max if reduce == "amin" else torch.iinfo(dtype).min
    return int(reduce == "prod")


@lowers(aten.index_add.default)
def index_add(e: Emitter, x: Ref, dim: int, index: Ref, source: Ref, alpha: Scalar = 1) -> Ref:
    """Slices of alpha * source added along one axis where index says."""
    if alpha != 1:
        source = e.binary("and" if x.dtype is torch.bool else "mul", source, alpha, x.dtype)
    return write_along(e, x, dim, across(e, index, dim, source.shape), source, "add")


@lowers(aten.index_copy.default)
def index_copy(e: Emitter, x: Ref, dim: int, index: Ref, source: Ref) -> Ref:
    """Slices of source written along one axis where index says."""
    return write_along(e, x, dim, across(e, index, dim, source.shape), source)


@lowers(aten.index_fill.int_Scalar)
def index_fill(e: Emitter, x: Ref, dim: int, index: Ref, value: Scalar) -> Ref:
    """One number in whole slices of an axis."""
    return _fill_slices(e, x, dim, index, e.full(value))


@lowers(aten.index_fill.int_Tensor)
def index_fill_tensor(e: Emitter, x: Ref, dim: int, index: Ref, value: Ref) -> Ref:
    """The value of a rank-0 tensor in whole slices of an axis."""
    return _fill_slices(e, x, dim, index, e.cast(value, x.dtype))


def _fill_slices(e: Emitter, x: Ref, dim: int, index: Ref, value: Ref) -> Ref:
    axis = e.axis(dim, x.rank)
    shape = tuple(at_least_1d(e, index).shape[0] if i == axis else size for i, size in enumerate(x.shape))
    return write_along(e, x, dim, across(e, index, dim, shape), e.broadcast_to(value, shape))


@lowers(aten.put.default)
def put(e: Emitter, x: Ref, index: Ref, source: Ref, accumulate: bool = False) -> Ref:
    """Elements of source written into, or added to, the flattened tensor."""
    elements, index, source = (flat(e, side) for side in (x, index, source))
    return e.reshape(write_along(e, elements, 0, index, source, "add" if accumulate else "none"), x.shape)


@lowers(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(e: Emitter, x: Ref, indices: list[Ref | None], values: Ref, accumulate: bool = False) -> Ref:
    """x[i, :, j, ...] = values, or += values."""
    values = e.cast(values, x.dtype)
    given = [ref for ref in indices if ref is not None]
    if any(ref.dtype in MASKS for ref in given):
        return _put_where(e, x, indices, values, accumulate)
    places = Places.of(e, x, indices)
    target = permuted(e, x, places.order)
    shape = (*places.common, *target.shape[len(given) :])
    values = e.broadcast_to(values, tuple(shape[axis] for axis in places.to_result))
    values = permuted(e, values, [places.to_result.index(axis) for axis in range(len(shape))])
    reduction = "add" if accumulate else "none"
    written = _write(e, "tract_core_scatter_nd", target, places.table, values, reduction)
    return permuted(e, written, [places.order.index(axis) for axis in range(x.rank)])


def _put_where(e: Emitter, x: Ref, indices: list[Ref | None], values: Ref, accumulate: bool) -> Ref:
    """x[mask] = values that do not depend on how many elements the mask chooses."""
    axis, mask = next((axis, ref) for axis, ref in enumerate(indices) if ref is not None)
    if [ref for ref in indices if ref is not None] != [mask]:
        raise e.refuse("a mask among other indices; use torch.where")
    # The chosen elements are one axis of the values, of a size that depends on the data: only 1 or none fits here.
    chosen = x.rank - axis - mask.rank
    if values.rank > chosen:
        if values.rank > chosen + 1 or values.shape[0] != 1:
            raise e.refuse("a value for each chosen element: their number depends on the data; use torch.where")
        values = e.squeeze(values, [0])
    mask = mask if mask.dtype is torch.bool else e.binary("ne", mask, 0, mask.dtype, result=torch.bool)
    mask = e.unsqueeze(mask, [*range(axis), *range(axis + mask.rank, x.rank)])
    if accumulate:
        values = e.binary("or" if x.dtype is torch.bool else "add", x, values, x.dtype)
    return e.op("select", mask, e.lift(values, x.rank), x, out=x.shape, dtype=x.dtype)


@lowers(aten.masked_scatter.default)
def masked_scatter(e: Emitter, x: Ref, mask: Ref, source: Ref) -> Ref:
    """Elements of source, in their order, where mask."""
    mask, x = e.broadcast_to(mask, e.out.shape), e.broadcast_to(x, e.out.shape)
    taken = e.op("tract_core_cumsum", e.cast(flat(e, mask), torch.int64), axis=0, exclusive=True, reverse=False)
    # Behind the last chosen place the count may stand one beyond the end.
    source = flat(e, source)
    taken = e.binary("min", taken, source.shape[0] - 1, torch.int64)
    values = e.reshape(e.op("tract_core_gather", source, taken, out=taken.shape, axis=0), x.shape)
    return e.op("select", mask, values, x, out=x.shape, dtype=x.dtype)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    e: Emitter,
    x: Ref,
    src: Ref,
    dim: int = 0,
    start: Dim | None = None,
    end: Dim | None = None,
    step: int = 1,
) -> Ref:
    """x[start:end:step] = src on one axis; src is as long as the slice."""
    axis = dim % x.rank
    size, length = x.shape[axis], src.shape[axis]
    begin, _ = bounds(e, size, start, end, step, length)
    if step == 1:
        return _replaced(e, x, axis, begin, e.cast(src, x.dtype))
    places = e.arange(begin, step, length, torch.int64)
    return write_along(e, x, axis, across(e, places, axis, src.shape), e.cast(src, x.dtype))


@lowers(aten.select_scatter.default)
def select_scatter(e: Emitter, x: Ref, src: Ref, dim: int, index: Dim) -> Ref:
    """x[index] = src on one axis."""
    axis = dim % x.rank
    begin = x.shape[axis] + index if isinstance(index, int) and index < 0 else index
    return _replaced(e, x, axis, begin, e.unsqueeze(e.cast(src, x.dtype), [axis]))


def _replaced(e: Emitter, x: Ref, axis: int, begin: Dim, part: Ref) -> Ref:
    """`part` in the place of as many elements of one axis."""
    end = begin + part.shape[axis]
    rest = x.shape[axis] - end
    before = [] if begin == 0 else [e.slice(x, axis, 0, begin)]
    after = [] if rest == 0 else [e.slice(x, axis, end, rest)]
    return joined(e, [*before, part, *after], axis)
