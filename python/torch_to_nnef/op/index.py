"""Looking up: embeddings, gathers and advanced indexing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim, Shape, Value
from torch_to_nnef.op.emitter import Emitter, broadcast
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

MASKS = (torch.bool, torch.uint8)


def rows(e: Emitter, weight: Ref, indices: Ref) -> Ref:
    """Rows of a weight (V, D), packed or not, at `indices`."""
    width = weight.shape[-1]
    weight, zeros = e.with_padding(weight)
    if e.is_laid_out_each_run(weight) and width > 1:
        halves = [e.slice(weight, 1, start, stop - start) for start, stop in pairwise((0, width // 2, width))]
        shape = (*indices.shape, width)
        return e.op(
            "concat", [rows(e, half, indices) for half in halves], out=shape, dtype=weight.dtype, axis=indices.rank
        )
    # tract has to be told the dtype of what comes out of packed blocks.
    unpacked: dict[str, Any] = {"datum_type": "f32", "dtype": torch.float32} if e.is_quantized(weight) else {}
    shape = (*indices.shape, *weight.shape[1:])
    found = e.op("tract_core_gather", weight, indices, out=shape, axis=0, **unpacked)
    if zeros:
        # No slice: tract 0.23.9 moves that in front of the gather, and panics on packed rows (optim/slice.rs).
        columns = e.constant(torch.arange(width), "columns")
        found = e.op("tract_core_gather", found, columns, out=(*indices.shape, width), axis=indices.rank)
    return e.cast(found, weight.dtype)


@lowers(aten.embedding.default)
def embedding(e: Emitter, weight: Ref, indices: Ref, padding_idx: int = -1) -> Ref:
    """Rows of weight (V, D); ids must lie in [0, V), as torch wants too."""
    return e.cast(rows(e, weight, indices), e.out.dtype)


@lowers(aten.index_select.default)
def index_select(e: Emitter, x: Ref, dim: int, index: Ref) -> Ref:
    """Slices of one axis."""
    if not x.rank:
        return x
    return e.op("tract_core_gather", x, at_least_1d(e, index), out=e.out.shape, axis=dim % x.rank)


@lowers(aten.flip.default)
def flip(e: Emitter, x: Ref, dims: Sequence[int]) -> Ref:
    """Axes read backwards."""
    for axis in sorted({d % x.rank for d in dims} if x.rank else ()):
        positions = e.arange(0, 1, x.shape[axis], torch.int64)
        backwards = e.binary("sub", x.shape[axis] - 1, positions, torch.int64)
        x = e.op("tract_core_gather", x, backwards, out=x.shape, axis=axis)
    return x


@lowers(aten.gather.default)
def gather(e: Emitter, x: Ref, dim: int, index: Ref) -> Ref:
    """x[..., index[...], ...] along one axis; index may be shorter on the others."""
    sides = [at_least_1d(e, side) for side in (x, index)]
    shape = sides[1].shape
    return e.reshape(e.op("tract_core_gather_elements", *sides, out=shape, axis=e.axis(dim, x.rank)), e.out.shape)


@lowers(aten.take_along_dim.default)
def take_along_dim(e: Emitter, x: Ref, indices: Ref, dim: int | None = None) -> Ref:
    """x[..., indices[...], ...] along one axis, both broadcast on the others; without dim, of the flattened tensors."""
    if dim is None:
        return e.op("tract_core_gather", flat(e, x), flat(e, indices), out=e.out.shape, axis=0)
    axis, rank = e.axis(dim, x.rank), max(x.rank, indices.rank)
    x, indices = e.lift(x, rank), e.lift(indices, rank)
    x = e.broadcast_to(x, (*e.out.shape[:axis], x.shape[axis], *e.out.shape[axis + 1 :]))
    return e.op("tract_core_gather_elements", x, e.broadcast_to(indices, e.out.shape), out=e.out.shape, axis=axis)


@lowers(aten.take.default)
def take(e: Emitter, x: Ref, index: Ref) -> Ref:
    """Elements of the flattened tensor."""
    return e.op("tract_core_gather", flat(e, x), index, out=e.out.shape, axis=0)


@lowers(aten.index.Tensor)
def index(e: Emitter, x: Ref, indices: list[Ref | None]) -> Ref:
    """x[i, :, j, ...]: tensors on any axes, broadcast together; negative indices count from the end."""
    given = [(axis, ref) for axis, ref in enumerate(indices) if ref is not None]
    if any(ref.dtype in MASKS for _, ref in given):
        raise e.refuse("indexing by a boolean mask gives a size that depends on the data; use torch.where")
    if len(given) == 1:
        axis, ref = given[0]
        return e.op("tract_core_gather", x, ref, out=e.out.shape, axis=axis)
    places = Places.of(e, x, indices)
    found = e.op(
        "tract_core_gather_nd",
        permuted(e, x, places.order),
        places.table,
        out=(*places.common, *(x.shape[axis] for axis in places.order[len(given) :])),
        batch_dims=0,
    )
    return permuted(e, found, places.to_result)


@dataclass(frozen=True, slots=True)
class Places:
    """Where index tensors point: `table[..., n]` holds a coordinate for each of the n first axes of `order`.

    `order` has the axes of the indexed tensor, indexed ones first; `common` is the shape of the indices, broadcast. `to_result` permutes
    (common, other axes) to torch's result: indices on neighbouring axes leave their dimensions there, else in front.
    """

    order: list[int]
    table: Ref
    common: Shape
    to_result: list[int]

    @classmethod
    def of(cls, e: Emitter, x: Ref, indices: Sequence[Ref | None]) -> Places:
        """Read the `indices` argument of the node."""
        values: list[Value | None] = list(e.node.args[1])
        given = [axis for axis, ref in enumerate(indices) if ref is not None]
        wrapped = [_wrap(e, ref, values[i], x.shape[i]) for i, ref in enumerate(indices) if ref is not None]
        rank = max(ref.rank for ref in wrapped)
        lifted = [e.lift(ref, rank) for ref in wrapped]
        common = broadcast([ref.shape for ref in lifted])
        columns = [e.unsqueeze(e.broadcast_to(ref, common), [rank]) for ref in lifted]
        table = e.op("concat", columns, out=(*common, len(columns)), dtype=torch.int64, hint="indices", axis=rank)
        first = given[0] if given == list(range(given[0], given[0] + len(given))) else 0
        others = [axis for axis in range(x.rank) if axis not in given]
        tail = range(rank + first, rank + len(others))
        return cls([*given, *others], table, common, [*range(rank, rank + first), *range(rank), *tail])


def _wrap(e: Emitter, ref: Ref, value: Value | None, size: Dim) -> Ref:
    """Indices in [0, size): tract takes a table of coordinates as it is."""
    ref = e.cast(ref, torch.int64)
    if value is None or e.is_non_negative(value):
        return ref
    from_end = e.binary("add", ref, size, torch.int64)
    negative = e.binary("lt", ref, 0, torch.int64, result=torch.bool)
    return e.op("select", negative, from_end, ref, out=ref.shape, dtype=torch.int64, hint="wrapped")


def permuted(e: Emitter, x: Ref, order: Sequence[int]) -> Ref:
    """Axes in another order."""
    if list(order) == list(range(x.rank)):
        return x
    return e.op("transpose", x, out=tuple(x.shape[axis] for axis in order), axes=list(order))


def at_least_1d(e: Emitter, x: Ref) -> Ref:
    """A scalar as one element."""
    return x if x.rank else e.unsqueeze(x, [0])


def flat(e: Emitter, x: Ref) -> Ref:
    """All elements in one axis."""
    return e.reshape(x, (math.prod(x.shape),))
