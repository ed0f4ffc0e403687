"""Elements at regular distances in memory: diagonals and strides, as places in a flattened tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_to_nnef.graph.ir import Dim, Value
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.index import flat, permuted
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.scatter import across, write_along
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(e: Emitter, x: Ref, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Ref:
    """x[..., i, i + offset] of two axes, as the last axis."""
    matrices, _, places = _diagonals(e, x, offset, dim1, dim2, e.out.shape[-1])
    return e.op("tract_core_gather", matrices, places, out=e.out.shape, axis=matrices.rank - 1)


@lowers(aten.diagonal_scatter.default)
def diagonal_scatter(e: Emitter, x: Ref, src: Ref, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Ref:
    """x[..., i, i + offset] = src."""
    matrices, order, places = _diagonals(e, x, offset, dim1, dim2, src.shape[-1])
    written = write_along(e, matrices, -1, across(e, places, -1, src.shape), e.cast(src, x.dtype))
    written = e.reshape(written, tuple(x.shape[axis] for axis in order))
    return permuted(e, written, [order.index(axis) for axis in range(x.rank)])


def _diagonals(e: Emitter, x: Ref, offset: int, dim1: int, dim2: int, length: Dim) -> tuple[Ref, list[int], Ref]:
    """`x` with its two axes flattened into the last, the order of axes for that, and the places of the diagonal there."""
    rows, columns = dim1 % x.rank, dim2 % x.rank
    order = [*(axis for axis in range(x.rank) if axis not in (rows, columns)), rows, columns]
    width = x.shape[columns]
    start = offset if offset >= 0 else -offset * width
    places = e.arange(start, width + 1, length, torch.int64)
    x = permuted(e, x, order)
    return e.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1])), order, places


@lowers(aten.diag_embed.default)
def diag_embed(e: Emitter, x: Ref, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Ref:
    """Matrices with the last axis of `x` on a diagonal, zero elsewhere."""
    size = x.shape[-1] + abs(offset)
    matrices = (*x.shape[:-1], size * size)
    places = e.arange(offset if offset >= 0 else -offset * size, size + 1, x.shape[-1], torch.int64)
    zeros = e.broadcast_to(e.full(0), matrices)
    written = e.reshape(write_along(e, zeros, -1, across(e, places, -1, x.shape), x), (*x.shape[:-1], size, size))
    rank = written.rank
    order = list(range(rank - 2))
    for axis, source in sorted([(dim1 % rank, rank - 2), (dim2 % rank, rank - 1)]):
        order.insert(axis, source)
    return permuted(e, written, order)


@lowers(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(
    e: Emitter, x: Ref, size: Sequence[Dim], stride: Sequence[Dim], storage_offset: int | None = None
) -> Ref:
    """Elements at offset + strides * positions."""
    places = _strided(e, x, size, stride, storage_offset or 0)
    return e.op("tract_core_gather", flat(e, x), places, out=e.out.shape, axis=0)


@lowers(aten.as_strided_scatter.default)
def as_strided_scatter(
    e: Emitter, x: Ref, src: Ref, size: Sequence[Dim], stride: Sequence[Dim], storage_offset: int | None = None
) -> Ref:
    """`src` written at offset + strides * positions."""
    places = _strided(e, x, size, stride, storage_offset or 0)
    return e.reshape(write_along(e, flat(e, x), 0, flat(e, places), flat(e, e.cast(src, x.dtype))), x.shape)


def _strided(e: Emitter, x: Ref, size: Sequence[Dim], stride: Sequence[Dim], offset: int) -> Ref:
    value: Value = e.node.args[0]
    if not value.dense:
        raise e.refuse("strides over the storage of a view, which has no meaning in a graph; call contiguous() first")
    reach = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    elements = math.prod(x.shape)
    if isinstance(reach, int) and isinstance(elements, int) and reach >= elements:
        raise e.refuse(f"strides that reach element {reach} of {elements}")
    places = e.full(offset, torch.int64)
    for axis, (count, step) in enumerate(zip(size, stride, strict=True)):
        steps = e.arange(0 if axis else offset, step, count, torch.int64)
        steps = e.unsqueeze(steps, [i for i in range(len(size)) if i != axis])
        places = e.binary("add", places, steps, torch.int64) if axis else steps
    return places
