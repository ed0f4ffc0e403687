"""Fragments between floats and 8-bit codes.

Adding `ROUNDING` leaves an f32 no bits below one: rounding half to even, for a fifth of the time of tract_core_round_even. Taking it off
again, but for the zero point, gives the code. tract's cast from f32 to i8 saturates.
"""

from __future__ import annotations

from torch_to_nnef.op.statement import Fragment

ROUNDING = 1.5 * 2.0**23
_CODES = f"(x * inverse + {ROUNDING}) - rounding"

INTEGER: dict[str, Fragment] = {
    "t2n_dequantize": (
        "(codes: tensor<scalar>, zero_point: scalar, scale: scalar) -> (y: tensor<scalar>)",
        ['y = (tract_core_cast(codes, to = "f32") - zero_point) * scale;'],
    ),
    "t2n_look_up": (
        "(table: tensor<scalar>, codes: tensor<scalar>) -> (y: tensor<scalar>)",
        ['y = tract_core_gather(table, tract_core_cast(codes, to = "i64") + 128.0, axis = 0);'],
    ),
    # rounding: the same constant, less the zero point.
    "t2n_quantize": (
        "(x: tensor<scalar>, inverse: scalar, rounding: scalar) -> (codes: tensor<scalar>)",
        [f'codes = tract_core_cast({_CODES}, to = "i8");'],
    ),
    "t2n_quantize_within": (
        "(x: tensor<scalar>, inverse: scalar, rounding: scalar, low: scalar, high: scalar) -> (codes: tensor<scalar>)",
        [f'codes = tract_core_cast(max(min({_CODES}, high), low), to = "i8");'],
    ),
    "t2n_rescale": (
        "(sums: tensor<scalar>, scale: tensor<scalar>, bias: tensor<scalar>) -> (y: tensor<scalar>)",
        ['y = tract_core_cast(sums, to = "f32") * scale + bias;'],
    ),
}
