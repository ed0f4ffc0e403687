"""Reductions. tract keeps reduced axes; they are squeezed away unless keepdim."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import Lowering, lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

_OVER_DIMS = {
    "mean_reduce": aten.mean.dim,
    "sum_reduce": aten.sum.dim_IntList,
    "max_reduce": aten.amax.default,
    "min_reduce": aten.amin.default,
}
_OVER_ALL = {
    "mean_reduce": aten.mean.default,
    "sum_reduce": aten.sum.default,
    "max_reduce": aten.max.default,
    "min_reduce": aten.min.default,
}
_LOGICAL = {"any_reduce": aten.any.dim, "all_reduce": aten.all.dim}
_ARG = {"argmax_reduce": aten.argmax.default, "argmin_reduce": aten.argmin.default}


def _reduce(
    e: Emitter, operator: str, x: Ref, dim: int | Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None = None
) -> Ref:
    dims = [dim] if isinstance(dim, int) else dim
    axes = sorted({d % x.rank for d in dims}) if dims else list(range(x.rank))
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    result = e.op(operator, x, out=shape, dtype=dtype, axes=axes)
    return result if keepdim else e.squeeze(result, axes)


def _over_dims(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: Sequence[int] | None = None, keepdim: bool = False) -> Ref:
        return _reduce(e, operator, e.cast(x, e.out.dtype), dim, keepdim)

    return lower


def _over_all(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        return _reduce(e, operator, e.cast(x, e.out.dtype), None, keepdim=False)

    return lower


def _logical(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int, keepdim: bool = False) -> Ref:
        flags = x if x.dtype is torch.bool else e.binary("ne", x, 0, x.dtype, result=torch.bool)
        return _reduce(e, operator, flags, dim, keepdim)

    return lower


def _arg(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int | None = None, keepdim: bool = False) -> Ref:
        if dim is None and x.rank > 1:
            raise e.refuse("over all axes at once; flatten first and give dim=0")
        return _reduce(e, operator, x, dim, keepdim, torch.int64)

    return lower


for _table, _make in ((_OVER_DIMS, _over_dims), (_OVER_ALL, _over_all), (_LOGICAL, _logical), (_ARG, _arg)):
    for _operator, _op in _table.items():
        lowers(_op)(_make(_operator))


@lowers(aten.var.correction)
def var(
    e: Emitter, x: Ref, dim: Sequence[int] | None = None, *, correction: Scalar | None = None, keepdim: bool = False
) -> Ref:
    """Mean squared deviation, times n / (n - correction) (Bessel's by default)."""
    axes = sorted({d % x.rank for d in dim}) if dim else list(range(x.rank))
    count = 1
    for axis in axes:
        size = x.shape[axis]
        if not isinstance(size, int):
            raise e.refuse("variance over a dynamic axis")
        count *= size
    mean = _reduce(e, "mean_reduce", x, axes, keepdim=True)
    result = _reduce(e, "mean_reduce", e.op("square", e.op("sub", x, mean, hint="centered")), axes, keepdim)
    correction = 1 if correction is None else correction
    return result if not correction else e.binary("mul", result, count / (count - correction), result.dtype)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(e: Emitter, x: Ref, ord: Scalar = 2, dim: Sequence[int] | None = None, keepdim: bool = False) -> Ref:
    """(sum |x|^ord)^(1 / ord) over axes; the largest magnitude for inf."""
    x = e.cast(x, e.out.dtype)
    if ord == 2:
        return e.op("sqrt", _reduce(e, "sum_reduce", e.op("square", x), dim, keepdim))
    if ord == 1:
        return _reduce(e, "sum_reduce", e.op("abs", x), dim, keepdim)
    if ord == math.inf:
        return _reduce(e, "max_reduce", e.op("abs", x), dim, keepdim)
    raise e.refuse(f"norm of order {ord}; 1, 2 and inf have a lowering")


@lowers(aten.prod.dim_int)
def prod(e: Emitter, x: Ref, dim: int, keepdim: bool = False) -> Ref:
    """Product along one axis."""
    return _reduce(e, "tract_core_product_reduce", e.cast(x, e.out.dtype), dim, keepdim)


def _with_index(operator: str, arg_operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int, keepdim: bool = False) -> list[Ref]:
        """The extreme along one axis, and the first place where it stands."""
        return [_reduce(e, operator, x, dim, keepdim), _reduce(e, arg_operator, x, dim, keepdim, torch.int64)]

    return lower


lowers(aten.max.dim)(_with_index("max_reduce", "argmax_reduce"))
lowers(aten.min.dim)(_with_index("min_reduce", "argmin_reduce"))


@lowers(aten.cumsum.default)
def cumsum(e: Emitter, x: Ref, dim: int) -> Ref:
    """Running sum along one axis."""
    return e.op("tract_core_cumsum", e.cast(x, e.out.dtype), axis=e.axis(dim), exclusive=False, reverse=False)


@lowers(aten.topk.default)
def topk(e: Emitter, x: Ref, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Ref]:
    """The k largest (or smallest) along one axis, in order, and their indices."""
    values, indices = e.node.outputs
    results = [(values.shape, values.dtype), (indices.shape, indices.dtype)]
    return e.ops("tract_core_topk", x, results=results, k=k, axis=dim % x.rank, largest=largest)


@lowers(aten.sort.default)
def sort(e: Emitter, x: Ref, dim: int = -1, descending: bool = False) -> list[Ref]:
    """All along one axis in order, and their indices; the order of equal elements is not said."""
    return topk(e, x, x.shape[dim % x.rank], dim, largest=descending)
