"""Distances between all rows of two matrices, or of one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# torch multiplies matrices for Euclidean distances of more rows than this, unless compute_mode forbids or demands it.
_ROWS = 25
_ALWAYS, _NEVER = 1, 2


@lowers(aten.cdist.default)
def cdist(e: Emitter, x1: Ref, x2: Ref, p: float = 2.0, compute_mode: int | None = None) -> Ref:
    """The p-norm of x1[.., i, :] - x2[.., j, :] for all i, j; Euclidean ones of many rows from the product, as torch does."""
    rows = [x.shape[-2] for x in (x1, x2)]
    many = any(isinstance(n, int) and n > _ROWS for n in rows)
    if p == 2 and (compute_mode == _ALWAYS or (compute_mode != _NEVER and many)):
        return _euclidean(e, x1, x2)
    rank = len(e.out.shape) + 1
    left, right = e.unsqueeze(x1, [x1.rank - 1]), e.unsqueeze(x2, [x2.rank - 2])
    difference = e.op("sub", e.lift(left, rank), e.lift(right, rank))
    return _norm(e, difference, p)


@lowers(aten._cdist_forward.default)
def cdist_forward(e: Emitter, x1: Ref, x2: Ref, p: float, compute_mode: int | None) -> Ref:
    """What cdist is decomposed to."""
    return cdist(e, x1, x2, p, compute_mode)


@lowers(aten.pdist.default, aten._pdist_forward.default)
def pdist(e: Emitter, x: Ref, p: float = 2.0) -> Ref:
    """The p-norm of x[i] - x[j] for i < j."""
    rows = x.shape[0]
    if not isinstance(rows, int):
        raise e.refuse("the number of rows is dynamic; use cdist and torch.triu")
    pairs = torch.triu_indices(rows, rows, 1)
    sides = [
        e.op("tract_core_gather", x, e.constant(side.contiguous(), "rows"), out=(len(side), x.shape[1]), axis=0)
        for side in pairs
    ]
    return _norm(e, e.op("sub", *sides), p)


def _euclidean(e: Emitter, x1: Ref, x2: Ref) -> Ref:
    """sqrt(|a|^2 - 2 a.b + |b|^2)."""
    rank = len(e.out.shape)
    left, right = e.lift(x1, rank), e.lift(x2, rank)
    squares = [
        e.op("sum_reduce", e.op("square", side), out=(*side.shape[:-1], 1), axes=[rank - 1]) for side in (left, right)
    ]
    order = [*range(rank - 2), rank - 1, rank - 2]
    across = e.op("transpose", squares[1], out=(*right.shape[:-2], 1, right.shape[-2]), axes=order)
    product = e.op("matmul", left, right, out=e.out.shape, transposeB=True)
    total = e.op("add", e.op("sub", squares[0], e.binary("mul", product, 2.0, product.dtype)), across)
    return e.op("sqrt", e.binary("max", total, 0.0, total.dtype))


def _norm(e: Emitter, x: Ref, p: float) -> Ref:
    """The p-norm over the last axis."""

    def reduced(operator: str, values: Ref) -> Ref:
        last = values.rank - 1
        return e.squeeze(e.op(operator, values, out=(*values.shape[:-1], 1), axes=[last]), [last])

    def general() -> Ref:
        powers = e.binary("pow", e.op("abs", x), p, x.dtype)
        return e.binary("pow", reduced("sum_reduce", powers), 1 / p, x.dtype)

    special: dict[float, Callable[[], Ref]] = {
        0.0: lambda: reduced("sum_reduce", e.cast(e.binary("ne", x, 0.0, x.dtype, torch.bool), x.dtype)),
        1.0: lambda: reduced("sum_reduce", e.op("abs", x)),
        2.0: lambda: e.op("sqrt", reduced("sum_reduce", e.op("square", x))),
        math.inf: lambda: reduced("max_reduce", e.op("abs", x)),
    }
    return special.get(p, general)()
