"""Numbers computed from sizes as tensors of rank 0: `x / math.sqrt(x.shape[1])`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

import sympy
import torch

from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.op.statement import Ref

if TYPE_CHECKING:
    from torch_to_nnef.op.emitter import Emitter

# sympy class name -> NNEF operator; torch's own functions are in torch/utils/_sympy/functions.py.
_OPERATORS: Mapping[str, str] = {
    "Add": "add",
    "FloatPow": "pow",
    "FloatTrueDiv": "div",
    "IntTrueDiv": "div",
    "Max": "max",
    "Min": "min",
    "Mul": "mul",
    "OpaqueUnaryFn_sqrt": "sqrt",
    "Pow": "pow",
}


def size(e: Emitter, expr: sympy.Expr, dtype: torch.dtype) -> Ref:
    """`expr` as `dtype`; what is no whole number is computed in f32."""
    if _is_whole(expr):
        return e.op("tract_core_cast", expr, out=(), dtype=dtype, hint="size", to=tract_dtype(dtype, e.node.where()))
    return e.cast(_float(e, expr), dtype)


def _float(e: Emitter, expr: sympy.Expr) -> Ref:
    if expr.is_number:
        return e.full(float(expr), torch.float32)
    if _is_whole(expr):
        return size(e, expr, torch.float32)
    name = type(expr).__name__
    if name == "ToFloat":
        return _float(e, expr.args[0])
    if name not in _OPERATORS:
        raise e.refuse(f"tract has no form for the number {expr} ({name}), which is computed from sizes")
    operator, terms = _OPERATORS[name], [_float(e, arg) for arg in expr.args]
    if len(terms) == 1:
        return e.op(operator, terms[0], hint="size")
    return reduce(lambda a, b: e.op(operator, a, b, hint="size"), terms)


def _is_whole(expr: sympy.Expr) -> bool:
    return bool(expr.is_integer) and not expr.atoms(sympy.Float)
