"""Torch's shape symbols under the user's axis names, and their expressions as tract's TDim text."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument
from torch_to_nnef.graph.ir import Dim


def symbol(name: str) -> sympy.Symbol:
    """The dimension `name`: an integer from 0."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def axis_expression(text: str) -> sympy.Expr:
    """The size of an axis as the user wrote it: `S`, `2*S`, `S+P`, `4*S+1`.

    Raises `T2NErrorDynamicShapeValue` for what is no sum of multiples of names: tract finds the sizes from those alone.
    """
    try:
        expr = _parsed(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError):
        expr = None
    terms = {} if expr is None else sympy.expand(expr).as_coefficients_dict()
    names = [term for term in terms if term != 1]
    if not names or not all(term.is_Symbol for term in names) or not all(c.is_Integer for c in terms.values()):
        raise T2NErrorDynamicShapeValue(
            f"{text!r} is no size of an axis; write a name, or a sum of multiples of names: S, 2*S, S+P, 4*S+1"
        )
    return expr


def asserted(extensions: Iterable[str]) -> dict[str, Callable[[Mapping[str, int]], bool]]:
    """The conditions behind `tract_assert` among the lines of `extensions`, by their text.

    Raises `T2NErrorInvalidArgument` for one that cannot be read, as tract would on loading.
    """
    lines = (line.split(maxsplit=1) for line in extensions if line.split(maxsplit=1)[:1] == ["tract_assert"])
    return {text: _condition(text) for text in (line[-1].strip().rstrip(";") for line in lines)}


def _condition(text: str) -> Callable[[Mapping[str, int]], bool]:
    # `name: condition` holds in one scenario of tract's, of which there is none here.
    match = _RELATION.fullmatch(text)
    try:
        left, right = (_parsed(ast.parse(side.strip(), mode="eval").body) for side in match.group(1, 3))  # type: ignore[union-attr]
    except (SyntaxError, KeyError, AttributeError):
        raise T2NErrorInvalidArgument(
            f"tract_assert {text!r}: write one relation (==, <=, >=, <, >) of sums and products: tract_assert S <= 512"
        ) from None
    relation = _RELATIONS[match.group(2)]  # type: ignore[union-attr]

    def holds(sizes: Mapping[str, int]) -> bool:
        values = {symbol(name): size for name, size in sizes.items()}
        difference = (left - right).subs(values)
        # What is said of names that no axis has is tract's to look at.
        return bool(relation(difference, 0)) if difference.is_Integer else True

    return holds


_RELATION = re.compile(r"([^=<>]+)(==|<=|>=|<|>)([^=<>]+)")
_RELATIONS: Mapping[str, Callable[[sympy.Expr, int], bool]] = {
    "==": operator.eq,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_OPERATORS: Mapping[type[ast.operator], Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def _parsed(tree: ast.expr) -> sympy.Expr:
    if isinstance(tree, ast.Name):
        return symbol(tree.id)
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return sympy.Integer(tree.value)
    return _OPERATORS[type(tree.op)](_parsed(tree.left), _parsed(tree.right))  # type: ignore[attr-defined]


def solved(sizes: Iterable[tuple[str, int, str]]) -> dict[str, int]:
    """The size of every name, from `(expression, its size, where it is)`.

    Raises `T2NErrorDynamicShapeValue` if two disagree, or one cannot be found.
    """
    found: dict[str, int] = {}
    origin: dict[str, str] = {}
    # Names that stand alone come first: they say what the others are.
    for text, size, where in sorted(sizes, key=lambda item: not item[0].isidentifier()):
        expr = axis_expression(text).subs({symbol(n): s for n, s in found.items()})
        unknown = list(expr.free_symbols)
        if len(unknown) > 1:
            raise T2NErrorDynamicShapeValue(
                f"{where} is {text!r}, which leaves {sorted(map(str, unknown))} open; name axes of theirs too"
            )
        if not unknown:
            if expr != size:
                raise T2NErrorDynamicShapeValue(
                    f"axis {text!r} has size {expr} {origin.get(text, 'by its parts')} but {size} in {where}; give them different names"
                )
            continue
        slope, offset = expr.coeff(unknown[0]), expr.subs({unknown[0]: 0})
        value = (size - offset) / slope
        if not value.is_Integer or value < 0:
            raise T2NErrorDynamicShapeValue(f"{where} has size {size}, which {text!r} is for no {unknown[0]}")
        found[str(unknown[0])] = int(value)
        origin[str(unknown[0])] = f"in {where}"
    return found


class Symbols:
    """Renames torch's symbols (`s27`) to what the user calls them: names of axes, or expressions of such.

    `guards` are what torch assumed of sizes: those that equal a number are that number.
    """

    def __init__(self, names: Mapping[sympy.Symbol, sympy.Expr], guards: Iterable[sympy.Basic] = ()) -> None:
        self._names, self._guards = names, tuple(guards)
        equal = (guard for guard in self._guards if isinstance(guard, sympy.Eq) and guard.rhs.is_Integer)
        self._known = {guard.lhs: guard.rhs for guard in equal if guard.lhs.args}

    def assumed(self) -> dict[str, Callable[[Mapping[str, int]], bool]]:
        """What torch assumed of sizes while it traced, by its text in the user's names.

        Left out is that a size is not another one: torch assumes so of 0 and 1 everywhere, and what it traced holds for them too.
        """
        parts = (part for guard in self._guards for part in (guard.args if isinstance(guard, sympy.And) else (guard,)))
        own = [
            part.xreplace(self._names)
            for part in parts
            if not isinstance(part, sympy.Ne) and part.free_symbols <= self._names.keys()
        ]
        return {str(guard): _holds(guard) for guard in own if guard not in (sympy.true, sympy.false)}

    def dim(self, size: int | torch.SymInt | torch.SymFloat) -> Dim:
        """The dimension, or the float computed from dimensions, behind a number that torch reports."""
        if isinstance(size, (int, float)):
            return size
        expr = exact(size.node.expr, self._known)
        unnamed = [s for s in expr.free_symbols if s not in self._names]
        if unnamed:
            raise T2NErrorDynamicShapeValue(
                f"the size {expr} depends on the data ({', '.join(map(str, unnamed))}), not on a dynamic axis of an input: "
                "tract cannot plan such a tensor; compute it with masks (torch.where) or name the axis in dynamic_axes"
            )
        expr = exact(expr.xreplace(self._names))
        return int(expr) if expr.is_Integer else expr


def _holds(guard: sympy.Basic) -> Callable[[Mapping[str, int]], bool]:
    def holds(sizes: Mapping[str, int]) -> bool:
        try:
            return guard.xreplace({symbol(name): sympy.Integer(size) for name, size in sizes.items()}) != sympy.false
        except ZeroDivisionError:
            return False

    return holds


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


def _rounded(up: bool, name: str) -> Callable[[sympy.Expr], sympy.Expr]:
    def rule(value: sympy.Expr) -> sympy.Expr:
        ratio = _ratio(value)
        if ratio is None or (name == "TruncToInt" and lowest(ratio[0]) < 0):
            return sympy.Function(name)(value)
        numerator, denominator = ratio
        return FloorDiv(numerator + (denominator - 1 if up else 0), denominator)

    return rule


def _ratio(value: sympy.Expr) -> tuple[sympy.Expr, sympy.Integer] | None:
    """`value`, computed by torch in floating point, as a ratio it equals exactly; None if it may be rounded."""
    if type(value).__name__ == "IntTrueDiv" and value.args[1].is_Integer and value.args[1] > 0:
        return value.args
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
    "CeilToInt": _rounded(True, "CeilToInt"),
    "FloorToInt": _rounded(False, "FloorToInt"),
    "TruncToInt": _rounded(False, "TruncToInt"),
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
    for term in expr.args if expr.is_Add else ():
        if isinstance(-term, FloorDiv):
            above, below = (-term).args
            merged = _floor(below * (expr - term) - above + below - 1, below)
            if merged is not None and not _negative(merged):
                return merged
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
