"""Torch's shape symbols under the user's axis names, and their expressions as tract's TDim text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, ToFloat, TruncToInt

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.ir import Dim

# The finest factor of a size that is kept: products with it are exact in f64.
_DENOMINATOR = 64


class Symbols:
    """Renames torch's symbols (`s27`) to axis names. Several torch symbols may share one name: the user said they are equal."""

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        self._rename = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in names.items()}

    def unnamed(self, number: torch.SymInt | torch.SymFloat | torch.SymBool) -> list[sympy.Symbol]:
        """Symbols of `number` that no dynamic axis has: values torch knows only when the model runs."""
        return [symbol for symbol in number.node.expr.free_symbols if symbol not in self._rename]

    def dim(self, size: int | torch.SymInt) -> Dim:
        """The dimension behind a size that torch reports."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if unnamed := self.unnamed(size):
            raise T2NErrorDynamicShapeValue(
                f"the size {expr} depends on the data ({', '.join(map(str, unnamed))}), not on a dynamic axis of an input: "
                "tract cannot plan such a tensor; compute it with masks (torch.where) or name the axis in dynamic_axes"
            )
        expr = expr.xreplace(self._rename).replace(TruncToInt, _whole)
        return int(expr) if expr.is_Integer else expr


def _whole(scaled: sympy.Expr) -> sympy.Expr:
    """The integer part of `factor * float(size)`, in integers where the factor is one a float holds exactly (1.5, 0.25)."""
    factor, size = scaled.as_coeff_Mul()
    if isinstance(size, ToFloat) and factor > 0:
        ratio = Fraction(float(factor))
        if ratio.denominator <= _DENOMINATOR:
            whole = size.args[0] * ratio.numerator
            return whole if ratio.denominator == 1 else FloorDiv(whole, ratio.denominator)
    return TruncToInt(scaled)


def _infix(operator: str) -> Callable[[list[str]], str]:
    return lambda terms: f"({operator.join(terms)})"


def _nested(function: str) -> Callable[[list[str]], str]:
    def text(terms: list[str]) -> str:
        head, *rest = terms
        for term in rest:
            head = f"{function}({head}, {term})"
        return head

    return text


# sympy class name -> TDim text of its printed arguments; torch's own functions are in torch/utils/_sympy/functions.py.
_TEXT: Mapping[str, Callable[[list[str]], str]] = {
    "Add": _infix(" + "),
    "Mul": _infix(" * "),
    "FloorDiv": lambda terms: f"({terms[0]} / {terms[1]})",
    "CleanDiv": lambda terms: f"({terms[0]} / {terms[1]})",
    "Mod": lambda terms: f"({terms[0]} - ({terms[0]} / {terms[1]}) * {terms[1]})",
    "PythonMod": lambda terms: f"({terms[0]} - ({terms[0]} / {terms[1]}) * {terms[1]})",
    "Max": _nested("max"),
    "Min": _nested("min"),
}


def dim_text(dim: Dim) -> str:
    """`dim` as tract parses it in graph.nnef: `S`, `(P + S)`, `(4 * H)`, `(S / 2)`; division is floor."""
    if isinstance(dim, int) or dim.is_Integer:
        return str(int(dim))
    if dim.is_Symbol:
        return str(dim)
    if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
        return _infix(" * ")([dim_text(dim.base)] * int(dim.exp))
    printer = _TEXT.get(type(dim).__name__)
    if printer is None:
        raise T2NErrorDynamicShapeValue(f"tract has no form for the dimension {dim} ({type(dim).__name__})")
    return printer([dim_text(arg) for arg in dim.args])
