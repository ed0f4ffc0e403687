"""ExportedProgram -> `Graph`: sizes become expressions, multi-output calls become tuples, what only torch needs is dropped."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from torch_to_nnef.exceptions import T2NErrorConsistency, T2NErrorDynamicShapeValue, T2NErrorNotImplemented
from torch_to_nnef.graph.axes import axis_expression
from torch_to_nnef.graph.capture import Captured
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.symbols import Symbols

# Calls without a value: checks that torch leaves in the graph. tract checks shapes and dtypes itself.
_CHECKS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten.sym_constrain_range.default,
    }
)
_USER_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def to_graph(captured: Captured) -> Graph:
    """Freeze a capture. Nodes that no output depends on are left out.

    Raises `T2NErrorNotImplemented` for an output that is no tensor, or for higher-order calls (torch.cond...).
    """
    return _Converter(captured).graph()


class _Converter:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.fqns = captured.fqns()
        self.fx = captured.program.graph
        self.symbols = name_symbols(captured)
        self.env: dict[FxNode, Any] = {}
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []

    def graph(self) -> Graph:
        outputs: tuple[Value, ...] = ()
        for node in self.fx.nodes:
            if node.op == "placeholder":
                self.env[node] = self._value(node.name, node.meta["val"])
                if node.name not in self.fqns:
                    self.inputs.append(self.env[node])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                raise T2NErrorNotImplemented(f"graph node {node.op} {node.target} has no equivalent in NNEF")
        nodes = _live(self.nodes, outputs)
        used = {v.name for n in nodes for v in _values((n.args, n.kwargs))} | {v.name for v in outputs}
        weights = {name: fqn for name, fqn in self.fqns.items() if name in used}
        missing = sorted(fqn for fqn in weights.values() if fqn not in self.captured.tensors)
        if missing:
            raise T2NErrorConsistency(f"the capture uses tensors the model does not hold: {missing}")
        symbols, names = self.captured.inputs.symbols(), self.captured.inputs.names
        return Graph(tuple(self.inputs), names, weights, self.captured.tensors, tuple(nodes), outputs, symbols)

    def _call(self, node: FxNode) -> None:
        val = node.meta.get("val")
        if node.target in _CHECKS:
            return
        if node.target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(val, (int, float, bool)):
            self.env[node] = val
        elif isinstance(val, (torch.SymInt, torch.SymFloat)):
            self.env[node] = self.symbols.dim(val)
        elif isinstance(node.target, torch._ops.OpOverload):
            self.nodes.append(self._node(node, node.target, val))
        else:
            raise T2NErrorNotImplemented(
                f"{node.target} at {_module_path(node) or '<root module>'} has no equivalent in NNEF"
            )

    def _node(self, node: FxNode, target: torch._ops.OpOverload, val: Any) -> Node:
        many = isinstance(val, (list, tuple))
        names = [f"{node.name}_{i}" for i in range(len(val))] if many else [node.name]
        outputs = tuple(self._value(n, v) for n, v in zip(names, val if many else [val], strict=True) if v is not None)
        self.env[node] = list(outputs) if many else outputs[0]
        args, kwargs = self._argument((tuple(node.args), dict(node.kwargs)))
        return Node(node.name, target, tuple(args), kwargs, outputs, _module_path(node), _source(node))

    def _value(self, name: str, val: torch.Tensor) -> Value:
        return Value(name, tuple(self.symbols.dim(d) for d in val.shape), val.dtype)

    def _argument(self, tree: Any) -> Any:
        def leaf(arg: Any) -> Any:
            if isinstance(arg, FxNode):
                return self.env[arg]
            return self.symbols.dim(arg) if isinstance(arg, (torch.SymInt, torch.SymFloat)) else arg

        return pytree.tree_map(leaf, tree)

    def _outputs(self, node: FxNode) -> tuple[Value, ...]:
        signature = self.captured.program.graph_signature
        mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
        if mutated:
            raise T2NErrorNotImplemented(
                f"the model writes into {sorted(mutated.values())} while it runs; "
                "an archive keeps no state: return the new value as an output"
            )
        leaves = [leaf for leaf in pytree.tree_leaves(node.args) if leaf is not None]
        values: list[Any] = [self.env.get(leaf) if isinstance(leaf, FxNode) else leaf for leaf in leaves]
        for index, value in enumerate(values):
            if not isinstance(value, Value):
                raise T2NErrorNotImplemented(
                    f"output {index} of the model is {value!r:.60}, not a tensor; return tensors only"
                )
        return tuple(values)


def name_symbols(captured: Captured) -> Symbols:
    """Torch's symbols as the user's; raises `T2NErrorDynamicShapeValue` for an axis that has another size to the model."""
    names: dict[sympy.Symbol, sympy.Expr] = {}
    users = [n for n in captured.program.graph.nodes if n.op == "placeholder" and n.name not in captured.fqns()]
    asked = [
        (name, axis, text, node.meta["val"].shape[axis])
        for node, name, axes in zip(users, captured.inputs.names, captured.inputs.axes, strict=True)
        for axis, text in axes.items()
    ]
    for _, _, text, size in asked:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            names.setdefault(size.node.expr, axis_expression(text))
    symbols = Symbols(names, captured.guards())
    for name, axis, text, size in asked:
        if isinstance(size, torch.SymInt) and sympy.expand(symbols.dim(size) - axis_expression(text)) != 0:
            raise T2NErrorDynamicShapeValue(
                f"axis {axis} of {name!r} is {text!r} in dynamic_axes, but the model needs it to be {symbols.dim(size)}: say so"
            )
    return symbols


def _module_path(node: FxNode) -> str:
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = next((p for p in reversed(stack) if not p.startswith("_")), "")
    return re.sub(r"^L\['self'\]\.?", "", path)


def _source(node: FxNode) -> str:
    """Last frame of the user's code in torch's stack trace, as `file:line in function`."""
    frames = [f for f in _USER_LINE.findall(node.meta.get("stack_trace") or "") if "/torch/nn/" not in f[0]]
    return f"{frames[-1][0]}:{frames[-1][1]} in {frames[-1][2]}" if frames else ""


def _values(tree: Any) -> Iterable[Value]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value))


def _live(nodes: list[Node], outputs: tuple[Value, ...]) -> list[Node]:
    needed, live = {v.name for v in outputs}, list[Node]()
    for node in reversed(nodes):
        if any(v.name in needed for v in node.outputs):
            live.append(node)
            needed.update(v.name for v in _values((node.args, node.kwargs)))
    return live[::-1]
