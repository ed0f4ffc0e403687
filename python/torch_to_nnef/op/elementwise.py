"""Element-wise arithmetic, comparison and logic."""

from __future__ import annotations

from typing import TypeAlias

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import Lowering, lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# NNEF operator -> ATen op of one tensor; the input is first cast to the dtype torch computes in.
_UNARY = {
    "abs": aten.abs.default,
    "acos": aten.acos.default,
    "acosh": aten.acosh.default,
    "asin": aten.asin.default,
    "asinh": aten.asinh.default,
    "atan": aten.atan.default,
    "atanh": aten.atanh.default,
    "ceil": aten.ceil.default,
    "cos": aten.cos.default,
    "cosh": aten.cosh.default,
    "exp": aten.exp.default,
    "floor": aten.floor.default,
    "log": aten.log.default,
    "neg": aten.neg.default,
    "not": aten.logical_not.default,
    "recip": aten.reciprocal.default,
    "rsqrt": aten.rsqrt.default,
    "sigmoid": aten.sigmoid.default,
    "sign": aten.sign.default,
    "sin": aten.sin.default,
    "sinh": aten.sinh.default,
    "sqrt": aten.sqrt.default,
    "square": aten.square.default,
    "tan": aten.tan.default,
    "tanh": aten.tanh.default,
    "t2n_erfc": aten.erfc.default,
    "t2n_expm1": aten.expm1.default,
    "t2n_log10": aten.log10.default,
    "t2n_log1p": aten.log1p.default,
    "t2n_log2": aten.log2.default,
    "t2n_trunc": aten.trunc.default,
    "tract_core_erf": aten.erf.default,
    "tract_core_round_even": aten.round.default,
}
_ARITHMETIC = {
    "mul": [aten.mul.Tensor, aten.mul.Scalar],
    "max": [aten.maximum.default],
    "min": [aten.minimum.default],
    "pow": [aten.pow.Tensor_Tensor, aten.pow.Scalar],
}
_COMPARISON = {
    "eq": [aten.eq.Tensor, aten.eq.Scalar],
    "ge": [aten.ge.Tensor, aten.ge.Scalar],
    "gt": [aten.gt.Tensor, aten.gt.Scalar],
    "le": [aten.le.Tensor, aten.le.Scalar],
    "lt": [aten.lt.Tensor, aten.lt.Scalar],
    "ne": [aten.ne.Tensor, aten.ne.Scalar],
}
_LOGIC = {
    "and": [aten.logical_and.default],
    "or": [aten.logical_or.default],
    "tract_core_xor": [aten.logical_xor.default],
}
_BITWISE = {
    ("and", "tract_core_bitand"): [
        aten.bitwise_and.Tensor,
        aten.bitwise_and.Scalar,
        aten.__and__.Tensor,
        aten.__and__.Scalar,
    ],
    ("or", "tract_core_bitor"): [
        aten.bitwise_or.Tensor,
        aten.bitwise_or.Scalar,
        aten.__or__.Tensor,
        aten.__or__.Scalar,
    ],
    ("tract_core_xor", "tract_core_bitxor"): [
        aten.bitwise_xor.Tensor,
        aten.bitwise_xor.Scalar,
        aten.__xor__.Tensor,
        aten.__xor__.Scalar,
    ],
}

Operand: TypeAlias = Ref | Scalar | Dim


def _promoted(a: Operand, b: Operand) -> torch.dtype:
    """The dtype torch computes `a op b` in: dimensioned tensors win over scalars and rank-0 tensors of the same category."""
    return torch.result_type(_stand_in(a), _stand_in(b))


def _stand_in(side: Operand) -> torch.Tensor | Scalar:
    if isinstance(side, Ref):
        return torch.empty([1] * side.rank, dtype=side.dtype)
    return side if isinstance(side, (bool, int, float)) else 0


def _unary(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        return e.op(operator, e.cast(x, e.out.dtype))

    return lower


def _arithmetic(operator: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        return e.binary(operator, x, other, e.out.dtype)

    return lower


def _power(operator: str) -> Lowering:
    def lower(e: Emitter, x: Operand, exponent: Operand) -> Ref:
        return e.binary(operator, x, exponent, e.out.dtype)

    return lower


def _comparison(operator: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        return e.binary(operator, x, other, _promoted(x, other), result=torch.bool)

    return lower


def _logic(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, other: Ref) -> Ref:
        return e.binary(operator, x, other, torch.bool)

    return lower


def _bitwise(logical: str, bits: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        return e.binary(logical if e.out.dtype is torch.bool else bits, x, other, e.out.dtype)

    return lower


for _operator, _op in _UNARY.items():
    lowers(_op)(_unary(_operator))
for _operator, _ops in _ARITHMETIC.items():
    lowers(*_ops)((_power if _operator == "pow" else _arithmetic)(_operator))
for _operator, _ops in _COMPARISON.items():
    lowers(*_ops)(_comparison(_operator))
for _operator, _ops in _LOGIC.items():
    lowers(*_ops)(_logic(_operator))
for (_logical, _bits), _ops in _BITWISE.items():
    lowers(*_ops)(_bitwise(_logical, _bits))


def _scaled(e: Emitter, side: Operand, alpha: Scalar) -> Operand:
    if alpha == 1:
        return side
    return e.binary("mul", side, alpha, e.out.dtype) if isinstance(side, Ref) else side * alpha


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(e: Emitter, x: Operand, other: Operand, alpha: Scalar = 1) -> Ref:
    """X + alpha * other; on booleans, or."""
    operator = "or" if e.out.dtype is torch.bool else "add"
    return e.binary(operator, x, _scaled(e, other, alpha), e.out.dtype)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(e: Emitter, x: Operand, other: Operand, alpha: Scalar = 1) -> Ref:
    """X - alpha * other."""
    return e.binary("sub", x, _scaled(e, other, alpha), e.out.dtype)


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(e: Emitter, x: Ref, other: Operand, alpha: Scalar = 1) -> Ref:
    """Other - alpha * x."""
    return e.binary("sub", other, _scaled(e, x, alpha), e.out.dtype)


@lowers(aten.div.Tensor, aten.div.Scalar)
def div(e: Emitter, x: Operand, other: Operand) -> Ref:
    """True division: integers become floats first."""
    return e.binary("div", x, other, e.out.dtype)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(e: Emitter, x: Operand, other: Operand, rounding_mode: str | None = None) -> Ref:
    """Division, then rounded down or towards zero; floats only: integers would have to be exact beyond f32."""
    quotient = div(e, x, other)
    return quotient if rounding_mode is None else _rounded(e, quotient, rounding_mode)


@lowers(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(e: Emitter, x: Operand, other: Operand) -> Ref:
    """Division rounded down."""
    return _rounded(e, div(e, x, other), "floor")


@lowers(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(e: Emitter, x: Operand, other: Operand) -> Ref:
    """The rest of a division rounded down: it has the sign of the divisor."""
    return _rest(e, x, other, "floor")


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(e: Emitter, x: Operand, other: Operand) -> Ref:
    """The rest of a division rounded towards zero: it has the sign of the dividend."""
    return _rest(e, x, other, "trunc")


def _rest(e: Emitter, x: Operand, other: Operand, mode: str) -> Ref:
    whole = e.binary("mul", _rounded(e, div(e, x, other), mode), other, e.out.dtype)
    return e.binary("sub", x, whole, e.out.dtype)


def _rounded(e: Emitter, x: Ref, mode: str) -> Ref:
    if not e.out.dtype.is_floating_point:
        raise e.refuse("rounded division of integers; divide floats")
    return e.op("floor" if mode == "floor" else "t2n_trunc", x)


@lowers(aten.isnan.default)
def isnan(e: Emitter, x: Ref) -> Ref:
    """Whether not a number: what differs from itself."""
    return e.op("ne", x, x, dtype=torch.bool)


@lowers(aten.pow.Tensor_Scalar)
def pow_scalar(e: Emitter, x: Ref, exponent: Scalar) -> Ref:
    """X ^ exponent; the square as its own operator, which tract fuses into norms."""
    x = e.cast(x, e.out.dtype)
    return e.op("square", x) if exponent == 2 else e.binary("pow", x, exponent, e.out.dtype)


@lowers(aten.bitwise_not.default)
def bitwise_not(e: Emitter, x: Ref) -> Ref:
    """Logical not on booleans, complement on integers."""
    return e.op("not" if x.dtype is torch.bool else "tract_core_bitnot", x)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(e: Emitter, x: Ref, min: Operand | None = None, max: Operand | None = None) -> Ref:
    """Bound below, above or both, by numbers or by tensors that broadcast."""
    result = e.cast(x, e.out.dtype)
    if min is not None:
        result = e.binary("max", result, min, e.out.dtype)
    return result if max is None else e.binary("min", result, max, e.out.dtype)


@lowers(aten.clamp_min.default)
def clamp_min(e: Emitter, x: Ref, min: Scalar) -> Ref:
    """Bound below."""
    return clamp(e, x, min)


@lowers(aten.where.self)
def where(e: Emitter, condition: Ref, x: Ref, other: Ref) -> Ref:
    """Choose by condition, all three broadcast."""
    return _select(e, condition, e.cast(x, e.out.dtype), e.cast(other, e.out.dtype))


@lowers(aten.where.ScalarOther)
def where_scalar(e: Emitter, condition: Ref, x: Ref, other: Scalar) -> Ref:
    """Choose between a tensor and a number."""
    return _select(e, condition, e.cast(x, e.out.dtype), e.full(other))


@lowers(aten.masked_fill.Tensor)
def masked_fill_tensor(e: Emitter, x: Ref, mask: Ref, value: Ref) -> Ref:
    """`value`, a rank-0 tensor, where mask."""
    return _select(e, mask, e.cast(value, e.out.dtype), x)


@lowers(aten.masked_fill.Scalar)
def masked_fill(e: Emitter, x: Ref, mask: Ref, value: Scalar) -> Ref:
    """`value` where mask."""
    return _select(e, mask, e.full(value), x)


def _select(e: Emitter, condition: Ref, true: Ref, false: Ref) -> Ref:
    rank = len(e.out.shape)
    sides = [e.lift(side, rank) for side in (condition, true, false)]
    return e.op("select", *sides, out=e.out.shape, dtype=e.out.dtype)
