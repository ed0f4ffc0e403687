"""Reductions. tract keeps reduced axes; they are squeezed away unless keepdim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.elementwise import compare, select
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref, Result

aten = torch.ops.aten

Dims: TypeAlias = int | Sequence[int] | None

# NNEF operator -> ATen ops over given axes, and the one over all.
_TOTALS = {
    "mean_reduce": ([aten.mean.dim], aten.mean.default),
    "sum_reduce": ([aten.sum.dim_IntList], aten.sum.default),
    "tract_core_product_reduce": ([aten.prod.dim_int], aten.prod.default),
}
_EXTREMES = {
    "max_reduce": ([aten.amax.default], aten.max.default),
    "min_reduce": ([aten.amin.default], aten.min.default),
}
_LOGICAL = {
    "any_reduce": ([aten.any.dim, aten.any.dims], aten.any.default),
    "all_reduce": ([aten.all.dim, aten.all.dims], aten.all.default),
}
_ARG = {"argmax": aten.argmax.default, "argmin": aten.argmin.default}
_OF_BOOLEANS = {"max_reduce": "any_reduce", "min_reduce": "all_reduce"}


def axes_of(dim: Dims, rank: int) -> list[int]:
    """Axes from the front in order; no dim means all."""
    dims = [dim] if isinstance(dim, int) else dim
    if not rank:
        return []
    return sorted({d % rank for d in dims}) if dims else list(range(rank))


def reduced(e: Emitter, operator: str, x: Ref, dim: Dims, keepdim: bool, dtype: torch.dtype | None = None) -> Ref:
    """`operator` over axes, which are kept as units or not."""
    axes = axes_of(dim, x.rank)
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    result = e.op(operator, x, out=shape, dtype=dtype, axes=axes) if axes else x
    return result if keepdim else e.squeeze(result, axes)


def total(e: Emitter, operator: str, x: Ref, dim: Dims, keepdim: bool) -> Ref:
    """A sum, mean or product as torch computes it: f16 in f32, integers exactly, in the output's dtype."""
    dtype = e.out.dtype
    if dtype is torch.float16:
        return e.cast(reduced(e, operator, e.cast(x, torch.float32), dim, keepdim), dtype)
    if operator == "sum_reduce" and not dtype.is_floating_point and x.dtype is not torch.bool:
        return _integer_sum(e, e.cast(x, dtype), dim, keepdim)
    return reduced(e, operator, e.cast(x, dtype), dim, keepdim)


def _integer_sum(e: Emitter, x: Ref, dim: Dims, keepdim: bool) -> Ref:
    """The last of running sums: tract's own sum of integers counts in 32 bits."""
    axes = axes_of(dim, x.rank)
    for axis in axes:
        sums = e.op("tract_core_cumsum", x, axis=axis, exclusive=False, reverse=False)
        x = e.slice(sums, axis, x.shape[axis] - 1, 1)
    return x if keepdim else e.squeeze(x, axes)


def truth(e: Emitter, x: Ref) -> Ref:
    """Whether not zero."""
    return x if x.dtype is torch.bool else compare(e, "ne", x, 0)


def extreme(e: Emitter, operator: str, x: Ref, dim: Dims, keepdim: bool) -> Ref:
    """The largest or smallest."""
    if x.dtype is torch.bool:
        return reduced(e, _OF_BOOLEANS[operator], x, dim, keepdim)
    return reduced(e, f"t2n_{operator}" if x.dtype.is_floating_point else operator, x, dim, keepdim)


def _total(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: Dims = None, keepdim: bool = False) -> Ref:
        return total(e, operator, x, dim, keepdim)

    return lower


def _extreme(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: Dims = None, keepdim: bool = False) -> Ref:
        return extreme(e, operator, x, dim, keepdim)

    return lower


def _logical(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: Dims = None, keepdim: bool = False) -> Ref:
        return e.cast(reduced(e, operator, truth(e, x), dim, keepdim), e.out.dtype)

    return lower


def _over_all(along: Lowering) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Result:
        return along(e, x)

    return lower


def arg(e: Emitter, operator: str, x: Ref, dim: int | None, keepdim: bool) -> Ref:
    """Index of the first extreme, along one axis or of the flattened tensor."""
    operator = f"t2n_{operator}" if x.dtype.is_floating_point else f"{operator}_reduce"
    if not x.rank:
        return e.full(0, torch.int64)
    if dim is not None:
        return reduced(e, operator, x, dim, keepdim, torch.int64)
    place = reduced(e, operator, e.reshape(x, (math.prod(x.shape),)), 0, keepdim, torch.int64)
    return e.reshape(place, (1,) * x.rank) if keepdim else place


def _arg(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int | None = None, keepdim: bool = False) -> Ref:
        return arg(e, operator, x, dim, keepdim)

    return lower


for _table, _make in ((_TOTALS, _total), (_EXTREMES, _extreme), (_LOGICAL, _logical)):
    for _operator, (_over_axes, _op) in _table.items():
        lowers(*_over_axes)(_make(_operator))
        lowers(_op)(_over_all(_make(_operator)))
for _operator, _op in _ARG.items():
    lowers(_op)(_arg(_operator))


def _with_index(operator: str, arg_operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int, keepdim: bool = False) -> list[Ref]:
        """The extreme along one axis, and the first place where it stands."""
        places = e.cast(x, torch.uint8) if x.dtype is torch.bool else x  # tract orders no booleans
        return [extreme(e, operator, x, dim, keepdim), arg(e, arg_operator, places, dim, keepdim)]

    return lower


lowers(aten.max.dim)(_with_index("max_reduce", "argmax"))
lowers(aten.min.dim)(_with_index("min_reduce", "argmin"))


@lowers(aten.aminmax.default)
def aminmax(e: Emitter, x: Ref, dim: int | None = None, keepdim: bool = False) -> list[Ref]:
    """The smallest and the largest."""
    return [extreme(e, operator, x, dim, keepdim) for operator in ("min_reduce", "max_reduce")]


@lowers(aten.count_nonzero.dim_IntList)
def count_nonzero(e: Emitter, x: Ref, dim: Dims = None) -> Ref:
    """How many are not zero."""
    return total(e, "sum_reduce", truth(e, x), dim, keepdim=False)


@lowers(aten.count_nonzero.default)
def count_nonzero_along(e: Emitter, x: Ref, dim: int | None = None) -> Ref:
    """How many are not zero, along one axis or in all."""
    return count_nonzero(e, x, dim)


@lowers(aten.nansum.default)
def nansum(e: Emitter, x: Ref, dim: Dims = None, keepdim: bool = False) -> Ref:
    """The sum of those that are numbers."""
    numbers = select(e, e.op("ne", x, x, dtype=torch.bool), 0, x) if x.dtype.is_floating_point else x
    return total(e, "sum_reduce", numbers, dim, keepdim)


@lowers(aten.var.correction)
def var(e: Emitter, x: Ref, dim: Dims = None, *, correction: Scalar | None = None, keepdim: bool = False) -> Ref:
    """Squared deviation over n - correction (1 unless given)."""
    return _moments(e, x, dim, correction, keepdim)[0]


@lowers(aten.std.correction)
def std(e: Emitter, x: Ref, dim: Dims = None, *, correction: Scalar | None = None, keepdim: bool = False) -> Ref:
    """Square root of the variance."""
    return e.op("sqrt", var(e, x, dim, correction=correction, keepdim=keepdim))


@lowers(aten.var_mean.correction)
def var_mean(
    e: Emitter, x: Ref, dim: Dims = None, *, correction: Scalar | None = None, keepdim: bool = False
) -> list[Ref]:
    """Variance and mean."""
    return _moments(e, x, dim, correction, keepdim)


@lowers(aten.std_mean.correction)
def std_mean(
    e: Emitter, x: Ref, dim: Dims = None, *, correction: Scalar | None = None, keepdim: bool = False
) -> list[Ref]:
    """Standard deviation and mean."""
    variance, mean = _moments(e, x, dim, correction, keepdim)
    return [e.op("sqrt", variance), mean]


def _moments(e: Emitter, x: Ref, dim: Dims, correction: Scalar | None, keepdim: bool) -> list[Ref]:
    """Variance and mean, in f32 where they are f16."""
    x = e.cast(x, torch.promote_types(x.dtype, torch.float32))
    axes = axes_of(dim, x.rank)
    mean = reduced(e, "mean_reduce", x, axes, keepdim=True)
    squares = e.op("square", e.op("sub", x, mean, hint="centered"))
    variance = _over_freedom(e, squares, axes, 1 if correction is None else correction, keepdim)
    return [e.cast(result, e.out.dtype) for result in (variance, mean if keepdim else e.squeeze(mean, axes))]


def _over_freedom(e: Emitter, squares: Ref, axes: list[int], correction: Scalar, keepdim: bool) -> Ref:
    count: Dim = math.prod(squares.shape[axis] for axis in axes)
    if not correction:
        return reduced(e, "mean_reduce", squares, axes, keepdim)
    summed = reduced(e, "sum_reduce", squares, axes, keepdim)
    if isinstance(count, int):
        freedom = max(count - correction, 0)
        return e.binary("mul", summed, 1 / freedom if freedom else math.inf, summed.dtype)
    left = e.op("sub", e.scalar(count, summed.dtype), float(correction), hint="freedom")
    return e.binary("div", summed, e.op("max", left, 0.0), summed.dtype)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(e: Emitter, x: Ref, ord: Scalar = 2, dim: Dims = None, keepdim: bool = False) -> Ref:
    """(sum |x|^ord)^(1 / ord) over axes; the extreme magnitude for inf and -inf, how many are not zero for 0."""
    return e.cast(_norm(e, e.cast(x, torch.promote_types(e.out.dtype, torch.float32)), ord, dim, keepdim), e.out.dtype)


@lowers(aten.norm.Scalar)
def norm_of_all(e: Emitter, x: Ref, p: Scalar = 2) -> Ref:
    """The vector norm of all elements."""
    return vector_norm(e, x, p)


@lowers(aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype)
def norm(e: Emitter, x: Ref, p: Scalar | None = 2, dim: Dims = None, keepdim: bool = False) -> Ref:
    """The vector norm over axes."""
    return vector_norm(e, x, 2 if p is None else p, dim, keepdim)


@lowers(aten.dist.default)
def dist(e: Emitter, x: Ref, other: Ref, p: Scalar = 2) -> Ref:
    """The vector norm of the difference."""
    return vector_norm(e, e.binary("sub", x, other, e.out.dtype), p)


def _norm(e: Emitter, x: Ref, order: Scalar, dim: Dims, keepdim: bool) -> Ref:
    magnitude = e.op("abs", x)
    if math.isinf(order):
        return extreme(e, "max_reduce" if order > 0 else "min_reduce", magnitude, dim, keepdim)
    if order == 0:
        return reduced(e, "sum_reduce", e.cast(compare(e, "ne", x, 0), x.dtype), dim, keepdim)
    if order == 1:
        return reduced(e, "sum_reduce", magnitude, dim, keepdim)
    if order == 2:
        return e.op("sqrt", reduced(e, "sum_reduce", e.op("square", x), dim, keepdim))
    powers = reduced(e, "sum_reduce", e.binary("pow", magnitude, order, x.dtype), dim, keepdim)
    return e.binary("pow", powers, 1 / order, x.dtype)


@lowers(aten.logsumexp.default)
def logsumexp(e: Emitter, x: Ref, dim: Dims, keepdim: bool = False) -> Ref:
    """log(sum(exp(x))) over axes, from the largest, which may be infinite."""
    x = e.cast(x, torch.promote_types(e.out.dtype, torch.float32))
    axes = axes_of(dim, x.rank)
    largest = reduced(e, "max_reduce", x, axes, keepdim=True)
    # An infinite one cannot be subtracted from itself: exp of it is right as it is.
    origin = e.binary("max", e.binary("min", largest, 3e38, x.dtype), -3e38, x.dtype)
    summed = reduced(e, "sum_reduce", e.op("exp", e.op("sub", x, origin)), axes, keepdim=True)
    result = e.op("add", e.op("log", summed), origin)
    return e.cast(result if keepdim else e.squeeze(result, axes), e.out.dtype)
