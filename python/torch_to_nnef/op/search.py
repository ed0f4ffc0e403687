"""Finding values among others by comparing with each, and sums over bags of embeddings."""

from __future__ import annotations

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.index import flat, rows
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.scatter import across, write_along
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

_SUM, _MEAN, _MAX = range(3)  # the modes of embedding_bag


@lowers(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(
    e: Emitter,
    sorted_sequence: Ref,
    x: Ref | Scalar,
    right: bool = False,
    side: str | None = None,
    sorter: Ref | None = None,
) -> Ref:
    """How many of a sorted sequence are smaller than each value; with `right`, or equal."""
    if sorter is not None:
        axis = sorted_sequence.rank - 1
        sorted_sequence = e.op("tract_core_gather_elements", sorted_sequence, sorter, out=sorter.shape, axis=axis)
    if sorted_sequence.rank > 1 and isinstance(x, Ref):
        sorted_sequence = e.unsqueeze(sorted_sequence, [sorted_sequence.rank - 1])
    return _count_below(e, sorted_sequence, x, right or side == "right")


@lowers(aten.bucketize.Tensor)
def bucketize(e: Emitter, x: Ref, boundaries: Ref, right: bool = False) -> Ref:
    """How many boundaries are smaller than each value; with `right`, or equal."""
    return _count_below(e, boundaries, x, right)


@lowers(aten.bucketize.Scalar)
def bucketize_scalar(e: Emitter, x: Scalar, boundaries: Ref, right: bool = False) -> Ref:
    """How many boundaries are smaller than a number; with `right`, or equal."""
    return _count_below(e, boundaries, x, right)


def _count_below(e: Emitter, sequence: Ref, values: Ref | Scalar, or_equal: bool) -> Ref:
    """Over the last axis of `sequence`. What is not greater counts, and so does all below not-a-number, as in torch."""
    if isinstance(values, Ref):
        values = e.unsqueeze(values, [values.rank])
        dtype = torch.promote_types(sequence.dtype, values.dtype)
    else:
        dtype = torch.result_type(torch.empty(1, dtype=sequence.dtype), values)
    greater = e.binary("gt" if or_equal else "ge", sequence, values, dtype, result=torch.bool)
    below = e.cast(e.op("not", greater), e.out.dtype)
    axis = below.rank - 1
    return e.squeeze(e.op("sum_reduce", below, out=(*below.shape[:-1], 1), axes=[axis]), [axis])


@lowers(aten.nonzero_static.default)
def nonzero_static(e: Emitter, x: Ref, fill_value: int = -1) -> Ref:
    """Coordinates of the first elements that are not zero, as many as asked for; `fill_value` where there are no more."""
    size, axes = e.out.shape
    if not axes:
        raise e.refuse("coordinates in a tensor of rank 0; unsqueeze it first")
    flags = flat(e, x if x.dtype is torch.bool else e.binary("ne", x, 0, x.dtype, result=torch.bool))
    turn = e.op("tract_core_cumsum", e.cast(flags, torch.int64), axis=0, exclusive=True, reverse=False)
    # Whose turn does not come is written behind the end, and cut.
    turn, behind = e.binary("min", turn, size, torch.int64), e.unsqueeze(e.full(size), [0])
    turn = e.op("select", flags, turn, behind, out=turn.shape, dtype=torch.int64)
    none = e.broadcast_to(e.full(-1), (size + 1,))
    places = write_along(e, none, 0, turn, e.arange(0, 1, flags.shape[0], torch.int64))
    places, columns = e.slice(places, 0, 0, size), list[Ref]()
    found = e.binary("ge", places, 0, torch.int64, result=torch.bool)
    for length in reversed(x.shape):
        rest = e.binary("div", places, length, torch.int64)
        column = e.binary("sub", places, e.binary("mul", rest, length, torch.int64), torch.int64)
        columns.insert(
            0, e.op("select", found, column, e.unsqueeze(e.full(fill_value), [0]), out=(size,), dtype=torch.int64)
        )
        places = rest
    return e.op("stack", columns, out=e.out.shape, dtype=torch.int64, axis=1)


@lowers(aten.repeat_interleave.Tensor)
def repeat_interleave(e: Emitter, repeats: Ref, output_size: Dim | None = None) -> Ref:
    """Each position as often as `repeats` says, for a length that is known."""
    counts = e.cast(repeats, torch.int64)
    ends = e.op("tract_core_cumsum", counts, axis=0, exclusive=False, reverse=False)
    return e.cast(_count_below(e, ends, e.arange(0, 1, e.out.shape[0], torch.int64), True), e.out.dtype)


@lowers(aten.isin.Tensor_Tensor)
def isin(e: Emitter, elements: Ref, test_elements: Ref, assume_unique: bool = False, invert: bool = False) -> Ref:
    """Whether each element is one of the tested."""
    dtype = torch.promote_types(elements.dtype, test_elements.dtype)
    each = e.unsqueeze(elements, [elements.rank])
    same = e.binary("eq", each, flat(e, test_elements), dtype, result=torch.bool)
    found = e.op("any_reduce", same, out=(*same.shape[:-1], 1), axes=[elements.rank])
    found = e.squeeze(found, [elements.rank])
    return e.op("not", found) if invert else found


@lowers(aten.isin.Tensor_Scalar)
def isin_scalar(
    e: Emitter, elements: Ref, test_element: Scalar, assume_unique: bool = False, invert: bool = False
) -> Ref:
    """Whether each element is a number."""
    dtype = torch.result_type(torch.empty(1, dtype=elements.dtype), test_element)
    return e.binary("ne" if invert else "eq", elements, test_element, dtype, result=torch.bool)


@lowers(aten.embedding_bag.padding_idx, aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(
    e: Emitter,
    weight: Ref,
    indices: Ref,
    offsets: Ref,
    mode: int = _SUM,
    per_sample_weights: Ref | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[Ref]:
    """Rows of a weight summed, averaged or maximized over bags; bag i begins at offsets[i]. The first result only."""
    bags, width = e.out.shape
    count = indices.shape[0]
    # torch sums half floats as floats, and rounds once.
    dtype = torch.float32 if weight.dtype is torch.float16 else weight.dtype
    values = e.cast(rows(e, weight, indices), dtype)
    if per_sample_weights is not None:
        values = e.op("mul", values, e.unsqueeze(e.cast(per_sample_weights, dtype), [1]), out=values.shape)
    starts = e.slice(offsets, 0, 0, bags) if include_last_offset else offsets
    begun = e.binary(
        "le",
        e.unsqueeze(e.cast(starts, torch.int64), [1]),
        e.arange(0, 1, count, torch.int64),
        torch.int64,
        result=torch.bool,
    )
    begun = e.op("sum_reduce", e.cast(begun, torch.int64), out=(1, count), axes=[0])
    bag = e.binary("sub", e.squeeze(begun, [0]), 1, torch.int64)
    neutral = float("-inf") if mode == _MAX else 0.0
    ones = e.broadcast_to(e.full(1.0, dtype), (count,))
    if padding_idx is not None and e.node.target is aten.embedding_bag.padding_idx:
        padding_idx %= weight.shape[0]  # in the inner operators -1 means none
    if padding_idx is not None and padding_idx >= 0:
        kept = e.binary("ne", indices, padding_idx, indices.dtype, result=torch.bool)
        ones = e.cast(kept, dtype)
        nothing = e.unsqueeze(e.full(neutral, dtype), [0, 1])
        values = e.op("select", e.unsqueeze(kept, [1]), values, nothing, out=values.shape, dtype=dtype)
    into = e.broadcast_to(e.full(neutral, dtype), (bags, width))
    places = across(e, bag, 0, values.shape)
    result = write_along(e, into, 0, places, values, "max" if mode == _MAX else "add")
    if mode != _SUM:
        sizes = write_along(e, e.broadcast_to(e.full(0.0, dtype), (bags,)), 0, bag, ones, "add")
        sizes = e.unsqueeze(sizes, [1])
        if mode == _MEAN:
            result = e.op("div", result, e.binary("max", sizes, 1, dtype), out=result.shape)
        else:
            empty = e.binary("eq", sizes, 0, dtype, result=torch.bool)
            zero = e.unsqueeze(e.full(0.0, dtype), [0, 1])
            result = e.op("select", empty, zero, result, out=result.shape, dtype=dtype)
    return [e.cast(result, weight.dtype)]
