"""Fragments of arithmetic and of special functions. Literals stand right of tensors: tract casts them to the tensor's type."""

from __future__ import annotations

from torch_to_nnef.op.statement import Fragment

MATH: dict[str, Fragment] = {
    # The first nan is torch's extreme; tract passes over it.
    "t2n_argmax": (
        "(x: tensor<scalar>, axes: integer[]) -> (y: tensor<scalar>)",
        [
            "absent = ne(x, x);",
            'first = argmax_reduce(tract_core_cast(absent, to = "u8"), axes = axes);',
            "y = select(any_reduce(absent, axes = axes), first, argmax_reduce(x, axes = axes));",
        ],
    ),
    "t2n_argmin": (
        "(x: tensor<scalar>, axes: integer[]) -> (y: tensor<scalar>)",
        [
            "absent = ne(x, x);",
            'first = argmax_reduce(tract_core_cast(absent, to = "u8"), axes = axes);',
            "y = select(any_reduce(absent, axes = axes), first, argmin_reduce(x, axes = axes));",
        ],
    ),
    # The reciprocal tells -0.0 from 0.0.
    "t2n_atan2": (
        "(y: tensor<scalar>, x: tensor<scalar>) -> (angle: tensor<scalar>)",
        [
            "size = select(eq(y, 0.0), abs(y), atan(abs(y) / abs(x)));",
            "upper = select(or(x < 0.0, recip(x) < 0.0), neg(size) + 3.1415927, size);",
            "angle = select(or(y < 0.0, recip(y) < 0.0), neg(upper), upper);",
        ],
    ),
    # The reciprocal tells -0.0 from 0.0.
    "t2n_copysign": (
        "(x: tensor<scalar>, like: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = select(or(like < 0.0, recip(like) < 0.0), neg(abs(x)), abs(x));"],
    ),
    # The nearest integer is the one below or above, whatever the last bits of x / y are; the sign of the rest tells.
    "t2n_div_floor": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["nearest = round(x / y);", "rest = x - nearest * y;", "z = nearest - max(neg(sign(rest) * sign(y)), 0.0);"],
    ),
    "t2n_div_floor_integer": (
        "(x: tensor<scalar>, y: tensor<scalar>, zero: tensor<scalar>) -> (z: tensor<scalar>)",
        ["rest = t2n_fmod_integer(x, y);", "z = x / y - max(neg(sign(rest) * sign(y)), zero);"],
    ),
    "t2n_div_trunc": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = t2n_div_floor(abs(x), abs(y)) * sign(x / y);"],
    ),
    # exp(x) - 1 has no digits left near zero.
    "t2n_expm1": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["half = tanh(x * 0.5);", "y = select(abs(x) < 0.5, (half + half) / (neg(half) + 1.0), exp(x) - 1.0);"],
    ),
    "t2n_fmod": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = t2n_remainder(abs(x), abs(y)) * sign(x);"],
    ),
    "t2n_fmod_integer": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = x - (x / y) * y;"],
    ),
    "t2n_hypot": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = sqrt(square(x) + square(y));"],
    ),
    # What x + 1 loses of a small x is given back as a ratio.
    "t2n_log1p": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        [
            "rounded = x + 1.0;",
            "part = rounded - 1.0;",
            "near = select(eq(part, 0.0), x, log(rounded) * (x / part));",
            "y = select(abs(x) < 0.5, near, log(rounded));",
        ],
    ),
    # Equal ones apart: the difference of infinities is no number.
    "t2n_logaddexp": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = select(eq(x, y), x + 0.69314718, max(x, y) + t2n_log1p(exp(neg(abs(x - y)))));"],
    ),
    "t2n_logaddexp2": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = select(eq(x, y), x + 1.0, max(x, y) + t2n_log1p(exp(neg(abs(x - y)) * 0.69314718)) * 1.4426950);"],
    ),
    # tract passes over nan, and starts from the least finite number: what is not found is nan or minus infinity, and so is the sum.
    "t2n_max_reduce": (
        "(x: tensor<scalar>, axes: integer[]) -> (y: tensor<scalar>)",
        [
            "largest = max_reduce(x, axes = axes);",
            "found = and(any_reduce(eq(x, largest), axes = axes), all_reduce(eq(x, x), axes = axes));",
            "y = select(found, largest, sum_reduce(x, axes = axes));",
        ],
    ),
    # Where one is nan so is the sum; tract's max would give the other.
    "t2n_maximum": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = select(x > y, x, select(y >= x, y, x + y));"],
    ),
    "t2n_min_reduce": (
        "(x: tensor<scalar>, axes: integer[]) -> (y: tensor<scalar>)",
        [
            "least = min_reduce(x, axes = axes);",
            "found = and(any_reduce(eq(x, least), axes = axes), all_reduce(eq(x, x), axes = axes));",
            "y = select(found, least, sum_reduce(x, axes = axes));",
        ],
    ),
    "t2n_minimum": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = select(x < y, x, select(y <= x, y, x + y));"],
    ),
    # A negative power of 1 or -1 is the positive one; of others it is a fraction, that is 0.
    "t2n_pow_integer": (
        "(x: tensor<scalar>, exponent: tensor<scalar>, zero: tensor<scalar>, one: tensor<scalar>) -> (y: tensor<scalar>)",
        [
            "fraction = and(exponent < zero, ne(abs(x), one));",
            "y = select(fraction, zero, pow(x, select(fraction, zero, abs(exponent))));",
        ],
    ),
    "t2n_remainder": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["rest = x - round(x / y) * y;", "z = rest + max(neg(sign(rest) * sign(y)), 0.0) * y;"],
    ),
    "t2n_remainder_integer": (
        "(x: tensor<scalar>, y: tensor<scalar>, zero: tensor<scalar>) -> (z: tensor<scalar>)",
        ["rest = t2n_fmod_integer(x, y);", "z = rest + max(neg(sign(rest) * sign(y)), zero) * y;"],
    ),
    # tract turns x * x into its square, which is of floats only.
    "t2n_square_integer": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = neg(x * neg(x));"],
    ),
    "t2n_xlogy": (
        "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)",
        ["z = select(and(eq(x, 0.0), eq(y, y)), x, x * log(y));"],
    ),
}
