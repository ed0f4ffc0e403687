"""Torch's shape symbols under the user's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy
import torch

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.axes import Condition, symbol
from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.graph.tdim import exact


class Symbols:
    """Renames torch's symbols (`s27`) to what the user calls them: names of axes, or expressions of such.

    `guards` are what torch assumed of sizes: those that equal a number are that number.
    """

    def __init__(self, names: Mapping[sympy.Symbol, sympy.Expr], guards: Iterable[sympy.Basic] = ()) -> None:
        self._names, self._guards = names, tuple(guards)
        equal = (guard for guard in self._guards if isinstance(guard, sympy.Eq) and guard.rhs.is_Integer)
        self._known = {guard.lhs: guard.rhs for guard in equal if guard.lhs.args}

    def assumed(self) -> list[Condition]:
        """What torch assumed of sizes while it traced, in the user's names."""
        parts = (part for guard in self._guards for part in (guard.args if isinstance(guard, sympy.And) else (guard,)))
        own = {part.xreplace(self._names): None for part in parts if part.free_symbols <= self._names.keys()}
        return [_condition(guard) for guard in own if guard not in (sympy.true, sympy.false)]

    def unnamed(self, number: torch.SymInt | torch.SymFloat) -> list[sympy.Symbol]:
        """Symbols of `number` that no dynamic axis has: values torch knows only when the model runs."""
        return self._unnamed(number.node.expr)

    def _unnamed(self, expr: sympy.Basic) -> list[sympy.Symbol]:
        return [symbol for symbol in expr.free_symbols if symbol not in self._names]

    def dim(self, size: int | torch.SymInt | torch.SymFloat) -> Dim:
        """The dimension, or the float computed from dimensions, behind a number that torch reports."""
        if isinstance(size, (int, float)):
            return size
        expr = exact(size.node.expr, self._known)
        if unnamed := self._unnamed(expr):
            raise T2NErrorDynamicShapeValue(
                f"the size {expr} depends on the data ({', '.join(map(str, unnamed))}), not on a dynamic axis of an input: "
                "tract cannot plan such a tensor; compute it with masks (torch.where) or name the axis in dynamic_axes"
            )
        expr = exact(expr.xreplace(self._names))
        return int(expr) if expr.is_Integer else expr


def _condition(guard: sympy.Basic) -> Condition:
    def holds(sizes: Mapping[str, int]) -> bool:
        try:
            return bool(guard.xreplace({symbol(n): sympy.Integer(s) for n, s in sizes.items()}) != sympy.false)
        except (ZeroDivisionError, AssertionError):  # torch's Mod asserts that its divisor is positive
            return False

    numbers = frozenset(map(int, guard.atoms(sympy.Integer)))
    return Condition(str(guard), holds, numbers, merely_unequal=isinstance(guard, sympy.Ne))
