"""Runs a graph of TorchScript in Python, so that torch.export can trace it: branches and loops over sizes are decided here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph.torchscript.operators import call
from torch_to_nnef.torch_internals import JitBlock, JitGraph, JitNode, inline_calls
from torch_to_nnef.turns import in_this_thread

# Calls of methods, under a name that torch's inliner, wanted for functions only, does not know.
_METHOD = "t2n::CallMethod"
_LINE = re.compile(r'File "([^"]+)", line (\d+)')


@contextmanager
def interpreted_functions() -> Iterator[None]:
    """Let eager code call scripted functions as if they were Python ones, for the time of a capture."""

    def interpret(function: torch.jit.ScriptFunction[Any, Any], *args: Any, **kwargs: Any) -> Any:
        return Code(function.graph, function.schema)(*args, **kwargs)

    otherwise = torch.jit.ScriptFunction.__call__
    with mock.patch.object(torch.jit.ScriptFunction, "__call__", in_this_thread(interpret, otherwise)):
        yield


class HasMethods(Protocol):
    """What `prim::CallMethod` calls."""

    def call_method(self, name: str, *args: Any) -> Any:
        """Run a method."""


class Code:
    """A graph with its functions inlined and its calls of methods kept; called like the method it is of.

    `frozen`: fqn -> float weight that torch.jit.freeze made a constant.
    """

    def __init__(self, graph: JitGraph, schema: Any) -> None:
        self.graph = graph.copy()
        _hide_method_calls(self.graph, self.graph)
        inline_calls(self.graph)
        self.signature = _signature(schema.arguments)
        self.frozen = dict(_frozen(self.graph))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        run = _Run(args[0] if self.frozen else None, self.frozen)
        values = bound.arguments.values()
        run.env = dict(zip((v.debugName() for v in self.graph.inputs()), values, strict=True))
        results = run.block(self.graph)
        return results[0] if len(results) == 1 else tuple(results)


def _hide_method_calls(graph: JitGraph, block: JitBlock) -> None:
    for node in list(block.nodes()):
        for inner in node.blocks():
            _hide_method_calls(graph, inner)
        if node.kind() == "prim::CallMethod":
            hidden = graph.create(_METHOD, list(node.inputs()), 1)
            hidden.s_("name", node.s("name"))
            hidden.copyMetadata(node)
            hidden.insertBefore(node)
            hidden.output().setType(node.output().type())
            node.output().replaceAllUsesWith(hidden.output())
            node.destroy()


def _signature(arguments: Sequence[Any]) -> inspect.Signature:
    def parameter(argument: Any) -> inspect.Parameter:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        return inspect.Parameter(argument.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)

    return inspect.Signature([parameter(argument) for argument in arguments])


def _frozen(graph: JitGraph) -> Iterator[tuple[str, torch.Tensor]]:
    """torch.jit.freeze names the constants it makes after the attribute they were."""
    for node in graph.nodes():
        if node.kind() == "prim::Constant" and (name := node.output().debugName()).startswith("self."):
            value = node.output().toIValue()
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                yield _frozen_fqn(name), value


def _frozen_fqn(name: str) -> str:
    """`self.conv.weight` is `conv.weight`; of several constants with one name torch numbers the others: `conv.weight_1`."""
    path, _, last = name.removeprefix("self.").rpartition(".")
    return f"{path}_{last}" if path and last.isdigit() else name.removeprefix("self.")


class _Run:
    """One run: `env` holds the value of every name."""

    def __init__(self, module: nn.Module | None, frozen: Mapping[str, torch.Tensor]) -> None:
        self.module, self.frozen, self.env = module, frozen, dict[str, Any]()

    def block(self, block: JitBlock) -> list[Any]:
        for node in block.nodes():
            # `node` is what a report finds in this frame when an operator fails: see `location`.
            results = self.node(node, [self.env[v.debugName()] for v in node.inputs()])
            self.env.update(zip((v.debugName() for v in node.outputs()), results, strict=True))
        return [self.env[v.debugName()] for v in block.outputs()]

    def node(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        control = _CONTROL.get(node.kind())
        if control is not None:
            return control(self, node, args)
        result = call(node, args)
        count = node.outputsSize()
        return result if count > 1 else [result] * count

    def constant(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        name = _frozen_fqn(node.output().debugName())
        if self.module is not None and name in self.frozen:
            return [self.module.get_parameter(name)]
        # A function, which has no value, was inlined: nothing reads this constant.
        return [None if str(node.output().type()) == "Function" else node.output().toIValue()]

    def branch(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        taken, other = node.blocks()
        return self.block(taken if args[0] else other)

    def loop(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        trips, go_on, *carried = args
        (body,) = node.blocks()
        names = [v.debugName() for v in body.inputs()]
        step = 0
        while step < trips and go_on:
            self.env.update(zip(names, [step, *carried], strict=True))
            go_on, *carried = self.block(body)
            step += 1
        return carried

    def attribute(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        return [getattr(args[0], node.s("name"))]

    def assign(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        raise T2NErrorNotImplemented(
            f"the ScriptModule writes its attribute `{node.s('name')}` while it runs; an archive keeps no state: "
            "export a module (often an inner one) that takes the state as an input and returns the new one"
        )

    def method(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        owner, *rest = args
        if not hasattr(owner, "call_method"):
            raise T2NErrorNotImplemented(
                f"the ScriptModule calls method `{node.s('name')}` of an object that is no module ({type(owner).__name__})"
            )
        return [owner.call_method(node.s("name"), *rest)]

    def unpack(self, node: JitNode, args: list[Any]) -> Sequence[Any]:
        return list(args[0])


_CONTROL: Mapping[str, Callable[[_Run, JitNode, list[Any]], Sequence[Any]]] = {
    "prim::Constant": _Run.constant,
    "prim::If": _Run.branch,
    "prim::Loop": _Run.loop,
    "prim::GetAttr": _Run.attribute,
    "prim::SetAttr": _Run.assign,
    _METHOD: _Run.method,
    "prim::TupleUnpack": _Run.unpack,
    "prim::ListUnpack": _Run.unpack,
}


def location(node: JitNode) -> tuple[str, int, str] | None:
    """File, line and text of the source that `node` was compiled from, as far as TorchScript kept it."""
    # An assignment has no source of its own, but what it assigns has; a branch with `return` points at that, not at its condition.
    inputs = [v.node() for v in node.inputs()]
    texts = [str(n.sourceRange()) for n in ([*inputs, node] if node.kind() == "prim::If" else [node, *inputs])]
    shown = next((text for text in texts if _LINE.search(text)), "")
    found = _LINE.search(shown)
    # The text ends a line before the one that underlines it.
    above = shown.partition("<--- HERE")[0].splitlines()[-2:-1]
    return (found[1], int(found[2]), above[0].strip() if above else "") if found else None
