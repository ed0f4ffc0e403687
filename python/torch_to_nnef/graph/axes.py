"""What the user says of sizes: axes as sums of names, and assertions."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument


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


@dataclass(frozen=True, slots=True)
class Condition:
    """What is asserted or assumed of sizes: `holds(sizes)`.

    numbers: those it speaks of, near which it may start or cease to hold.
    merely_unequal: torch assumes everywhere that a size is none of some others, most of all not 0 or 1; what it traced mostly holds for
    those too.
    """

    text: str
    holds: Callable[[Mapping[str, int]], bool]
    numbers: frozenset[int] = frozenset()
    merely_unequal: bool = False


def asserted(extensions: Iterable[str]) -> list[Condition]:
    """The conditions behind `tract_assert` among the lines of `extensions`.

    Raises `T2NErrorInvalidArgument` for one that cannot be read.
    """
    words = (line.split(maxsplit=1) for line in extensions)
    return [_asserted(line[-1].strip().rstrip(";")) for line in words if line[:1] == ["tract_assert"]]


def _asserted(text: str) -> Condition:
    match = _RELATION.fullmatch(text)
    try:
        left, right = (_parsed(ast.parse(side.strip(), mode="eval").body) for side in match.group(1, 3))  # type: ignore[union-attr]
    except (SyntaxError, KeyError, AttributeError):
        raise T2NErrorInvalidArgument(
            f"tract_assert {text!r}: write one relation (==, <=, >=, <, >) of sums and products: tract_assert S <= 512"
        ) from None
    relation = _RELATIONS[match.group(2)]  # type: ignore[union-attr]

    def holds(sizes: Mapping[str, int]) -> bool:
        difference = (left - right).subs({symbol(name): size for name, size in sizes.items()})
        # What is said of names that no axis has is tract's to look at.
        return bool(relation(difference, 0)) if difference.is_Integer else True

    return Condition(text, holds, frozenset(map(int, (left - right).atoms(sympy.Integer))))


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
    ast.Div: FloorDiv,
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
