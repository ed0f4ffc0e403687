"""Special functions, by formulas that hold to f32: Abramowitz and Stegun (1964), Numerical Recipes (1992), Giles (2010)."""

from __future__ import annotations

import math

import torch

from torch_to_nnef.op.elementwise import compare
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.fragments_special import horner
from torch_to_nnef.op.operand import as_ref, elementwise
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref

aten = torch.ops.aten

# Fragment -> ATen op of one tensor, computed in f32 or wider.
_SPECIAL = {
    "t2n_bessel_j0": aten.special_bessel_j0.default,
    "t2n_bessel_j1": aten.special_bessel_j1.default,
    "t2n_bessel_y0": aten.special_bessel_y0.default,
    "t2n_bessel_y1": aten.special_bessel_y1.default,
    "t2n_bessel_i0": aten.i0.default,
    "t2n_bessel_i0e": aten.special_i0e.default,
    "t2n_bessel_i1": aten.special_i1.default,
    "t2n_bessel_i1e": aten.special_i1e.default,
    "t2n_bessel_k0": aten.special_modified_bessel_k0.default,
    "t2n_bessel_k0e": aten.special_scaled_modified_bessel_k0.default,
    "t2n_bessel_k1": aten.special_modified_bessel_k1.default,
    "t2n_bessel_k1e": aten.special_scaled_modified_bessel_k1.default,
    "t2n_entr": aten.special_entr.default,
    "t2n_erfc": aten.erfc.default,
    "t2n_erfcx": aten.special_erfcx.default,
    "t2n_erfinv": aten.erfinv.default,
    "t2n_lgamma": aten.lgamma.default,
    "t2n_log_ndtr": aten.special_log_ndtr.default,
    "t2n_ndtr": aten.special_ndtr.default,
    "t2n_ndtri": aten.special_ndtri.default,
    "t2n_spherical_bessel_j0": aten.special_spherical_bessel_j0.default,
}
_SAME = {
    "t2n_bessel_i0": aten.special_modified_bessel_i0.default,
    "t2n_bessel_i1": aten.special_modified_bessel_i1.default,
}


def _special(fragment: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        return _call(e, fragment, x)

    return lower


def _call(e: Emitter, fragment: str, x: Ref) -> Ref:
    wide = torch.promote_types(e.out.dtype, torch.float32)
    return e.cast(elementwise(e, fragment, x, dtype=wide), e.out.dtype)


for _table in (_SPECIAL, _SAME):
    for _fragment, _op in _table.items():
        lowers(_op)(_special(_fragment))


@lowers(aten.special_xlog1py.default, aten.special_xlog1py.self_scalar, aten.special_xlog1py.other_scalar)
def xlog1py(e: Emitter, x: Ref | Scalar, other: Ref | Scalar) -> Ref:
    """X * log(1 + other), 0 where x is."""
    wide = torch.promote_types(e.out.dtype, torch.float32)
    return e.cast(elementwise(e, "t2n_xlog1py", x, other, dtype=wide), e.out.dtype)


@lowers(aten.mvlgamma.default)
def mvlgamma(e: Emitter, x: Ref, p: int) -> Ref:
    """The logarithm of the multivariate gamma function: a sum of p lgammas, half apart."""
    total: Ref | float = p * (p - 1) / 4 * math.log(math.pi)
    for k in range(p):
        part = _call(e, "t2n_lgamma", e.binary("sub", x, k / 2, e.out.dtype) if k else x)
        total = e.binary("add", part, total, e.out.dtype)
    return as_ref(e, total, e.out.dtype)


@lowers(aten.digamma.default)
def digamma(e: Emitter, x: Ref) -> Ref:
    """Derivative of lgamma."""
    return polygamma(e, 0, x)


@lowers(aten.polygamma.default)
def polygamma(e: Emitter, n: int, x: Ref) -> Ref:
    """Derivative n of digamma, by recurrence and its asymptotic series; below 0 by reflection."""
    x = e.cast(x, torch.promote_types(e.out.dtype, torch.float32))
    fragment = e.define(f"t2n_polygamma_{n}", "(x: tensor<scalar>) -> (y: tensor<scalar>)", _polygamma(n))
    y = e.op(fragment, x)
    if n == 0:  # at poles torch has nan for the first derivative of lgamma, infinity for the others
        pole = e.binary("and", compare(e, "lt", x, 0), compare(e, "eq", x, e.op("floor", x)), torch.bool)
        y = e.op("select", pole, e.full(math.nan, y.dtype), y, dtype=y.dtype)
    return e.cast(y, e.out.dtype)


# Bernoulli's numbers B_2, B_4, ...
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730)
_SHIFT = 8


def _polygamma(n: int) -> list[str]:
    """Body of the fragment: derivative n at z, which is x or, below 0, 1 - x, from its series at z + 8; then at x by reflection."""
    # Without its sign, the function is a sum of powers of 1 / w and, a step down from w to z each, of 1 / (z + k).
    series = [(math.factorial(n) / 2, n + 1), *_bernoulli(n)]
    series += [(math.factorial(n - 1), n)] if n else []
    terms = [f"{_power('u', power)} * {float(factor)!r}" for factor, power in series]
    terms += [f"{_power(f'recip(z + {k}.0)', n + 1)} * {float(math.factorial(n))!r}" for k in range(_SHIFT)]
    start = "neg(log(w))" if n == 0 else "z * 0.0"
    sums = [f"sum_{i + 1} = sum_{i} + {term};" for i, term in enumerate(terms)]
    return [
        "left = x < 0.0;",
        "z = select(left, neg(x) + 1.0, x);",
        f"w = z + {_SHIFT}.0;",
        "u = recip(w);",
        f"sum_0 = {start};",
        *sums,
        f"right = sum_{len(terms)} * {(-1.0) ** (n + 1)!r};",
        "cot = recip(tan((x - round(x)) * 3.14159265));",
        *horner("slope", "cot", _cotangent_derivative(n)),
        f"y = select(left, right * {(-1.0) ** n!r} - slope * {math.pi ** (n + 1)!r}, right);",
    ]


def _bernoulli(n: int) -> list[tuple[float, int]]:
    return [(b * math.factorial(2 * j + n - 1) / math.factorial(2 * j), 2 * j + n) for j, b in enumerate(_BERNOULLI, 1)]


def _cotangent_derivative(n: int) -> list[float]:
    """Coefficients of derivative n of cot(t) as a polynomial in cot(t), whose own derivative is -(1 + cot(t)^2)."""
    coefficients = [0.0, 1.0]
    for _ in range(n):
        slope = [power * c for power, c in enumerate(coefficients)][1:]
        coefficients = [-(low + high) for low, high in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]
    return coefficients


def _power(base: str, power: int) -> str:
    return f"pow({base}, {power}.0)" if power > 1 else base
