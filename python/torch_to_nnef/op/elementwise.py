"""Element-wise arithmetic and choice."""

from __future__ import annotations

import math

import torch

from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.operand import Operand, aligned, as_ref, elementwise, promoted
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref

aten = torch.ops.aten

# NNEF operator -> ATen op of one tensor; the input is first cast to the dtype torch computes in.
_UNARY = {
    "acos": aten.acos.default,
    "acosh": aten.acosh.default,
    "asin": aten.asin.default,
    "asinh": aten.asinh.default,
    "atan": aten.atan.default,
    "atanh": aten.atanh.default,
    "cos": aten.cos.default,
    "cosh": aten.cosh.default,
    "exp": aten.exp.default,
    "log": aten.log.default,
    "neg": aten.neg.default,
    "recip": aten.reciprocal.default,
    "rsqrt": aten.rsqrt.default,
    "sigmoid": aten.sigmoid.default,
    "sin": aten.sin.default,
    "sinh": aten.sinh.default,
    "sqrt": aten.sqrt.default,
    "tan": aten.tan.default,
    "tanh": aten.tanh.default,
    "tract_core_erf": aten.erf.default,
    "t2n_expm1": aten.expm1.default,
    "t2n_log10": aten.log10.default,
    "t2n_log1p": aten.log1p.default,
    "t2n_log2": aten.log2.default,
}
# Of integers and booleans these are the input.
_ROUNDING = {
    "ceil": aten.ceil.default,
    "floor": aten.floor.default,
    "t2n_trunc": aten.trunc.default,
    "tract_core_round_even": aten.round.default,
}
# NNEF operator, and what it is on booleans -> ATen ops.
_ARITHMETIC = {
    ("mul", "and"): [aten.mul.Tensor, aten.mul.Scalar],
    ("t2n_maximum", "or"): [aten.maximum.default],
    ("t2n_minimum", "and"): [aten.minimum.default],
}
# Fragments of two tensors of floats. f16 is computed in f32, and what may overflow on its way in f64.
_BINARY = {
    "t2n_atan2": [aten.atan2.default],
    "t2n_copysign": [aten.copysign.Tensor, aten.copysign.Scalar],
    "t2n_logaddexp": [aten.logaddexp.default],
    "t2n_logaddexp2": [aten.logaddexp2.default],
    "t2n_xlogy": [aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other],
}
_WIDE_BINARY = {"t2n_hypot": [aten.hypot.default]}


def _unary(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        return e.op(operator, e.cast(x, e.out.dtype))

    return lower


def _rounding(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        return e.op(operator, x) if x.dtype.is_floating_point else x

    return lower


def _arithmetic(operator: str, logical: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        if e.out.dtype is torch.bool:
            return e.binary(logical, x, other, torch.bool)
        # tract makes the square of what is multiplied by itself, and has none of integers.
        if operator == "mul" and x == other and not e.out.dtype.is_floating_point:
            return e.op("t2n_square_integer", as_ref(e, x, e.out.dtype))
        if not e.out.dtype.is_floating_point:
            return e.binary(operator.removeprefix("t2n_").removesuffix("imum"), x, other, e.out.dtype)
        return e.binary(operator, x, other, e.out.dtype)

    return lower


def _binary(fragment: str, dtype: torch.dtype) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        widest = torch.promote_types(dtype, e.out.dtype)
        return e.cast(elementwise(e, fragment, x, other, dtype=widest), e.out.dtype)

    return lower


for _operator, _op in _UNARY.items():
    lowers(_op)(_unary(_operator))
for _operator, _op in _ROUNDING.items():
    lowers(_op)(_rounding(_operator))
for (_operator, _logical), _ops in _ARITHMETIC.items():
    lowers(*_ops)(_arithmetic(_operator, _logical))
for _table, _dtype in ((_BINARY, torch.float32), (_WIDE_BINARY, torch.float64)):
    for _operator, _ops in _table.items():
        lowers(*_ops)(_binary(_operator, _dtype))


@lowers(aten.abs.default)
def absolute(e: Emitter, x: Ref) -> Ref:
    """|x|; booleans have no sign."""
    return x if x.dtype is torch.bool else e.op("abs", x)


@lowers(aten.sign.default, aten.sgn.default)
def sign(e: Emitter, x: Ref) -> Ref:
    """-1, 0 or 1; of nan, 0 to torch."""
    if x.dtype is torch.bool:
        return x
    result = e.op("sign", x)
    return select(e, e.op("ne", x, x, dtype=torch.bool), 0, result) if x.dtype.is_floating_point else result


def _scaled(e: Emitter, side: Operand, alpha: Scalar) -> Operand:
    if alpha == 1:
        return side
    return e.binary("mul", side, alpha, e.out.dtype) if isinstance(side, Ref) else side * alpha


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(e: Emitter, x: Operand, other: Operand, alpha: Scalar = 1) -> Ref:
    """X + alpha * other; on booleans, or."""
    if e.out.dtype is torch.bool:
        return e.binary("or", x, other, torch.bool) if alpha else as_ref(e, x, torch.bool)
    return e.binary("add", x, _scaled(e, other, alpha), e.out.dtype)


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
    if not (e.out.dtype.is_floating_point or e.out.dtype.is_complex):  # torch 2.6 and 2.7 type it so while they trace
        raise e.refuse("this torch calls the quotient of integers an integer; divide floats, or use a newer torch")
    # tract multiplies by the reciprocal, which f16 cannot hold of small numbers nor well of large ones.
    dtype = torch.float32 if e.out.dtype is torch.float16 and isinstance(other, Ref) else e.out.dtype
    return e.cast(e.binary("div", x, other, dtype), e.out.dtype)


@lowers(aten.square.default)
def square(e: Emitter, x: Ref) -> Ref:
    """X * x."""
    return e.op("square" if x.dtype.is_floating_point else "t2n_square_integer", e.cast(x, e.out.dtype))


@lowers(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(e: Emitter, x: Operand, exponent: Ref) -> Ref:
    """X ^ exponent; an integer power that is a fraction is 0."""
    if e.out.dtype.is_floating_point:
        return e.binary("pow", x, exponent, e.out.dtype)
    # tract has powers of i32 and i64.
    dtype = e.out.dtype if e.out.dtype is torch.int32 else torch.int64
    constants = [e.full(value, dtype) for value in (0, 1)]
    return e.cast(elementwise(e, "t2n_pow_integer", x, exponent, *constants, dtype=dtype), e.out.dtype)


@lowers(aten.pow.Tensor_Scalar)
def pow_scalar(e: Emitter, x: Ref, exponent: Scalar) -> Ref:
    """X ^ exponent; the square as its own operator, which tract fuses into norms."""
    x = e.cast(x, e.out.dtype)
    if not x.dtype.is_floating_point:
        return _integer_power(e, x, int(exponent))
    return e.op("square", x) if exponent == 2 else e.binary("pow", x, exponent, e.out.dtype)


def _integer_power(e: Emitter, x: Ref, exponent: int) -> Ref:
    """By squaring: exact, and wraps as torch does."""
    power = None
    while exponent:
        if exponent % 2:
            power = x if power is None else e.op("mul", power, x)
        exponent //= 2
        x = e.op("t2n_square_integer", x) if exponent else x
    return e.broadcast_to(e.full(1), x.shape) if power is None else power


@lowers(aten.fmax.default)
def fmax(e: Emitter, x: Ref, other: Ref) -> Ref:
    """The larger, or the one that is a number."""
    return _number(e, "max", "or", x, other)


@lowers(aten.fmin.default)
def fmin(e: Emitter, x: Ref, other: Ref) -> Ref:
    """The smaller, or the one that is a number."""
    return _number(e, "min", "and", x, other)


def _number(e: Emitter, operator: str, logical: str, x: Ref, other: Ref) -> Ref:
    return e.binary(logical if e.out.dtype is torch.bool else operator, x, other, e.out.dtype)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(e: Emitter, x: Ref, min: Operand | None = None, max: Operand | None = None) -> Ref:
    """Bound below, above or both, by numbers or by tensors that broadcast."""
    result = e.cast(x, e.out.dtype)
    above, below = ("or", "and") if result.dtype is torch.bool else ("max", "min")
    if min is not None:
        result = e.binary(above, result, min, e.out.dtype)
    return result if max is None else e.binary(below, result, max, e.out.dtype)


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(e: Emitter, x: Ref, min: Operand) -> Ref:
    """Bound below."""
    return clamp(e, x, min)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(e: Emitter, x: Ref, max: Operand) -> Ref:
    """Bound above."""
    return clamp(e, x, max=max)


@lowers(aten.ldexp.Tensor)
def ldexp(e: Emitter, x: Ref, other: Ref) -> Ref:
    """X * 2 ^ other."""
    return e.binary("mul", x, e.binary("pow", e.full(2), other, e.out.dtype), e.out.dtype)


@lowers(aten.exp2.default)
def exp2(e: Emitter, x: Ref) -> Ref:
    """2 ^ x, exact on whole numbers."""
    return e.binary("pow", e.full(2), x, e.out.dtype)


@lowers(aten.heaviside.default)
def heaviside(e: Emitter, x: Ref, values: Ref) -> Ref:
    """0 below zero, 1 above, `values` at zero."""
    x, values = e.cast(x, e.out.dtype), e.cast(values, e.out.dtype)
    step = e.cast(compare(e, "gt", x, 0), e.out.dtype)
    return select(e, compare(e, "eq", x, 0), values, step)


@lowers(aten.nan_to_num.default)
def nan_to_num(
    e: Emitter, x: Ref, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Ref:
    """Numbers for nan and the infinities: 0 and the ends of the range unless given."""
    if not x.dtype.is_floating_point:
        return x
    limits = torch.finfo(x.dtype)
    table = {
        math.inf: limits.max if posinf is None else posinf,
        -math.inf: limits.min if neginf is None else neginf,
    }
    result = select(e, e.op("ne", x, x, dtype=torch.bool), e.full(nan or 0.0), x)
    for infinity, value in table.items():
        result = select(e, compare(e, "eq", x, infinity), e.full(value), result)
    return result


@lowers(aten.angle.default)
def angle(e: Emitter, x: Ref) -> Ref:
    """Pi below zero, 0 above; nan is kept."""
    x = e.cast(x, e.out.dtype)
    above = select(e, e.op("ne", x, x, dtype=torch.bool), x, 0)
    return select(e, compare(e, "lt", x, 0), math.pi, above)


@lowers(aten.round.decimals)
def round_decimals(e: Emitter, x: Ref, decimals: int) -> Ref:
    """To the nearest multiple of 10^-decimals, as torch computes it."""
    scale = 10.0 ** abs(decimals)
    there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
    whole = e.op("tract_core_round_even", e.binary(there, x, scale, x.dtype))
    return e.binary(back, whole, scale, x.dtype) if decimals else e.op("tract_core_round_even", x)


@lowers(aten.frexp.Tensor)
def frexp(e: Emitter, x: Ref) -> list[Ref]:
    """Mantissa in [1/2, 1) and exponent of 2; logarithms are in f64, whose last bits one comparison corrects."""
    wide = e.cast(x, torch.float64)
    one, zero = (e.full(value, torch.float64) for value in (1, 0))
    two = e.full(2, torch.float64)
    magnitude = e.op("abs", wide)
    finite = e.binary("and", compare(e, "gt", magnitude, 0), compare(e, "lt", magnitude, math.inf), torch.bool)
    guess = e.op("round", e.op("t2n_log2", e.op("select", finite, magnitude, one)))
    high = e.op("ge", magnitude, e.op("pow", two, guess), dtype=torch.bool)
    exponent = e.op("select", finite, e.op("add", guess, e.cast(high, torch.float64)), zero)
    mantissa = e.op("div", wide, e.op("pow", two, exponent))
    return [e.cast(mantissa, x.dtype), e.cast(exponent, torch.int32)]


@lowers(aten.where.self)
def where(e: Emitter, condition: Ref, x: Ref, other: Ref) -> Ref:
    """Choose by condition, all three broadcast."""
    return select(e, condition, x, other)


@lowers(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where_scalar(e: Emitter, condition: Ref, x: Operand, other: Operand) -> Ref:
    """Choose where one or both sides are numbers."""
    return select(e, condition, x, other)


@lowers(aten.masked_fill.Tensor, aten.masked_fill.Scalar)
def masked_fill(e: Emitter, x: Ref, mask: Ref, value: Operand) -> Ref:
    """`value`, a number or a tensor of one, where mask."""
    return select(e, mask, value, x)


def select(e: Emitter, condition: Ref, true: Operand, false: Operand) -> Ref:
    """`true` where `condition`, else `false`, with torch's broadcasting, in the output's dtype."""
    sides = [e.cast(condition, torch.bool), *(as_ref(e, side, e.out.dtype) for side in (true, false))]
    return e.op("select", *aligned(e, sides), dtype=e.out.dtype)


def compare(e: Emitter, operator: str, x: Operand, other: Operand) -> Ref:
    """`x operator other` in the dtype torch compares in; tract compares no booleans."""
    dtype = promoted(x, other)
    return e.binary(operator, x, other, torch.uint8 if dtype is torch.bool else dtype, result=torch.bool)
