"""Complex numbers: their parts, arithmetic and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.complex_layout import as_complex, join, lowers_complex, part, promote, real_layout
from torch_to_nnef.op.emitter import Emitter, Scalar, broadcast
from torch_to_nnef.op.registry import OPS, lowers
from torch_to_nnef.op.statement import Lowering, Ref

aten = torch.ops.aten
Number: TypeAlias = Ref | Scalar | complex | Dim

# -- what changes the type


_SAME = (aten.conj.default, aten._conj.default, aten._conj_physical.default, aten.conj_physical.default)


@lowers(aten.real.default, aten.resolve_conj.default, aten.resolve_neg.default, *_SAME)
@lowers_complex(aten.resolve_conj.default, aten.resolve_neg.default)
def same(e: Emitter, x: Ref) -> Ref:
    """The values themselves: an archive has no bit that says conjugate or negative."""
    return x


@lowers(aten._neg_view.default)
def neg_view(e: Emitter, x: Ref) -> Ref:
    """The values, which torch marks to be negated when read."""
    return e.op("neg", x)


@lowers_complex(aten.view_as_real.default)
def view_as_real(e: Emitter, x: Ref) -> Ref:
    """The layout as it is."""
    return real_layout(x)


@lowers_complex(aten.view_as_complex.default)
def view_as_complex(e: Emitter, x: Ref) -> Ref:
    """The layout as it is."""
    return as_complex(x)


@lowers_complex(aten.real.default)
def real(e: Emitter, x: Ref) -> Ref:
    """The real part."""
    return part(e, x, 0)


@lowers_complex(aten.imag.default)
def imag(e: Emitter, x: Ref) -> Ref:
    """The imaginary part."""
    return part(e, x, 1)


@lowers_complex(aten.complex.default)
def complex_(e: Emitter, real: Ref, imag: Ref) -> Ref:
    """The two parts side by side."""
    return join(e, e.broadcast_to(real, e.out.shape), e.broadcast_to(imag, e.out.shape))


@lowers_complex(aten.polar.default)
def polar(e: Emitter, abs: Ref, angle: Ref) -> Ref:
    """By magnitude and angle."""
    return _fragment(e, "t2n_complex_polar", _column(e, abs), _column(e, angle))


@lowers_complex(aten.permute.default)
def permute(e: Emitter, x: Ref, dims: Sequence[int]) -> Ref:
    """Axes in another order; the parts stay last."""
    axes = [*(d % x.rank for d in dims), x.rank]
    return as_complex(e.op("transpose", real_layout(x), out=(*e.out.shape, 2), axes=axes))


@lowers_complex(aten.t.default)
def t(e: Emitter, x: Ref) -> Ref:
    """A matrix transposed."""
    return permute(e, x, [1, 0]) if x.rank == 2 else x


@lowers_complex(aten._to_copy.default, aten.to.dtype_layout, aten.to.dtype, aten.to.device)
def to(e: Emitter, x: Ref) -> Ref:
    """Cast; a real result is the real part."""
    if e.out.dtype.is_complex:
        return promote(e, x, e.out.dtype)
    return e.cast(part(e, x, 0), e.out.dtype)


@lowers_complex(aten.to.other, aten.type_as.default)
def to_other(e: Emitter, x: Ref, other: Ref) -> Ref:
    """Cast to another tensor's dtype."""
    return to(e, x)


def _filled(value: Scalar) -> Lowering:
    def lower(e: Emitter) -> Ref:
        """One value everywhere."""
        return _full(e, value)

    return lower


def _filled_like(value: Scalar) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        """One value, with the shape or the dtype of another tensor."""
        return _full(e, value)

    return lower


for _value, _sized, _like in (
    (0, aten.zeros.default, (aten.zeros_like.default, aten.new_zeros.default)),
    (1, aten.ones.default, (aten.ones_like.default, aten.new_ones.default)),
):
    lowers_complex(_sized)(_filled(_value))
    lowers_complex(*_like)(_filled_like(_value))


@lowers_complex(aten.full.default)
def full(e: Emitter, fill_value: Scalar | complex) -> Ref:
    """One value everywhere."""
    return _full(e, fill_value)


@lowers_complex(aten.full_like.default, aten.new_full.default)
def full_like(e: Emitter, x: Ref, fill_value: Scalar | complex) -> Ref:
    """One value, with the shape or the dtype of another tensor."""
    return _full(e, fill_value)


@lowers_complex(aten.scalar_tensor.default)
def scalar_tensor(e: Emitter, s: Scalar | complex) -> Ref:
    """A rank-0 tensor."""
    return _full(e, s)


def _full(e: Emitter, value: Scalar | complex) -> Ref:
    dtype = e.out.dtype
    if dtype.is_complex:
        return as_complex(e.broadcast_to(_stored(e, value, dtype), (*e.out.shape, 2)))
    return e.broadcast_to(e.full(torch.tensor(value, dtype=dtype).item()), e.out.shape)


# -- one operand

_UNARY = {
    "t2n_complex_conj": _SAME,
    "t2n_complex_cos": [aten.cos.default],
    "t2n_complex_cosh": [aten.cosh.default],
    "t2n_complex_exp": [aten.exp.default],
    "t2n_complex_log": [aten.log.default],
    "t2n_complex_reciprocal": [aten.reciprocal.default],
    "t2n_complex_sgn": [aten.sgn.default],
    "t2n_complex_sin": [aten.sin.default],
    "t2n_complex_sinh": [aten.sinh.default],
    "t2n_complex_sqrt": [aten.sqrt.default],
    "t2n_complex_square": [aten.square.default],
}
_MAGNITUDE = {"t2n_complex_abs": aten.abs.default, "t2n_complex_angle": aten.angle.default}


def _unary(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        """A function of complex numbers."""
        return _fragment(e, operator, real_layout(promote(e, x, e.out.dtype)))

    return lower


def _magnitude(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        """A real function of complex numbers."""
        result = e.op(operator, real_layout(x), out=(*x.shape, 1), axis=x.rank)
        return e.squeeze(result, [x.rank])

    return lower


for _operator, _ops in _UNARY.items():
    lowers_complex(*_ops)(_unary(_operator))
for _operator, _op in _MAGNITUDE.items():
    lowers_complex(_op)(_magnitude(_operator))


@lowers_complex(aten.neg.default, aten._neg_view.default)
def neg(e: Emitter, x: Ref) -> Ref:
    """Both parts negated."""
    return as_complex(e.op("neg", real_layout(x)))


@lowers_complex(aten.linalg_vector_norm.default)
def vector_norm(e: Emitter, x: Ref, ord: Scalar = 2, dim: Sequence[int] | None = None, keepdim: bool = False) -> Ref:
    """The norm of the magnitudes."""
    size = _magnitude("t2n_complex_abs")(e, x)
    return OPS.lower(e, e.node, (size, ord, dim, keepdim), {})  # type: ignore[return-value]


@lowers_complex(aten.pow.Tensor_Scalar)
def power(e: Emitter, x: Ref, exponent: Scalar | complex) -> Ref:
    """Small powers, as products."""
    if exponent not in _POWERS:
        raise e.refuse(f"the power {exponent} on complex values; {sorted(_POWERS)} have a lowering")
    base = real_layout(promote(e, x, e.out.dtype))
    result = base
    for operator in _POWERS[exponent]:  # type: ignore[index]
        result = real_layout(_fragment(e, operator, *([result, base] if operator == "t2n_complex_mul" else [result])))
    return as_complex(result)


_POWERS: dict[Scalar, list[str]] = {
    -2: ["t2n_complex_square", "t2n_complex_reciprocal"],
    -1: ["t2n_complex_reciprocal"],
    0.5: ["t2n_complex_sqrt"],
    1: [],
    2: ["t2n_complex_square"],
    3: ["t2n_complex_square", "t2n_complex_mul"],
    4: ["t2n_complex_square", "t2n_complex_square"],
}

# -- two operands


@lowers_complex(aten.mul.Tensor, aten.mul.Scalar)
def mul(e: Emitter, x: Number, other: Number) -> Ref:
    """A real factor scales both parts."""
    return _scaling(e, "mul", x, other) if _is_real(other) else _scaling(e, "mul", other, x)


@lowers_complex(aten.div.Tensor, aten.div.Scalar)
def div(e: Emitter, x: Number, other: Number) -> Ref:
    """A real divisor scales both parts."""
    return _scaling(e, "div", x, other)


@lowers_complex(aten.add.Tensor, aten.add.Scalar)
def add(e: Emitter, x: Number, other: Number, alpha: Scalar | complex = 1) -> Ref:
    """X + alpha * other."""
    return _sum(e, "add", x, _times(e, other, alpha))


@lowers_complex(aten.sub.Tensor, aten.sub.Scalar)
def sub(e: Emitter, x: Number, other: Number, alpha: Scalar | complex = 1) -> Ref:
    """X - alpha * other."""
    return _sum(e, "sub", x, _times(e, other, alpha))


@lowers_complex(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(e: Emitter, x: Number, other: Number, alpha: Scalar | complex = 1) -> Ref:
    """Other - alpha * x."""
    return _sum(e, "sub", other, _times(e, x, alpha))


@lowers_complex(aten.where.self)
def where(e: Emitter, condition: Ref, x: Ref, other: Ref) -> Ref:
    """Choose by condition, all three broadcast."""
    rank = len(e.out.shape) + 1
    sides = [real_layout(promote(e, side, e.out.dtype)) for side in (x, other)]
    aligned = [e.lift(side, rank) for side in (e.unsqueeze(condition, [condition.rank]), *sides)]
    return as_complex(e.op("select", *aligned, out=(*e.out.shape, 2), dtype=sides[0].dtype))


def _equality(operator: str, reduce: str) -> Lowering:
    def lower(e: Emitter, x: Number, other: Number) -> Ref:
        """Both parts compared."""
        refs = [side for side in (x, other) if isinstance(side, Ref)]
        dtype = next((r.dtype for r in refs if r.dtype.is_complex), torch.complex64)
        left, right = (_planes(e, side, dtype) for side in (x, other))
        parts = e.binary(operator, left, right, left.dtype, result=torch.bool)
        axis = parts.rank - 1
        return e.squeeze(e.op(reduce, parts, out=(*parts.shape[:-1], 1), axes=[axis]), [axis])

    return lower


lowers_complex(aten.eq.Tensor, aten.eq.Scalar)(_equality("eq", "all_reduce"))
lowers_complex(aten.ne.Tensor, aten.ne.Scalar)(_equality("ne", "any_reduce"))

# -- helpers


def _is_real(side: Number) -> bool:
    return not (side.dtype.is_complex if isinstance(side, Ref) else isinstance(side, complex))


def _column(e: Emitter, x: Ref) -> Ref:
    return e.unsqueeze(x, [x.rank])


def _stored(e: Emitter, value: Scalar | complex, dtype: torch.dtype) -> Ref:
    """A number in the real layout."""
    return e.constant(torch.view_as_real(torch.tensor(value, dtype=dtype)).clone(), "complex")


def _planes(e: Emitter, side: Number, dtype: torch.dtype) -> Ref:
    """The real layout of a tensor or a number."""
    if isinstance(side, (int, float, complex)):
        return _stored(e, side, dtype)
    ref = side if isinstance(side, Ref) else e.scalar(side, dtype.to_real())
    return real_layout(promote(e, ref, dtype))  # type: ignore[arg-type]  # a dimension makes a tensor


def _fragment(e: Emitter, operator: str, *operands: Ref) -> Ref:
    """A fragment over operands whose last axis has the parts, broadcast as torch does."""
    rank = max(operand.rank for operand in operands)
    aligned = [e.lift(operand, rank) for operand in operands]
    shape = (*broadcast([operand.shape for operand in aligned])[:-1], 2)
    return as_complex(e.op(operator, *aligned, out=shape, axis=rank - 1))


def _scaling(e: Emitter, operator: str, x: Number, other: Number) -> Ref:
    dtype = e.out.dtype
    z = _planes(e, x, dtype)
    if not _is_real(other):
        return _fragment(e, f"t2n_complex_{operator}", z, _planes(e, other, dtype))
    factor = _column(e, other) if isinstance(other, Ref) else other
    return as_complex(e.binary(operator, z, factor, z.dtype))


def _times(e: Emitter, x: Number, alpha: Scalar | complex) -> Number:
    if alpha == 1:
        return x
    return _scaling(e, "mul", x, alpha) if isinstance(x, Ref) else x * alpha


def _sum(e: Emitter, operator: str, x: Number, other: Number) -> Ref:
    dtype = e.out.dtype
    return as_complex(e.binary(operator, _planes(e, x, dtype), _planes(e, other, dtype), dtype.to_real()))
