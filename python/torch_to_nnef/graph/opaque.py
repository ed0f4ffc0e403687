"""Modules kept whole: during a capture, the forward of a chosen class is one call of the operator `t2n::module`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from torch_to_nnef.exceptions import T2NErrorConsistency, T2NErrorNotImplemented
from torch_to_nnef.graph.ir import Node
from torch_to_nnef.quantize.targets import Use
from torch_to_nnef.torch_internals import pytree

# Fqn patterns within the module -> how its lowering uses these weights.
Uses = Mapping[str, Use]

_LITERALS = (int, float, bool, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where an argument goes that the graph knows: the `index`th tensor or size of the call."""

    kind: str
    index: int


@dataclass(eq=False)
class ModuleCall:
    """One call of a module kept whole: what its operator cannot carry. `names` are those of its weights, in their order."""

    module: nn.Module
    names: tuple[str, ...]
    uses: Uses
    leaves: list[Any]
    spec: pytree.TreeSpec
    results: list[Any] = field(default_factory=list)
    results_spec: pytree.TreeSpec | None = None

    def arguments(self, tensors: Sequence[Any], sizes: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of forward over these tensors and sizes."""
        args, kwargs = pytree.tree_unflatten(_filled(self.leaves, tensors, sizes), self.spec)
        return args, kwargs

    def outputs(self, tensors: Sequence[Any]) -> Any:
        """What forward returns, over these tensors."""
        if self.results_spec is None:
            raise T2NErrorConsistency(f"{type(self.module).__name__} was kept whole but never run")
        return pytree.tree_unflatten(_filled(self.results, tensors, ()), self.results_spec)

    def use(self, index: int) -> Use:
        """How the lowering uses the `index`th weight, as registered."""
        name = self.names[index]
        return next((use for pattern, use in self.uses.items() if fnmatchcase(name, pattern)), Use.OTHER)


# Alive as long as a capture holds them. The operator finds them by the name that stands in the graph.
_CALLS: WeakValueDictionary[str, ModuleCall] = WeakValueDictionary()
_NUMBERS = itertools.count()
_inside: ContextVar[bool] = ContextVar("inside a module kept whole", default=False)


def call_named(name: str) -> ModuleCall:
    """The call behind the last argument of `t2n::module`."""
    try:
        return _CALLS[name]
    except KeyError:
        raise T2NErrorConsistency(f"{name} belongs to a capture that is gone") from None


@contextmanager
def kept_whole(model: nn.Module, classes: Mapping[type[nn.Module], Uses]) -> Iterator[list[ModuleCall]]:
    """Every module of exactly these classes runs as one operator; the calls made so far are in the list given."""
    calls: list[ModuleCall] = []
    chosen = [module for module in model.modules() if type(module) in classes]
    before = [module.__dict__.get("forward") for module in chosen]
    try:
        for module in chosen:
            module.forward = _opaque(module, classes[type(module)], calls)
        yield calls
    finally:
        for module, forward in zip(chosen, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def weight_use(node: Node, position: int, index: int) -> Use:
    """Use of one tensor of a `t2n::module` node: the `index`th of argument `position`."""
    return call_named(node.args[3]).use(index) if position == 1 else Use.OTHER


def _opaque(module: nn.Module, uses: Uses, calls: list[ModuleCall]) -> Callable[..., Any]:
    forward = module.forward

    @functools.wraps(forward)
    def whole(*args: Any, **kwargs: Any) -> Any:
        if _inside.get():
            return forward(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        slots, tensors, sizes = _slots(leaves)
        weights = _weights(module)
        call = ModuleCall(module, tuple(weights), uses, slots, spec)
        name = f"{type(module).__name__}_{next(_NUMBERS)}"
        _CALLS[name] = call
        calls.append(call)
        return call.outputs(torch.ops.t2n.module(tensors, list(weights.values()), sizes, name))

    return whole


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _slots(leaves: Sequence[Any]) -> tuple[list[Any], list[Tensor], list[Any]]:
    """`leaves` with slots for tensors and sizes, and those."""
    found: dict[str, list[Any]] = {"tensor": [], "size": []}

    def slot(leaf: Any) -> Any:
        kind = "tensor" if isinstance(leaf, Tensor) else "size" if isinstance(leaf, torch.SymInt) else None
        if kind is None:
            if not isinstance(leaf, _LITERALS):
                raise T2NErrorNotImplemented(
                    f"a module kept whole takes or gives {type(leaf).__name__}; tensors, sizes and literals only"
                )
            return leaf
        found[kind].append(leaf)
        return _Slot(kind, len(found[kind]) - 1)

    return [slot(leaf) for leaf in leaves], found["tensor"], found["size"]


def _filled(leaves: Sequence[Any], tensors: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    values = {"tensor": tensors, "size": sizes}
    return [values[leaf.kind][leaf.index] if isinstance(leaf, _Slot) else leaf for leaf in leaves]


def _run(inputs: Sequence[Tensor], weights: Sequence[Tensor], sizes: Sequence[int], call: str) -> list[Tensor]:
    """Forward itself, on these weights. Copies: results of an operator are none of its arguments."""
    record = call_named(call)
    args, kwargs = record.arguments(inputs, sizes)
    token = _inside.set(True)
    try:
        with _ReadOnly((*inputs, *weights), type(record.module).__name__):
            result = functional_call(
                record.module, dict(zip(record.names, weights, strict=True)), args, kwargs, tie_weights=False
            )
    finally:
        _inside.reset(token)
    leaves, record.results_spec = pytree.tree_flatten(result)
    record.results, tensors, symbolic = _slots(leaves)
    if symbolic:
        raise T2NErrorNotImplemented(f"{type(record.module).__name__} returns a size; return tensors only")
    return [tensor.clone() for tensor in tensors]


class _ReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses calls that write into `tensors`: the operator promises that it does not."""

    def __init__(self, tensors: Sequence[Tensor], module: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages, self.module = {_storage(t) for t in tensors}, module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
                if any(_storage(t) in self.storages for t in written):
                    raise T2NErrorNotImplemented(
                        f"{self.module} writes into its arguments or weights ({func}); it cannot be kept whole"
                    )
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


_LIBRARY = torch.library.Library("t2n", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("module(Tensor[] inputs, Tensor[] weights, SymInt[] sizes, str call) -> Tensor[]")  # type: ignore[no-untyped-call]
_LIBRARY.impl("module", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("t2n::module", _run, lib=_LIBRARY)
