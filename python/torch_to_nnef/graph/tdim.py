"""Dimensions in the form tract computes right, and as its text (TDim)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import sympy

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.torch_internals import FloorDiv

# -- torch's functions on integers, in floor division alone


def exact(expr: sympy.Basic, known: Mapping[sympy.Basic, sympy.Basic] | None = None) -> sympy.Basic:
    """`expr` with rests and roundings written as floor divisions, and what is `known` put in."""
    if known and expr in known:
        return known[expr]
    if not expr.args:
        return expr
    args = [exact(arg, known) for arg in expr.args]
    rule = _EXACT.get(type(expr).__name__)
    return rule(*args) if rule else expr.func(*args)


def _rest(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return a - b * FloorDiv(a, b)


def _rounded(name: str, up: bool = False) -> Callable[..., sympy.Expr]:
    def rule(value: sympy.Expr, *digits: sympy.Expr) -> sympy.Expr:
        ratio = None if name == "RoundToInt" else _ratio(value)
        if ratio is None or (name == "TruncToInt" and lowest(ratio[0]) < 0):
            raise T2NErrorDynamicShapeValue(
                f"the size {name}({value}) is computed in floating point, which tract does not; compute sizes in integers (//)"
            )
        above, below = ratio
        return FloorDiv(above + (below - 1 if up else 0), below)

    return rule


def _ratio(value: sympy.Expr) -> tuple[sympy.Expr, sympy.Integer] | None:
    """`value`, computed by torch in floating point, as a ratio it equals exactly; None if it may be rounded."""
    if type(value).__name__ == "IntTrueDiv" and value.args[1].is_Integer and value.args[1] > 0:
        above, below = value.args
        return above, below
    factor, rest = value.as_coeff_Mul()
    if type(rest).__name__ != "ToFloat":
        return None
    fraction = Fraction(float(factor))
    # A power of two below the line: the product has all its bits in a float.
    if fraction.denominator > 1 << 20 or abs(fraction.numerator) > 1 << 20:
        return None
    return rest.args[0] * fraction.numerator, sympy.Integer(fraction.denominator)


_EXACT: Mapping[str, Callable[..., sympy.Expr]] = {
    "Mod": _rest,
    "PythonMod": _rest,
    "CleanDiv": FloorDiv,
    "CeilToInt": _rounded("CeilToInt", up=True),
    "FloorToInt": _rounded("FloorToInt"),
    "RoundToInt": _rounded("RoundToInt"),
    "TruncToInt": _rounded("TruncToInt"),
    "Identity": lambda expr: expr,
}


def lowest(expr: sympy.Expr) -> float:
    """A bound that `expr` is never below, symbols being 0 or more; -inf if none is seen."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return 0
    name = type(expr).__name__
    if name == "Add":
        return sum(lowest(arg) for arg in expr.args)
    if name in {"Mul", "Pow"}:
        bases = expr.args if name == "Mul" else expr.args[:1]
        bounds = [lowest(base) for base in bases]
        return math.prod(bounds) if min(bounds) >= 0 else -math.inf
    if name == "FloorDiv" and expr.args[1].is_Integer and expr.args[1] > 0:
        bound = lowest(expr.args[0])
        return bound // int(expr.args[1]) if math.isfinite(bound) else bound
    if name in {"Max", "Min"}:
        return (max if name == "Max" else min)(lowest(arg) for arg in expr.args)
    return -math.inf


def same_everywhere(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are equal at sizes that share no divisor, so not by chance."""
    if a == b:
        return True
    symbols = sorted((sympy.sympify(a) - b).free_symbols, key=str)
    tried = ({s: prime + 2 * i for i, s in enumerate(symbols)} for prime in (1009, 10007))
    return all(sympy.sympify(a).subs(sizes) == sympy.sympify(b).subs(sizes) for sizes in tried)


# -- as text


def dim_text(dim: Dim) -> str:
    """`dim` as tract parses it in graph.nnef: `S`, `(P + S)`, `(4 * H)`, `(S / 2)`.

    tract rounds a division towards zero, and rewrites sums of divisions and other terms as if both ways to round were one. Both are right
    where all that is divided is positive and no division is subtracted from what it divides, so dimensions are brought into that form.
    """
    return str(dim) if isinstance(dim, int) else _text(_forward(exact(dim)))


def _forward(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with nothing negative above a line; where it can be, divisions are added, not subtracted."""
    if not expr.args:
        return expr
    if isinstance(expr, FloorDiv):
        above, below = expr.args
        floor = _floor(_forward(above), below)
        if floor is None:
            raise T2NErrorDynamicShapeValue(
                f"tract rounds ({above}) / {below} towards zero, torch down, and one of its terms may be negative"
            )
        return floor
    expr = sympy.expand(expr.func(*(_forward(arg) for arg in expr.args)))
    terms = expr.as_coefficients_dict() if expr.is_Add else {}
    for term, count in terms.items():
        if isinstance(term, FloorDiv) and count < 0:
            above, below = term.args
            # As many times as the division is subtracted: w - N // q is (q w - N + q - 1) // q.
            whole = sum(c // -count * t for t, c in terms.items() if c > 0 and not t.has(FloorDiv))
            merged = _floor(below * whole - above + below - 1, below)
            if merged is not None and not _negative(merged):
                return _forward(expr + count * (whole - term - merged))
    return expr


def _floor(above: sympy.Expr, below: sympy.Expr) -> sympy.Expr | None:
    """`above // below`, its whole parts apart and the rest positive; None if the rest has terms of both signs."""
    if not below.is_Integer or below <= 0:
        raise T2NErrorDynamicShapeValue(f"tract divides dimensions by numbers only, not {above} by {below}")
    coefficients = sympy.expand(above).as_coefficients_dict()
    constant = coefficients.pop(sympy.Integer(1), sympy.Integer(0))
    whole = constant // below + sum(c / below * term for term, c in coefficients.items() if c % below == 0)
    rest = sum(c * term for term, c in coefficients.items() if c % below)
    constant %= below
    if rest == 0:
        return whole
    if not _negative(rest):
        return whole + FloorDiv(rest + constant, below)
    return None if _negative(-rest) else whole - FloorDiv(below - 1 - constant - rest, below)


def _negative(expr: sympy.Expr) -> bool:
    """Whether a term of `expr` is, or may be, below zero."""
    return any(c < 0 or lowest(term) < 0 for term, c in expr.as_coefficients_dict().items())


def _infix(operator: str) -> Callable[[list[str]], str]:
    return lambda terms: f"({operator.join(terms)})"


def _sum(dim: sympy.Expr) -> str:
    """Terms that are subtracted come last."""
    minus = [-term for term in dim.args if term.as_coeff_Mul()[0] < 0]
    plus = [term for term in dim.args if -term not in minus]
    return f"({' - '.join([' + '.join(map(_text, plus)) or '0', *map(_text, minus)])})"


def _nested(function: str) -> Callable[[list[str]], str]:
    def text(terms: list[str]) -> str:
        head, *rest = terms
        for term in rest:
            head = f"{function}({head}, {term})"
        return head

    return text


# sympy class name -> TDim text of its printed arguments; torch's own functions are in torch/utils/_sympy/functions.py.
_TEXT: Mapping[str, Callable[[list[str]], str]] = {
    "Mul": _infix(" * "),
    "FloorDiv": lambda terms: f"({terms[0]} / {terms[1]})",
    "Max": _nested("max"),
    "Min": _nested("min"),
}


def _text(dim: sympy.Expr) -> str:
    if dim.is_Integer:
        return str(int(dim))
    if dim.is_Symbol:
        return str(dim)
    if dim.is_Add:
        return _sum(dim)
    if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
        return _infix(" * ")([_text(dim.base)] * int(dim.exp))
    printer = _TEXT.get(type(dim).__name__)
    if printer is None:
        raise T2NErrorDynamicShapeValue(
            f"tract has no form for the dimension {dim} ({type(dim).__name__}); compute sizes in integers (//, not int(x * 0.3))"
        )
    return printer([_text(arg) for arg in dim.args])
