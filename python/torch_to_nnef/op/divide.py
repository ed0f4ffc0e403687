"""Division that rounds, and what it leaves, exact on integers and floats."""

from __future__ import annotations

import torch

from torch_to_nnef.op.elementwise import div
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.operand import Operand, as_ref, elementwise
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(e: Emitter, x: Operand, other: Operand, rounding_mode: str | None = None) -> Ref:
    """Division, then rounded down or towards zero if asked."""
    return div(e, x, other) if rounding_mode is None else _rounded(e, x, other, f"t2n_div_{rounding_mode}")


@lowers(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(e: Emitter, x: Operand, other: Operand) -> Ref:
    """Division rounded down."""
    return _rounded(e, x, other, "t2n_div_floor")


@lowers(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def remainder(e: Emitter, x: Operand, other: Operand) -> Ref:
    """The rest of a division rounded down: it has the sign of the divisor."""
    return _rounded(e, x, other, "t2n_remainder")


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(e: Emitter, x: Operand, other: Operand) -> Ref:
    """The rest of a division rounded towards zero: it has the sign of the dividend."""
    return _rounded(e, x, other, "t2n_fmod")


def _rounded(e: Emitter, x: Operand, other: Operand, fragment: str) -> Ref:
    """`fragment` on floats, or its twin on integers, which tract divides towards zero.

    tract divides floats by the reciprocal, so a quotient may miss the integer it is. In f64 that error is corrected: an f32 dividend
    minus an integer multiple of the divisor is exact there (up to quotients of 2^29).
    """
    dtype = e.out.dtype
    if dtype.is_floating_point:
        wide = [e.cast(as_ref(e, side, dtype), torch.float64) for side in (x, other)]
        return e.cast(elementwise(e, fragment, *wide, dtype=torch.float64), dtype)
    if not dtype.is_signed or fragment == "t2n_div_trunc":  # without signs all roundings are one
        rest = fragment in {"t2n_remainder", "t2n_fmod"}
        return elementwise(e, "t2n_fmod_integer" if rest else "div", x, other)
    zero = [] if fragment == "t2n_fmod" else [e.full(0)]
    return elementwise(e, f"{fragment}_integer", x, other, *zero)
