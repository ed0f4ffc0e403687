"""Comparison, logic and bits."""

from __future__ import annotations

import math

import torch

from torch_to_nnef.op.elementwise import compare, select
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.operand import Operand, as_ref
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref
from torch_to_nnef.torch_internals import OpOverload, OpOverloadPacket

aten = torch.ops.aten

_COMPARISON = {
    "eq": [aten.eq.Tensor, aten.eq.Scalar],
    "ge": [aten.ge.Tensor, aten.ge.Scalar],
    "gt": [aten.gt.Tensor, aten.gt.Scalar],
    "le": [aten.le.Tensor, aten.le.Scalar],
    "lt": [aten.lt.Tensor, aten.lt.Scalar],
    "ne": [aten.ne.Tensor, aten.ne.Scalar],
}
_LOGIC = {
    "and": aten.logical_and.default,
    "or": aten.logical_or.default,
    "tract_core_xor": aten.logical_xor.default,
}
# (on booleans, on integers) -> ATen op, all of its overloads for tensors and numbers on either side.
_BITWISE = {
    ("and", "tract_core_bitand"): [aten.bitwise_and, aten.__and__],
    ("or", "tract_core_bitor"): [aten.bitwise_or, aten.__or__],
    ("tract_core_xor", "tract_core_bitxor"): [aten.bitwise_xor, aten.__xor__],
}
_SHIFTS = {
    "tract_shl": [aten.bitwise_left_shift, aten.__lshift__],
    "tract_shr": [aten.bitwise_right_shift, aten.__rshift__],
}
# ATen op -> whether it detects infinity, and minus infinity.
_INFINITE = {
    aten.isinf.default: (True, True),
    aten.isposinf.default: (True, False),
    aten.isneginf.default: (False, True),
}


def _overloads(packets: list[OpOverloadPacket]) -> list[OpOverload]:
    names = ("Tensor", "Scalar", "Scalar_Tensor", "Tensor_Scalar")
    return [getattr(packet, name) for packet in packets for name in names if hasattr(packet, name)]


def _comparison(operator: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        return compare(e, operator, x, other)

    return lower


def _logic(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref, other: Ref) -> Ref:
        return e.binary(operator, x, other, torch.bool)

    return lower


def _bitwise(logical: str, bits: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        return e.binary(logical if e.out.dtype is torch.bool else bits, x, other, e.out.dtype)

    return lower


def _shift(operator: str) -> Lowering:
    def lower(e: Emitter, x: Operand, other: Operand) -> Ref:
        bits = torch.iinfo(e.out.dtype).bits
        if isinstance(other, int) and 0 <= other < bits:
            return e.binary(operator, x, other, e.out.dtype)
        # Beyond the width nothing is left but the sign of what is shifted right; the processor would take the amount modulo the width.
        amount = as_ref(e, other, e.out.dtype)
        beyond = e.binary("or", compare(e, "lt", amount, 0), compare(e, "ge", amount, bits), torch.bool)
        if operator == "tract_shr":
            return e.binary(operator, x, select(e, beyond, bits - 1, amount), e.out.dtype)
        return select(e, beyond, 0, e.binary(operator, x, select(e, beyond, 0, amount), e.out.dtype))

    return lower


def _infinite(positive: bool, negative: bool) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        if not x.dtype.is_floating_point:
            return e.broadcast_to(e.full(False), x.shape)
        return e.op("tract_core_is_inf", x, dtype=torch.bool, detect_positive=positive, detect_negative=negative)

    return lower


for _operator, _ops in _COMPARISON.items():
    lowers(*_ops)(_comparison(_operator))
for _operator, _op in _LOGIC.items():
    lowers(_op)(_logic(_operator))
for (_logical, _bits), _packets in _BITWISE.items():
    lowers(*_overloads(_packets))(_bitwise(_logical, _bits))
for _operator, _packets in _SHIFTS.items():
    lowers(*_overloads(_packets))(_shift(_operator))
for _op, _detect in _INFINITE.items():
    lowers(_op)(_infinite(*_detect))


@lowers(aten.logical_not.default)
def logical_not(e: Emitter, x: Ref) -> Ref:
    """Whether zero."""
    return e.op("not", x) if x.dtype is torch.bool else compare(e, "eq", x, 0)


@lowers(aten.bitwise_not.default)
def bitwise_not(e: Emitter, x: Ref) -> Ref:
    """Logical not on booleans, complement on integers."""
    return e.op("not" if x.dtype is torch.bool else "tract_core_bitnot", x)


@lowers(aten.isnan.default)
def isnan(e: Emitter, x: Ref) -> Ref:
    """Whether not a number: what differs from itself."""
    if not x.dtype.is_floating_point:
        return e.broadcast_to(e.full(False), x.shape)
    return e.op("ne", x, x, dtype=torch.bool)


@lowers(aten.isfinite.default)
def isfinite(e: Emitter, x: Ref) -> Ref:
    """Whether neither infinite nor not a number."""
    if not x.dtype.is_floating_point:
        return e.broadcast_to(e.full(True), x.shape)
    return compare(e, "lt", e.op("abs", x), math.inf)


@lowers(aten.signbit.default)
def signbit(e: Emitter, x: Ref) -> Ref:
    """Whether below zero, -0.0 included: its reciprocal is."""
    if x.dtype is torch.bool:
        return e.broadcast_to(e.full(False), x.shape)
    below = compare(e, "lt", x, 0)
    if not x.dtype.is_floating_point:
        return below
    return e.binary("or", below, compare(e, "lt", e.op("recip", x), 0), torch.bool)


@lowers(aten.isclose.default)
def isclose(e: Emitter, x: Ref, other: Ref, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Ref:
    """Whether equal, or finite and |x - other| <= atol + rtol * |other|."""
    close = compare(e, "eq", x, other)
    if equal_nan and x.dtype.is_floating_point:
        nans = [e.op("ne", side, side, dtype=torch.bool) for side in (x, other)]
        close = e.binary("or", close, e.binary("and", nans[0], nans[1], torch.bool), torch.bool)
    if not (rtol or atol):
        return close
    dtype = x.dtype if x.dtype.is_floating_point else torch.float32
    distance = e.op("abs", e.binary("sub", x, other, dtype))
    allowed = e.binary("add", e.binary("mul", e.op("abs", e.cast(other, dtype)), rtol, dtype), atol, dtype)
    near = e.binary("and", compare(e, "lt", distance, math.inf), compare(e, "le", distance, allowed), torch.bool)
    return e.binary("or", close, near, torch.bool)
