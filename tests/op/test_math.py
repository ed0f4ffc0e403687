"""Arithmetic, logic and special functions: exact on integers, with torch's nan and infinities."""

import math

import pytest
import torch
import torch.nn.functional as F
from rows import B, Row, check, flags, ids, unary, x

INF, NAN = math.inf, math.nan
EDGES = torch.tensor([[-INF, -3.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, INF, NAN]]).repeat(2, 1)
# Beyond what f32 and f64 hold, so a detour through floats shows.
LARGE = torch.tensor([[2**53 + 1, -(2**53) - 1, 7, -7], [2**62 + 3, -(2**62) + 5, 0, 1]])
DIVISORS = torch.tensor([[3, -3, 2, -2], [5, 7, -11, 13]])
# Quotients that are whole numbers, which a division by the reciprocal misses.
WHOLE = (torch.arange(1, 50.0)[:, None] * torch.arange(1, 8.0), torch.arange(1, 50.0)[:, None].repeat(1, 7))
BOTH = {"args_0": B, "args_1": B}


def two(function, a, b, name=None):
    return Row(name or function.__name__, lambda *args: function(*args), (a, b), BOTH)


def edges(function, name=None):
    return Row(f"{name or function.__name__}_edges", lambda t: function(t), (EDGES,), {"args_0": B})


def with_dtype(name, function, *inputs):
    return Row(name, function, inputs, {f"args_{i}": B for i in range(len(inputs))})


SPECIAL = torch.special
WIDE = torch.linspace(-12.0, 12.0, 98).reshape(2, 49)
ROWS = [
    # division
    *[two(f, LARGE, DIVISORS, f"{f.__name__}_integers") for f in (torch.floor_divide, torch.remainder, torch.fmod)],
    two(lambda a, b: torch.div(a, b, rounding_mode="trunc"), LARGE, DIVISORS, "div_trunc_integers"),
    *[two(f, *WHOLE, f"{f.__name__}_whole") for f in (torch.floor_divide, torch.remainder, torch.fmod)],
    two(lambda a, b: torch.div(a, b, rounding_mode="trunc"), *WHOLE, "div_trunc_whole"),
    two(torch.remainder, torch.tensor([[6.0, -6.0], [1.0, 5.0]]), torch.tensor([[0.1, 0.1], [0.1, -0.3]]), "remainder_broken"),
    Row("remainder_unsigned", lambda a: a % 7, (ids(3, 4, high=250).to(torch.uint8),), {"args_0": B}),
    Row("remainder_of_number", lambda a: 7 % (a + 1), (ids(3, 4),), {"args_0": B}),
    Row("div_half", lambda a, b: a / b, (x(3, 4).half(), torch.full((3, 4), 3e-5).half()), BOTH),
    # integers
    two(torch.bitwise_left_shift, LARGE, torch.tensor([[0, 63, 64, -1], [1, 2, 3, 100]]), "shift_left"),
    two(torch.bitwise_right_shift, LARGE, torch.tensor([[0, 63, 64, -1], [1, 2, 3, 100]]), "shift_right"),
    Row("shift_number", lambda a: (a << 3) >> 1, (LARGE,), {"args_0": B}),
    two(torch.gcd, torch.tensor([[12, -18, 0], [0, 2**61, 832040]]), torch.tensor([[8, 27, 5], [0, 2**40, 1346269]])),
    two(torch.lcm, torch.tensor([[12, -18, 0], [0, 21, 6]]), torch.tensor([[8, 27, 5], [0, 6, -4]])),
    Row("square_integers", lambda a: (a**2, a * a, a.square(), a**5), (ids(3, 4, high=1000) * 1001 - 500,), {"args_0": B}),
    two(torch.pow, torch.tensor([[1, -1, 0, 3], [-2, 7, -1, 2]]), torch.tensor([[-3, -3, 2, -1], [5, 0, 4, 62]]), "pow_integers"),
    Row("sum_large_integers", lambda a: (a.sum(), a.sum(1), a.sum((0, 1), keepdim=True), a.cumsum(0)), (LARGE // 4,), {"args_0": B}),
    Row("ceil_integers", lambda a: (a.ceil(), a.floor(), a.round(), a.trunc()), (ids(3, 4),), {"args_0": B}),
    # booleans
    two(lambda a, b: (a == b, torch.isclose(a, b, equal_nan=True), a < b, a * b, a + b, torch.maximum(a, b), torch.minimum(a, b)), flags(3, 4), ~flags(3, 4).roll(1), "booleans"),
    Row("reduce_booleans", lambda a: (a.sum(1), a.amax(0), a.max(1), a.prod(1), a.cummax(1), a.sort(1)[0], a.any(), a.all()), (flags(3, 4),), {"args_0": B}),
    # comparison and choice
    *[edges(f) for f in (torch.isnan, torch.isinf, torch.isposinf, torch.isneginf, torch.isfinite, torch.signbit, torch.sgn)],
    *[edges(f) for f in (torch.nan_to_num, torch.angle, torch.logical_not, torch.trunc, torch.exp2, torch.log1p, torch.expm1)],
    edges(lambda t: torch.nan_to_num(t, 1.0, 2.0, -2.0), "nan_to_num_given"),
    edges(lambda t: (torch.maximum(t, t.flip(1)), torch.minimum(t, t.flip(1))), "maximum"),
    edges(lambda t: (torch.fmax(t, t.flip(1)), torch.fmin(t, t.flip(1))), "fmax"),
    edges(lambda t: torch.logaddexp(t, t.flip(1)), "logaddexp"),
    edges(lambda t: torch.copysign(torch.ones_like(t), torch.nan_to_num(t, 1.0)), "copysign"),
    edges(lambda t: torch.isclose(t, t.flip(1)) | torch.isclose(t, t, equal_nan=True), "isclose"),
    edges(lambda t: torch.xlogy(t, t.flip(1).abs()), "xlogy"),
    edges(lambda t: torch.heaviside(t.nan_to_num(), t.new_full((1,), 0.25)), "heaviside"),
    edges(lambda t: (torch.where(t > 0, 1.0, t), torch.where(t > 0, t, 2.0), torch.where(t > 0, 1.0, 2.0)), "where_numbers"),
    edges(torch.frexp),
    two(torch.atan2, x(3, 7), x(3, 7, seed=1)),
    two(torch.atan2, torch.tensor([[1.0, -1, 1, -1, 0.0, -0.0, 0.0, -0.0, 2]]).repeat(2, 1), torch.tensor([[-0.0, -0.0, 0, 0, -0.0, -0.0, 0, 0, -3]]).repeat(2, 1), "atan2_zeros"),
    two(torch.hypot, x(3, 7) * 1e25, x(3, 7, seed=1) * 1e25),
    two(torch.ldexp, x(3, 7), ids(3, 7) - 2),
    two(torch.logaddexp2, x(3, 7), x(3, 7, seed=1)),
    unary(lambda t: torch.expm1(t * 1e-4) * 1e4, "expm1_small"),
    unary(lambda t: torch.log1p(t * 1e-4) * 1e4, "log1p_small"),
    unary(lambda t: (torch.round(t, decimals=2), torch.round(t * 1000, decimals=-2)), "round_decimals"),
    Row("half_beside_numbers", lambda a, w: a * (w * 0.5 + 1.0), (x(3, 4).half(), torch.tensor([0.3]).half()), {"args_0": B}),
    # special functions
    *[Row(f.__name__, lambda t, f=f: f(t), (WIDE,), {"args_0": B}) for f in (torch.lgamma, torch.digamma, torch.erfc, SPECIAL.erfcx, SPECIAL.ndtr, SPECIAL.log_ndtr)],
    *[Row(f.__name__, lambda t, f=f: f(t), (WIDE,), {"args_0": B}) for f in (SPECIAL.i0, SPECIAL.i0e, SPECIAL.i1, SPECIAL.i1e, SPECIAL.spherical_bessel_j0)],
    *[Row(f.__name__, lambda t, f=f: f(t), (WIDE * 5,), {"args_0": B}) for f in (SPECIAL.bessel_j0, SPECIAL.bessel_j1)],
    *[Row(f.__name__, lambda t, f=f: f(t), (WIDE.abs() * 5,), {"args_0": B}) for f in (SPECIAL.bessel_y0, SPECIAL.bessel_y1)],
    *[Row(f.__name__, lambda t, f=f: f(t), (WIDE.abs(),), {"args_0": B}) for f in (SPECIAL.modified_bessel_k0, SPECIAL.modified_bessel_k1)],
    *[Row(f.__name__, lambda t, f=f: f(t), (WIDE.abs(),), {"args_0": B}) for f in (SPECIAL.scaled_modified_bessel_k0, SPECIAL.scaled_modified_bessel_k1)],
    *[Row(f"polygamma_{n}", lambda t, n=n: torch.polygamma(n, t), (WIDE + 0.13,), {"args_0": B}) for n in (1, 2, 3)],
    Row("mvlgamma", lambda t: torch.mvlgamma(t, 3), (WIDE.abs() + 1.5,), {"args_0": B}),
    Row("erfinv", lambda t: torch.erfinv(t), (torch.linspace(-1, 1, 42).reshape(2, 21),), {"args_0": B}),
    Row("ndtri", lambda t: SPECIAL.ndtri(t), (torch.tensor([[0.0, 1e-37, 1e-20, 1e-6, 0.1, 0.5, 0.7, 0.9999, 1.0]]).repeat(2, 1),), {"args_0": B}),
    edges(lambda t: (SPECIAL.entr(t), SPECIAL.xlog1py(t, t.abs())), "entr"),
    # activations
    unary(lambda t: (F.threshold(t, 0.1, 20.0), F.hardshrink(t), F.softshrink(t), F.tanhshrink(t), F.rrelu(t)), "shrinks"),
    *[Row(f"prelu_one_{n}", lambda a, w: F.prelu(a, w), (a, w)) for n, (a, w) in enumerate([(torch.tensor(-2.0), torch.tensor([0.25])), (x(2, 3, 4), torch.tensor([0.25])), (x(2, 3, 4), torch.tensor(0.25))])],
    # losses
    *[two(lambda a, b, r=r: F.hinge_embedding_loss(a, b, 0.7, reduction=r), x(3, 4), flags(3, 4) * 2 - 1, f"hinge_embedding_loss_{r}") for r in ("mean", "none")],
    Row("cosine_embedding_loss", lambda a, b, t: F.cosine_embedding_loss(a, b, t, 0.1, reduction="none"), (x(3, 4), x(3, 4, seed=1), flags(3) * 2 - 1), {**BOTH, "args_2": B}),
    Row("cross_entropy", lambda a, b: F.cross_entropy(a, b, label_smoothing=0.1), (x(4, 5), ids(4)), {}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_math_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)
