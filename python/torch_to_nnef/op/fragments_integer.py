"""Fragments between floats and 8-bit codes.

Adding 1.5 * 2^23 leaves an f32 no bits below one: rounding half to even, for a fifth of the time of tract_core_round_even. tract's cast
from f32 to i8 saturates.
"""

from __future__ import annotations

from torch_to_nnef.op.statement import Fragment

_ROUNDED = "(x * inverse + 12582912.0) - 12582912.0 + zero_point"

INTEGER: dict[str, Fragment] = {
    "t2n_dequantize": (
        "(codes: tensor<scalar>, zero_point: scalar, scale: scalar) -> (y: tensor<scalar>)",
        ['y = (tract_core_cast(codes, to = "f32") - zero_point) * scale;'],
    ),
    "t2n_look_up": (
        "(table: tensor<scalar>, codes: tensor<scalar>) -> (y: tensor<scalar>)",
        ['y = tract_core_gather(table, tract_core_cast(codes, to = "i64") + 128.0, axis = 0);'],
    ),
    "t2n_quantize": (
        "(x: tensor<scalar>, inverse: scalar, zero_point: scalar) -> (codes: tensor<scalar>)",
        [f'codes = tract_core_cast({_ROUNDED}, to = "i8");'],
    ),
    "t2n_quantize_within": (
        "(x: tensor<scalar>, inverse: scalar, zero_point: scalar, low: scalar, high: scalar) -> (codes: tensor<scalar>)",
        [f'codes = tract_core_cast(max(min({_ROUNDED}, high), low), to = "i8");'],
    ),
    "t2n_rescale": (
        "(sums: tensor<scalar>, scale: tensor<scalar>, bias: tensor<scalar>) -> (y: tensor<scalar>)",
        ['y = tract_core_cast(sums, to = "f32") * scale + bias;'],
    ),
}
