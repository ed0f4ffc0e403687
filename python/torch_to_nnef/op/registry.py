"""The op table and its rules: the key is the OpOverload, the signature is the ATen schema, a second handler is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.graph.ir import Node
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Ref

OpOverload = torch._ops.OpOverload
Lowering = Callable[..., Ref | list[Ref]]
F = TypeVar("F", bound=Lowering)

_FAMILIES = (
    "activation",
    "adaptive",
    "attention",
    "complex",
    "conv",
    "create",
    "cut",
    "diagonal",
    "distance",
    "divide",
    "einsum",
    "elementwise",
    "fold",
    "grid",
    "index",
    "linear",
    "logic",
    "loss",
    "norm",
    "pad",
    "pool",
    "random",
    "reduce",
    "refused",
    "resize",
    "rnn",
    "scan",
    "scatter",
    "shape",
    "signal",
    "sort",
    "special",
    "stft",
)
# Arguments that change where or how torch computes, never the values an archive gives: dtype is read from the output.
_WITHOUT_EFFECT = frozenset(
    {
        "dtype",
        "layout",
        "device",
        "pin_memory",
        "memory_format",
        "non_blocking",
        "copy",
        "generator",
        "cudnn_enabled",
        "cudnn_enable",
        "scale_grad_by_freq",
        "sparse",
        "implicit",
        "momentum",
    }
)
# Arguments that the shapes of the outputs say as well; handlers read those instead.
_SAID_BY_OUTPUT = frozenset(
    {
        "size",
        "shape",
        "sizes",
        "split_size",
        "split_sizes",
        "chunks",
        "start_dim",
        "end_dim",
        "output_size",
        "N",
        "C",
        "HxW",
    }
)


@dataclass(frozen=True, slots=True)
class Handler:
    """A lowering with the schema arguments it reads."""

    lower: Lowering
    reads: tuple[str, ...]


class OpTable:
    """Handlers by OpOverload."""

    def __init__(self) -> None:
        self._handlers: dict[OpOverload, Handler] = {}

    def lowers(self, *ops: OpOverload) -> Callable[[F], F]:
        """Register the decorated `f(e, **schema arguments)` for `ops`.

        Parameters after the emitter are schema arguments by name (`self` is written `x`); one that is left out must have its default
        value in every call, or the export is refused, so nothing a model says is ignored. Returns the `Ref` of the result (a list for
        several). Raises `T2NErrorInvalidArgument` for a second handler, or a parameter the schema does not have.
        """

        def register(lower: F) -> F:
            reads = tuple(inspect.signature(lower).parameters)[1:]
            for op in ops:
                if op in self._handlers:
                    raise T2NErrorInvalidArgument(f"{op} has a handler already: {self._handlers[op].lower.__module__}")
                unknown = set(reads) - {parameter(a.name) for a in op._schema.arguments}
                if unknown:
                    raise T2NErrorInvalidArgument(f"the handler of {op} reads {sorted(unknown)}, not in {op._schema}")
                self._handlers[op] = Handler(lower, reads)
            return lower

        return register

    def refuses(self, ops: Iterable[OpOverload], reason: str) -> None:
        """Refuse every call of `ops`, whatever its arguments, instead of reporting them as missing."""

        def refuse(e: Emitter, **arguments: Any) -> Ref:
            raise e.refuse(reason)

        for op in ops:
            self._handlers[op] = Handler(refuse, tuple(parameter(a.name) for a in op._schema.arguments))

    def __contains__(self, op: OpOverload) -> bool:
        return op in self._handlers

    def __iter__(self) -> Iterator[OpOverload]:
        return iter(self._handlers)

    def __getitem__(self, op: OpOverload) -> Handler:
        return self._handlers[op]

    def lower(self, emitter: Emitter, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Ref | list[Ref]:
        """Run the handler of `node` on lowered arguments."""
        handler = self._handlers[node.target]
        given = _bind(node.target, args, kwargs)
        for argument in node.target._schema.arguments:
            name = parameter(argument.name)
            if name in handler.reads or name in _WITHOUT_EFFECT | _SAID_BY_OUTPUT or name not in given:
                continue
            if given[name] != argument.default_value:
                raise T2NErrorNotImplemented(
                    f"{node.target} with {argument.name}={given[name]!r} at {node.where()} is not supported"
                )
        return handler.lower(emitter, **{name: given[name] for name in handler.reads if name in given})


def parameter(schema_name: str) -> str:
    """Name a handler has for an argument of the schema."""
    return "x" if schema_name == "self" else schema_name


def _bind(op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Schema argument -> value, only for those the call gives."""
    names = [parameter(a.name) for a in op._schema.arguments]
    return dict(zip(names, args, strict=False)) | {parameter(k): v for k, v in kwargs.items()}


OPS = OpTable()
lowers = OPS.lowers


def table() -> OpTable:
    """The op table with every family loaded."""
    for family in _FAMILIES:
        import_module(f"torch_to_nnef.op.{family}")
    return OPS
