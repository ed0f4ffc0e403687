"""`Document` -> the text of graph.nnef (NNEF 1.0.5, with tract's extensions where used)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import sympy
import torch

from torch_to_nnef.exceptions import T2NErrorConsistency
from torch_to_nnef.graph.tdim import dim_text
from torch_to_nnef.nnef.document import Document
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.op.fragments import in_use
from torch_to_nnef.op.statement import Ref, Statement, Variable

# `external<...>` and `variable<...>` say f32, i64 and bool; tract_core_external says the rest.
_GENERIC = {torch.float32: "scalar", torch.int64: "integer", torch.bool: "logical"}
# Operators of another registry than tract's core.
_TRANSFORMERS = frozenset({"tract_moe_ffn", "tract_transformers_sdpa"})


def graph_text(document: Document) -> str:
    """The whole file; equal documents give equal text."""
    fragments = in_use(document.operators, document.fragments)
    extensions = [
        "KHR_enable_fragment_definitions",
        "KHR_enable_operator_expressions",
        "tract_registry tract_core",
        *(["tract_registry tract_transformers"] if _TRANSFORMERS & document.operators else []),
        *(f"tract_symbol {symbol}" for symbol in document.symbols),
        *document.extensions,
    ]
    body = [_external(ref) for ref in document.inputs]
    body += [_variable(variable) for variable in document.variables]
    body += [_statement(statement) for statement in document.statements]
    parts = [
        "version 1.0;\n",
        "".join(f"extension {line};\n" for line in extensions),
        *fragments.values(),
        *([_properties(document)] if document.properties else []),
        f"graph {document.name}({', '.join(ref.id for ref in document.inputs)}) -> ({', '.join(document.outputs)})\n"
        "{\n" + "".join(f"    {line}\n" for line in body) + "}\n",
    ]
    return "\n".join(parts)


def quant_text(document: Document) -> str:
    """The file graph.quant: the scale of weights in 8 bits that have one. To tract they are typed then; their products are the same."""
    form = "zero_point_linear_quantize(zero_point = 0, scale = {}, bits = 8, signed = true, symmetric = true)"
    return "".join(f'"{name}": {form.format(_literal(scale))};\n' for name, scale in sorted(document.scales.items()))


def _external(ref: Ref) -> str:
    shape = _literal(list(ref.shape))
    generic = _GENERIC.get(ref.dtype)
    if generic:
        return f"{ref.id} = external<{generic}>(shape = {shape});"
    return f'{ref.id} = tract_core_external(shape = {shape}, datum_type = "{tract_dtype(ref.dtype, ref.id)}");'


def _variable(variable: Variable) -> str:
    generic = "scalar" if variable.tensor.dtype.is_floating_point else _GENERIC.get(variable.tensor.dtype, "integer")
    shape = _literal(list(variable.tensor.shape))
    return f'{variable.id} = variable<{generic}>(label = "{variable.label}", shape = {shape});'


def _statement(statement: Statement) -> str:
    results = ", ".join(statement.results)
    left = f"[{results}]" if len(statement.results) > 1 else results
    arguments = [_literal(a) for a in statement.args] + [f"{k} = {_literal(v)}" for k, v in statement.attrs]
    return f"{left} = {statement.operator}({', '.join(arguments)});"


def _properties(document: Document) -> str:
    pairs = ", ".join(f'("{_escaped(k)}", "{_escaped(v)}")' for k, v in sorted(document.properties.items()))
    return f"fragment tract_core_properties() -> (properties: (string, tensor<scalar>)[])\n{{\n    properties = [{pairs}];\n}}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _literal(value: Any) -> str:
    if isinstance(value, Ref):
        return value.id
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, sympy.Expr)):
        return dim_text(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    raise T2NErrorConsistency(f"no NNEF literal for {value!r}")


def _float(value: float) -> str:
    """Shortest text that reads back as the same f32."""
    if not math.isfinite(value):
        raise T2NErrorConsistency(f"{value} has no NNEF literal; a handler must store it as a constant")
    text = str(np.float32(value))
    return text if "." in text or "e" in text else f"{text}.0"
