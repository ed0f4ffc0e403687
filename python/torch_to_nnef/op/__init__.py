"""The op table: one handler an ATen op, from graph values to NNEF statements. One family a file; `registry` holds the rules.

Public: `lowers` and `lowers_module` register handlers of your own (docs/custom_operators.md), `Emitter` is what they write with, `Ref` a
tensor of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import builtins
from torch_to_nnef.op.statement import Lowering, Ref
from torch_to_nnef.torch_internals import OpOverload

if TYPE_CHECKING:
    from torch import nn

F = TypeVar("F", bound=Lowering)

__all__ = ["Emitter", "Ref", "lowers", "lowers_module"]


def lowers(*ops: OpOverload, replace: bool = False) -> Callable[[F], F]:
    """`OpTable.lowers`, behind the handlers of this package: what `replace` is to replace is always there."""
    return builtins().lowers(*ops, replace=replace)


def lowers_module(
    *classes: type[nn.Module], uses: Mapping[str, str] | None = None, replace: bool = False
) -> Callable[[F], F]:
    """`OpTable.lowers_module`, behind the handlers of this package."""
    return builtins().lowers_module(*classes, uses=uses, replace=replace)
