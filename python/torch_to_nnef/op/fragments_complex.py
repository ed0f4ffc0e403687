"""Fragments over complex values: `axis` is the last one, of size 2, with the real and the imaginary part."""

from __future__ import annotations

from collections.abc import Mapping

from torch_to_nnef.op.statement import Fragment

_UNARY = "(z: tensor<scalar>, axis: integer) -> (y: tensor<scalar>)"
_BINARY = "(a: tensor<scalar>, b: tensor<scalar>, axis: integer) -> (y: tensor<scalar>)"
_PARTS = ["re = t2n_complex_re(z, axis = axis);", "im = t2n_complex_im(z, axis = axis);"]
_JOIN = "y = concat([{}, {}], axis = axis);"


def _unary(re: str, im: str, *before: str) -> Fragment:
    return _UNARY, [*_PARTS, *before, _JOIN.format(re, im)]


COMPLEX_FRAGMENTS: Mapping[str, Fragment] = {
    "t2n_complex_re": (_UNARY, ["y = slice(z, axes = [axis], begin = [0], end = [1]);"]),
    "t2n_complex_im": (_UNARY, ["y = slice(z, axes = [axis], begin = [1], end = [2]);"]),
    # These two keep the last axis, at size 1. The magnitude is that of a value scaled to 1, whose square is a number.
    "t2n_complex_abs": (
        _UNARY,
        [
            "larger = max_reduce(abs(z), axes = [axis]);",
            "unit = min(max(larger, 1e-30), 1e38);",
            "y = sqrt(sum_reduce(square(z / unit), axes = [axis])) * unit;",
        ],
    ),
    "t2n_complex_angle": (
        _UNARY,
        [
            *_PARTS,
            "steep = atan(abs(im) / abs(re));",
            "turned = select(re < 0.0, neg(steep) + 3.1415927, steep);",
            "reach = abs(re) + abs(im);",
            "nowhere = reach == 0.0;",  # in an argument, tract reads `reach =` as its name
            "y = select(nowhere, reach, select(im < 0.0, neg(turned), turned));",
        ],
    ),
    "t2n_complex_conj": _unary("re", "neg(im)"),
    "t2n_complex_cos": _unary("cos(re) * cosh(im)", "neg(sin(re) * sinh(im))"),
    "t2n_complex_cosh": _unary("cosh(re) * cos(im)", "sinh(re) * sin(im)"),
    "t2n_complex_div": (
        _BINARY,
        [
            "conj_b = t2n_complex_conj(b, axis = axis);",
            "size = sum_reduce(square(b), axes = [axis]);",
            "y = t2n_complex_mul(a, conj_b, axis = axis) / size;",
        ],
    ),
    "t2n_complex_exp": _unary("size * cos(im)", "size * sin(im)", "size = exp(re);"),
    "t2n_complex_log": (
        _UNARY,
        [
            "size = t2n_complex_abs(z, axis = axis);",
            "angle = t2n_complex_angle(z, axis = axis);",
            _JOIN.format("log(size)", "angle"),
        ],
    ),
    "t2n_complex_mul": (
        _BINARY,
        [
            "a_re = t2n_complex_re(a, axis = axis);",
            "a_im = t2n_complex_im(a, axis = axis);",
            "b_re = t2n_complex_re(b, axis = axis);",
            "b_im = t2n_complex_im(b, axis = axis);",
            _JOIN.format("a_re * b_re - a_im * b_im", "a_re * b_im + a_im * b_re"),
        ],
    ),
    # A point given by magnitude and angle, each with a last axis of size 1.
    "t2n_complex_polar": (_BINARY, [_JOIN.format("a * cos(b)", "a * sin(b)")]),
    "t2n_complex_reciprocal": (
        _UNARY,
        ["y = t2n_complex_conj(z, axis = axis) / sum_reduce(square(z), axes = [axis]);"],
    ),
    "t2n_complex_sgn": (
        _UNARY,
        ["size = t2n_complex_abs(z, axis = axis);", "zero = size == 0.0;", "y = select(zero, z, z / size);"],
    ),
    "t2n_complex_sin": _unary("sin(re) * cosh(im)", "cos(re) * sinh(im)"),
    "t2n_complex_sinh": _unary("sinh(re) * cos(im)", "cosh(re) * sin(im)"),
    "t2n_complex_sqrt": (
        _UNARY,
        [
            "size = sqrt(t2n_complex_abs(z, axis = axis));",
            "angle = t2n_complex_angle(z, axis = axis) * 0.5;",
            "y = t2n_complex_polar(size, angle, axis = axis);",
        ],
    ),
    "t2n_complex_square": (_UNARY, ["y = t2n_complex_mul(z, z, axis = axis);"]),
}
