"""Fragments of special functions: series and polynomials whose errors are below those of f32.

Bessel functions by the polynomials of Abramowitz and Stegun (1964), 9.4 and 9.8; erfc by that of Numerical Recipes (1992), 6.2; erfinv by
that of Giles (2010).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_to_nnef.op.statement import Fragment

_UNARY = "(x: tensor<scalar>) -> (y: tensor<scalar>)"
_BINARY = "(x: tensor<scalar>, y: tensor<scalar>) -> (z: tensor<scalar>)"


def horner(name: str, t: str, coefficients: Sequence[float]) -> list[str]:
    """Lines that give `name` the polynomial in `t`, from the constant coefficient up; one line a step, since tract parses nests slowly."""
    *low, value = (repr(float(c)) for c in coefficients)
    lines = []
    for k, coefficient in reversed(list(enumerate(low))):
        step = f"{name}_{k}" if k else name
        lines.append(f"{step} = {t} * {value} + {coefficient};")
        value = step
    return lines


_J0 = (1.0, -2.2499997, 1.2656208, -0.3163866, 0.0444479, -0.0039444, 0.0002100)
_J1 = (0.5, -0.56249985, 0.21093573, -0.03954289, 0.00443319, -0.00031761, 0.00001109)
_Y0 = (0.36746691, 0.60559366, -0.74350384, 0.25300117, -0.04261214, 0.00427916, -0.00024846)
_Y1 = (-0.6366198, 0.2212091, 2.1682709, -1.3164827, 0.3123951, -0.0400976, 0.0027873)
_FAR_0 = (0.79788456, -0.00000077, -0.00552740, -0.00009512, 0.00137237, -0.00072805, 0.00014476)
_FAR_1 = (0.79788456, 0.00000156, 0.01659667, 0.00017105, -0.00249511, 0.00113653, -0.00020033)
_PHASE_0 = (-0.78539816, -0.04166397, -0.00003954, 0.00262573, -0.00054125, -0.00029333, 0.00013558)
_PHASE_1 = (-2.35619449, 0.12499612, 0.00005650, -0.00637879, 0.00074348, 0.00079824, -0.00029166)
_I0 = (1.0, 3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813)
_I1 = (0.5, 0.87890594, 0.51498869, 0.15084934, 0.02658733, 0.00301532, 0.00032411)
_I0_FAR = (
    0.39894228,
    0.01328592,
    0.00225319,
    -0.00157565,
    0.00916281,
    -0.02057706,
    0.02635537,
    -0.01647633,
    0.00392377,
)
_I1_FAR = (
    0.39894228,
    -0.03988024,
    -0.00362018,
    0.00163801,
    -0.01031555,
    0.02282967,
    -0.02895312,
    0.01787654,
    -0.00420059,
)
_K0 = (-0.57721566, 0.42278420, 0.23069756, 0.03488590, 0.00262698, 0.00010750, 0.00000740)
_K1 = (1.0, 0.15443144, -0.67278579, -0.18156897, -0.01919402, -0.00110404, -0.00004686)
_K0_FAR = (1.25331414, -0.07832358, 0.02189568, -0.01062446, 0.00587872, -0.00251540, 0.00053208)
_K1_FAR = (1.25331414, 0.23498619, -0.03655620, 0.01504268, -0.00780353, 0.00325614, -0.00068245)
# fmt: off
_ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277,
)
_ERFINV = (
    1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.00021858087, -4.39150654e-06, -3.5233877e-06, 3.43273939e-07,
    2.81022636e-08,
)
_ERFINV_FAR = (
    2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773, -0.00367342844, 0.00134934322, 0.000100950558,
    -0.000200214257,
)
# fmt: on


def _wave(part: str, far: Sequence[float], phase: Sequence[float]) -> list[str]:
    """`far`, a Bessel function of s beyond 3: a wave of slowly changing size and phase."""
    return [
        "beyond = max(s, 3.0);",
        "v = recip(beyond) * 3.0;",
        *horner("size", "v", far),
        *horner("phase", "v", phase),
        f"far = size * {part}(beyond + phase) * rsqrt(beyond);",
    ]


def _modified(near: Sequence[float], far: Sequence[float], factor: str) -> list[str]:
    """I of the magnitude s of x, times exp(-s)."""
    return [
        "s = abs(x);",
        "t = square(s / 3.75);",
        *horner("near", "t", near),
        "beyond = max(s, 3.75);",
        "v = recip(beyond) * 3.75;",
        *horner("far", "v", far),
        f"magnitude = select(s < 3.75, near{factor} * exp(neg(s)), far * rsqrt(beyond));",
    ]


def _second(far: Sequence[float]) -> list[str]:
    """`far`, K of x beyond 2 times exp(x), and h, half of x, and t, its square."""
    return ["h = x * 0.5;", "t = square(h);", "v = recip(max(h, 1.0));", *horner("far", "v", far)]


SPECIAL: dict[str, Fragment] = {
    "t2n_bessel_i0": (_UNARY, ["y = t2n_bessel_i0e(x) * exp(abs(x));"]),
    "t2n_bessel_i0e": (_UNARY, [*_modified(_I0, _I0_FAR, ""), "y = magnitude;"]),
    "t2n_bessel_i1": (_UNARY, ["y = t2n_bessel_i1e(x) * exp(abs(x));"]),
    "t2n_bessel_i1e": (_UNARY, [*_modified(_I1, _I1_FAR, " * s"), "y = magnitude * sign(x);"]),
    "t2n_bessel_j0": (
        _UNARY,
        [
            "s = abs(x);",
            "t = square(s / 3.0);",
            *horner("near", "t", _J0),
            *_wave("cos", _FAR_0, _PHASE_0),
            "y = select(s < 3.0, near, far);",
        ],
    ),
    "t2n_bessel_j1": (
        _UNARY,
        [
            "s = abs(x);",
            "t = square(s / 3.0);",
            *horner("near", "t", _J1),
            *_wave("cos", _FAR_1, _PHASE_1),
            "y = select(s < 3.0, near * s, far) * sign(x);",
        ],
    ),
    "t2n_bessel_k0": (_UNARY, ["y = t2n_bessel_k0e(x) * exp(neg(x));"]),
    "t2n_bessel_k0e": (
        _UNARY,
        [
            *_second(_K0_FAR),
            *horner("even", "t", _K0),
            "near = (even - log(h) * t2n_bessel_i0(x)) * exp(x);",
            "y = select(x < 2.0, near, far * rsqrt(max(x, 2.0)));",
        ],
    ),
    "t2n_bessel_k1": (_UNARY, ["y = t2n_bessel_k1e(x) * exp(neg(x));"]),
    # At 0 the logarithm is infinite and its factor zero: it adds nothing.
    "t2n_bessel_k1e": (
        _UNARY,
        [
            *_second(_K1_FAR),
            *horner("odd", "t", _K1),
            "added = select(eq(x, 0.0), x, log(h) * t2n_bessel_i1(x));",
            "near = (odd / x + added) * exp(x);",
            "y = select(x < 2.0, near, far * rsqrt(max(x, 2.0)));",
        ],
    ),
    "t2n_bessel_y0": (
        _UNARY,
        [
            "s = x;",
            "t = square(s / 3.0);",
            *horner("even", "t", _Y0),
            "near = even + log(x * 0.5) * t2n_bessel_j0(x) * 0.63661977;",
            *_wave("sin", _FAR_0, _PHASE_0),
            "y = select(s < 3.0, near, far);",
        ],
    ),
    "t2n_bessel_y1": (
        _UNARY,
        [
            "s = x;",
            "t = square(s / 3.0);",
            *horner("odd", "t", _Y1),
            "added = select(eq(x, 0.0), x, log(x * 0.5) * t2n_bessel_j1(x) * 0.63661977);",
            *_wave("sin", _FAR_1, _PHASE_1),
            "y = select(s < 3.0, odd / x + added, far);",
        ],
    ),
    "t2n_entr": (_UNARY, ["y = select(x > 0.0, neg(x) * log(x), select(x < 0.0, log(max(x, 0.0)), x));"]),
    # tract's erf errs by 3e-7, which 1 - erf would make the whole of a small result.
    "t2n_erfc": (
        _UNARY,
        ["right = t2n_erfcx_right(abs(x)) * exp(neg(square(x)));", "y = select(x < 0.0, neg(right) + 2.0, right);"],
    ),
    "t2n_erfcx": (
        _UNARY,
        ["right = t2n_erfcx_right(abs(x));", "y = select(x < 0.0, exp(square(x)) * 2.0 - right, right);"],
    ),
    "t2n_erfcx_right": (_UNARY, ["t = recip(x * 0.5 + 1.0);", *horner("p", "t", _ERFC), "y = exp(p) * t;"]),
    # An infinite w is that of 1 and -1.
    "t2n_erfinv": (
        _UNARY,
        [
            "w = neg(log((neg(x) + 1.0) * (x + 1.0)));",
            "a = w - 2.5;",
            *horner("near", "a", _ERFINV),
            "b = sqrt(max(w, 5.0)) - 3.0;",
            *horner("far", "b", _ERFINV_FAR),
            "y = select(w < 5.0, near, select(w > 100.0, w, far)) * x;",
        ],
    ),
    # Stirling's series of z + 8, and recurrence down to z; below 1/2 the reflection formula.
    "t2n_lgamma": (
        _UNARY,
        [
            "z = select(x < 0.5, neg(x) + 1.0, x);",
            "low = z * (z + 1.0) * (z + 2.0) * (z + 3.0);",
            "high = (z + 4.0) * (z + 5.0) * (z + 6.0) * (z + 7.0);",
            "w = select(z < 8.0, z + 8.0, z);",
            "u = recip(w);",
            "v = square(u);",
            *horner("series", "v", (0.083333333, -0.0027777778, 0.00079365079)),
            "stirling = (w - 0.5) * (log(w) - 1.0) + 0.41893853 + series * u;",
            "right = select(z < 8.0, stirling - log(low) - log(high), stirling);",
            "left = neg(log(abs(sin((x - round(x)) * 3.1415927)))) + 1.1447299 - right;",
            "y = select(x < 0.5, left, right);",
        ],
    ),
    "t2n_log_ndtr": (
        _UNARY,
        [
            "s = x * 0.70710678;",
            "left = log(t2n_erfcx_right(abs(s)) * 0.5) - square(s);",
            "y = select(x < -1.0, left, t2n_log1p(t2n_erfc(s) * -0.5));",
        ],
    ),
    "t2n_ndtr": (_UNARY, ["y = t2n_erfc(x * -0.70710678) * 0.5;"]),
    # Abramowitz and Stegun 26.2.23 for the smaller tail, and one step of Newton's on its logarithm.
    "t2n_ndtri": (
        _UNARY,
        [
            "tail = min(x, neg(x) + 1.0);",
            "goal = log(tail);",
            "t = sqrt(goal * -2.0);",
            *horner("over", "t", (2.515517, 0.802853, 0.010328)),
            *horner("under", "t", (1.0, 1.432788, 0.189269, 0.001308)),
            "guess = over / under - t;",
            "reached = t2n_log_ndtr(guess);",
            "slope = exp(neg(square(guess)) * 0.5 - 0.91893853 - reached);",
            "left = select(eq(tail, 0.0), goal, guess - (reached - goal) / slope);",
            "y = select(x > 0.5, neg(left), left);",
        ],
    ),
    "t2n_spherical_bessel_j0": (
        _UNARY,
        ["y = select(abs(x) < 0.01, neg(square(x)) / 6.0 + 1.0, sin(x) / x);"],
    ),
    "t2n_xlog1py": (_BINARY, ["z = select(and(eq(x, 0.0), eq(y, y)), x, x * t2n_log1p(y));"]),
}
