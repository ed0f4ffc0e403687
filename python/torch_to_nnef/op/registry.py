"""The op table and its rules: the key is the OpOverload, the signature is the ATen schema, a second handler is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.graph.ir import Node
from torch_to_nnef.graph.opaque import Uses
from torch_to_nnef.op import extensions, half
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Lowering, Ref, Result
from torch_to_nnef.quantize.targets import Use
from torch_to_nnef.torch_internals import OpOverload, OpOverloadPacket

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
    "experts",
    "fold",
    "grid",
    "index",
    "integer",
    "linear",
    "logic",
    "loss",
    "norm",
    "opaque",
    "pad",
    "pool",
    "reduce",
    "refused",
    "resize",
    "rnn",
    "scan",
    "scatter",
    "search",
    "shape",
    "signal",
    "small_matrix",
    "sort",
    "special",
    "stft",
)
# Arguments that change where or how torch computes, never the values an archive gives: dtype is read from the output.
_WITHOUT_EFFECT = frozenset(
    {
        "dtype",
        "out_int32",
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
class _Registered:
    """A lowering; `imported` tells one import of its module from the next."""

    lower: Lowering
    imported: object

    def __str__(self) -> str:
        return f"{self.lower.__module__}.{self.lower.__qualname__}"


@dataclass(frozen=True, slots=True)
class Handler(_Registered):
    """The lowering of an op, with the schema arguments it reads."""

    reads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleHandler(_Registered):
    """The lowering of a module class, and how it uses the weights."""

    uses: Uses


class OpTable:
    """Handlers by OpOverload, and by the class of modules kept whole."""

    def __init__(self) -> None:
        self._handlers: dict[OpOverload, Handler] = {}
        self.modules: dict[type[nn.Module], ModuleHandler] = {}

    def lowers(self, *ops: OpOverload, replace: bool = False) -> Callable[[F], F]:
        """Register the decorated `f(e, **schema arguments)` for `ops`.

        Parameters after the emitter are schema arguments by name (`self` is written `x`); one that is left out must have its default
        value in every call, or the export is refused, so nothing a model says is ignored. Returns the `Ref` of the result (a list for
        several). Raises `T2NErrorInvalidArgument` for what is no OpOverload, a parameter the schema does not have, or a second handler
        unless it is to `replace` the first; one whose module was imported again takes the place of its older self.
        """
        for op in ops:
            _check_overload(op)

        def register(lower: F) -> F:
            reads = tuple(inspect.signature(lower).parameters)[1:]
            for op in ops:
                unknown = set(reads) - {parameter(a.name) for a in op._schema.arguments}
                if unknown:
                    raise T2NErrorInvalidArgument(f"the handler of {op} reads {sorted(unknown)}, not in {op._schema}")
                self._add(op, Handler(lower, _import_of(lower), reads), replace)
            return lower

        return register

    def lowers_module(
        self, *classes: type[nn.Module], uses: Mapping[str, str] | None = None, replace: bool = False
    ) -> Callable[[F], F]:
        """Register the decorated `f(e, module, weights, *args, **kwargs)`: modules of exactly these `classes` are kept whole.

        `args` and `kwargs` are those the model calls the module with, `weights` maps names within the module, both with a `Ref` for a
        tensor. Returns the `Ref` of what forward returns (a list for several tensors). `uses` says which weights may be packed, pattern
        of names -> "linear", "conv" or "embedding"; the others stay in float. Raises `T2NErrorInvalidArgument` for what is no module
        class or no use, or a second lowering as in `lowers`.
        """
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise T2NErrorInvalidArgument(f"{cls!r} is not a class of torch.nn.Module")
        try:
            known = {pattern: Use(use) for pattern, use in (uses or {}).items()}
        except ValueError as error:
            raise T2NErrorInvalidArgument(f"uses of weights: {error}; one of {[use.value for use in Use]}") from None

        def register(lower: F) -> F:
            handler = ModuleHandler(lower, _import_of(lower), known)
            for cls in classes:
                _check_free(cls.__qualname__, self.modules.get(cls), handler, replace)
                self.modules[cls] = handler
            return lower

        return register

    def refuses(self, ops: Iterable[OpOverload], reason: str) -> None:
        """Refuse every call of `ops`, whatever its arguments, instead of reporting them as missing."""

        def lower(e: Emitter, **arguments: Any) -> Ref:
            raise e.refuse(reason)

        for op in ops:
            self._add(op, Handler(lower, None, tuple(parameter(a.name) for a in op._schema.arguments)))

    def _add(self, op: OpOverload, handler: Handler, replace: bool = False) -> None:
        _check_free(str(op), self._handlers.get(op), handler, replace)
        self._handlers[op] = handler

    def __contains__(self, op: OpOverload) -> bool:
        return op in self._handlers

    def __iter__(self) -> Iterator[OpOverload]:
        return iter(self._handlers)

    def __getitem__(self, op: OpOverload) -> Handler:
        return self._handlers[op]

    def lower(self, emitter: Emitter, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Result:
        """Run the handler of `node` on lowered arguments."""
        handler = self._handlers[node.target]
        given = _bind(node.target, args, kwargs)
        ignored = _WITHOUT_EFFECT | _SAID_BY_OUTPUT if node.target.namespace == "aten" else frozenset[str]()
        for argument in node.target._schema.arguments:
            name = parameter(argument.name)
            if name in handler.reads or name in ignored or name not in given:
                continue
            if given[name] != argument.default_value:
                raise T2NErrorNotImplemented(
                    f"{node.target} with {argument.name}={given[name]!r} at {node.where()} is not supported"
                )
        read = {name: given[name] for name in handler.reads if name in given}
        with extensions.blamed(handler.lower, str(node.target), node.where()):
            if half.needs_single(emitter, node):
                return half.in_single(emitter, node, handler.lower, read)
            return handler.lower(emitter, **read)


def _check_overload(op: object) -> None:
    if isinstance(op, OpOverloadPacket):
        choices = ", ".join(f"{op}.{name}" for name in op.overloads())  # type: ignore[no-untyped-call]
        raise T2NErrorInvalidArgument(f"{op} has overloads; register for one of {choices}")
    if not isinstance(op, OpOverload):
        raise T2NErrorInvalidArgument(f"{op!r} is not an operator (torch.ops.namespace.name.overload)")


def _import_of(lower: Lowering) -> object:
    """What differs from one import of the handler's module to the next; None where there is none, as in a notebook."""
    return getattr(inspect.unwrap(lower), "__globals__", {}).get("__spec__")


def _check_free(what: str, old: _Registered | None, new: _Registered, replace: bool) -> None:
    if old is None or replace:
        return
    again = old.imported is not new.imported or (new.imported is None and "<" not in new.lower.__qualname__)
    if str(old) != str(new) or not again:
        raise T2NErrorInvalidArgument(f"{what} has a handler already: {old}; replace=True replaces it")


def parameter(schema_name: str) -> str:
    """Name a handler has for an argument of the schema."""
    return "x" if schema_name == "self" else schema_name


def _bind(op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Schema argument -> value, only for those the call gives."""
    names = [parameter(a.name) for a in op._schema.arguments]
    return dict(zip(names, args, strict=False)) | {parameter(k): v for k, v in kwargs.items()}


OPS = OpTable()
lowers = OPS.lowers
lowers_module = OPS.lowers_module


def builtins() -> OpTable:
    """The op table with every family of ours."""
    for family in _FAMILIES:
        import_module(f"torch_to_nnef.op.{family}")
    return OPS


def table() -> OpTable:
    """The op table with every family, and the handlers of installed packages."""
    builtins()
    extensions.load_entry_points()
    return OPS
