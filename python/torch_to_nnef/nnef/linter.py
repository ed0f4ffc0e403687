"""Refuses uses of packed weights that tract computes wrongly or crashes on; tract itself does not look (0.23.9)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping

from torch_to_nnef.exceptions import T2NErrorConsistency
from torch_to_nnef.nnef.document import Document
from torch_to_nnef.op.statement import Ref, Statement, Variable
from torch_to_nnef.tensor.quant import QTensor, q40_shape_reason
from torch_to_nnef.torch_internals import pytree

_VARIABLE = re.compile(r'(\w+) = variable<scalar>\(label = "([^"]*)"')
_EINSUM = re.compile(r'tract_core_einsum\(\[(\w+), \w+\], expr = "([^"]*)"')
_STRING = re.compile(r'"[^"]*"')

# A rule: (statement, the packed operand) -> what is wrong, or None.
Rule = Callable[[Statement, Ref], str | None]


def _attr(statement: Statement, name: str) -> object:
    return dict(statement.attrs).get(name)


def _einsum(statement: Statement, weight: Ref) -> str | None:
    """K, the summed axis, must be the weight's last: tract multiplies wrongly if square and crashes if not.

    And the weight must be the first operand: see `op.linear.linear`.
    """
    if _refs(statement)[0].id != weight.id:
        return "the packed operand of an einsum must be its first"
    if _row_fault(weight):
        return _row_fault(weight)
    return _summed_axis(str(_attr(statement, "expr")))


def _row_fault(weight: Ref) -> str | None:
    """In a stack of matrices groups must not cross rows: tract cuts it into its matrices."""
    width = weight.shape[-1]
    return None if isinstance(width, int) and width % 32 == 0 else f"rows of {width} elements are no multiple of 32"


def _summed_axis(expr: str) -> str | None:
    terms, _, output = expr.partition("->")
    term = terms.split(",")[0]
    summed = [axis for axis in term if axis not in output]
    if summed != [term[-1]]:
        return f"einsum {expr!r} must sum over the last axis of the weight, and only over it"
    return None


def _matmul(statement: Statement, weight: Ref) -> str | None:
    if statement.args[0].id == weight.id:
        return None if not _attr(statement, "transposeA") else "matmul with a transposed packed left side"
    return (
        None if _attr(statement, "transposeB") else "matmul takes a packed right side as transposed whatever it is told"
    )


def _second(statement: Statement, weight: Ref) -> str | None:
    return None if statement.args[1].id == weight.id else "the packed tensor must be the filter"


def _conv(statement: Statement, weight: Ref) -> str | None:
    groups = _attr(statement, "groups")
    if isinstance(groups, int) and groups > 1 and weight.shape[1] == 1:
        return "a depthwise convolution has no kernel for packed weights"
    if weight.rank > 2 and set(weight.shape[2:]) == {1} and groups == 1:
        return "a packed filter of one element must be an einsum: tract makes one of it, with the filter second"
    return _second(statement, weight)


def _gather(statement: Statement, weight: Ref) -> str | None:
    if statement.args[0].id != weight.id or _attr(statement, "axis") != 0 or _attr(statement, "datum_type") is None:
        return "gather of packed rows needs axis = 0 and a datum_type"
    return None


def _squeeze(statement: Statement, weight: Ref) -> str | None:
    """A filter of one element as the matrix it is: its rows, and so its blocks, stay."""
    rows = weight.shape[:2] + (1,) * (weight.rank - 2)
    return (
        None
        if weight.shape == rows and _attr(statement, "axes") == list(range(2, weight.rank))
        else "only unit axes behind the rows go"
    )


def _experts(statement: Statement, weight: Ref) -> str | None:
    """Three stacks of matrices, all with K last."""
    if weight.id in {ref.id for ref in (statement.args[0], statement.args[1])}:
        return "only the experts may be packed, not their router"
    if _row_fault(weight):
        return _row_fault(weight)
    return None if _attr(statement, "expert_layout") == "linear" else "packed experts must have the layout `linear`"


RULES: Mapping[str, Rule] = {
    "tract_core_einsum": _einsum,
    "t2n_linear": _einsum,
    "tract_moe_ffn": _experts,
    "matmul": _matmul,
    "linear": _second,
    "conv": _conv,
    "tract_core_gather": _gather,
    "squeeze": _squeeze,
}


def lint(document: Document) -> None:
    """Raise `T2NErrorConsistency` that lists every illegal use of a packed weight (rules: tract 0.23.9, measured)."""
    packed = {v.id: v for v in document.variables if isinstance(v.tensor, QTensor)}
    faults = [fault for v in packed.values() if (fault := _shape_fault(v))]
    for statement in document.statements:
        for ref in _refs(statement):
            if ref.id not in packed:
                continue
            rule = RULES.get(statement.operator)
            fault = f"{statement.operator} has no kernel for packed weights" if rule is None else rule(statement, ref)
            if ref.fqn is not None and math.prod(ref.shape) != packed[ref.id].tensor.numel():
                fault = f"{statement.operator} would read the zeros behind its rows"
            if ref.transposed:
                fault = f"{statement.operator} takes its transpose, but its groups run along the other axis"
            if fault:
                faults.append(f"{packed[ref.id].label} in module {statement.module_path or '<root module>'}: {fault}")
            if statement.operator == "squeeze":  # still packed
                packed[statement.results[0]] = packed[ref.id]
    faults += _faults_in_fragments(document, {v.label for v in packed.values()})
    faults += [f"{v.label}: a packed weight cannot be an output" for i, v in packed.items() if i in document.outputs]
    if faults:
        raise T2NErrorConsistency(
            "tract cannot use these packed weights; keep them in float (exclude=):\n  " + "\n  ".join(faults)
        )


def _shape_fault(variable: Variable) -> str | None:
    reason = q40_shape_reason(variable.tensor.shape)
    return reason and f"{variable.label}: {reason}"


def _faults_in_fragments(document: Document, labels: Collection[str]) -> list[str]:
    """Packed weights that are variables of a fragment, as in the body of a scan, may only be the first operand of an einsum."""
    faults = []
    for name, (_, lines) in document.fragments.items():
        body = "\n".join(lines)
        for variable, label in _VARIABLE.findall(body):
            if label not in labels:
                continue
            exprs = [expr for first, expr in _EINSUM.findall(body) if first == variable]
            reasons = [reason for expr in exprs if (reason := _summed_axis(expr))]
            if len(re.findall(rf"\b{variable}\b", _STRING.sub("", body))) != 1 + len(exprs):
                reasons.append("a packed variable of a fragment must be the first operand of an einsum")
            faults += [f"{label} in fragment {name}: {reason}" for reason in reasons]
    return faults


def _refs(statement: Statement) -> list[Ref]:
    return [leaf for leaf in pytree.tree_leaves(list(statement.args)) if isinstance(leaf, Ref)]
