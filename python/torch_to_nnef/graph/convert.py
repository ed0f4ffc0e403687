"""ExportedProgram -> `Graph`: sizes become expressions, multi-output calls become tuples, what only torch needs is dropped."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node as FxNode

from torch_to_nnef.exceptions import T2NErrorConsistency, T2NErrorDynamicShapeValue, T2NErrorNotImplemented
from torch_to_nnef.graph.axes import axis_expression
from torch_to_nnef.graph.capture import Captured
from torch_to_nnef.graph.experts import join_routers
from torch_to_nnef.graph.explain import keeps_state
from torch_to_nnef.graph.fold import fold, live, values
from torch_to_nnef.graph.integer import to_integers
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.places import Place, is_users
from torch_to_nnef.graph.symbols import Symbols
from torch_to_nnef.torch_internals import OpOverload, pytree

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
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def to_graph(captured: Captured) -> Graph:
    """Freeze a capture. Nodes that no output depends on are left out, what constants alone give is computed.

    Raises `T2NErrorNotImplemented` for an output that is no tensor, or for higher-order calls (torch.cond...).
    """
    return _Converter(captured).graph()


class _Converter:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.fqns = captured.fqns()
        self.fx = captured.program.graph
        if captured.program.graph_signature.input_tokens:
            effects = sorted({str(n.args[1]) for n in self.fx.nodes if "with_effects" in str(n.target)})
            raise T2NErrorNotImplemented(
                f"the model has calls with side effects, which an archive cannot have: {effects}"
            )
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
            # Else get_attr: the body of a higher-order call, which is refused.
        nodes = live(self.nodes, outputs)
        used = {v.name for n in nodes for v in values((n.args, n.kwargs))} | {v.name for v in outputs}
        weights = {name: fqn for name, fqn in self.fqns.items() if name in used}
        missing = sorted(fqn for fqn in weights.values() if fqn not in self.captured.tensors)
        if missing:
            raise T2NErrorConsistency(f"the capture uses tensors the model does not hold: {missing}")
        symbols, names = self.captured.inputs.symbols(), self.captured.inputs.names
        graph = Graph(tuple(self.inputs), names, weights, self.captured.tensors, tuple(nodes), outputs, symbols)
        constants = self.captured.program.graph_signature.inputs_to_lifted_tensor_constants.values()
        return to_integers(join_routers(fold(graph, constants)))

    def _call(self, node: FxNode) -> None:
        val = node.meta.get("val")
        if node.target in _CHECKS:
            return
        if node.target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(val, torch.SymInt):
            self.env[node] = self._located(node, self.symbols.dim, val)
        elif isinstance(val, (int, float, bool, torch.SymFloat, torch.SymBool)):
            self.env[node] = val  # a float on the way to a size says itself in the size; else `_argument` reads it
        elif isinstance(node.target, OpOverload):
            self.nodes.append(self._node(node, node.target, val))
        else:
            raise T2NErrorNotImplemented(
                f"{node.target} has no equivalent in NNEF: tract computes no branch or loop that is known only when it runs{_at(node)}"
            )

    def _node(self, node: FxNode, target: OpOverload, val: Any) -> Node:
        many = isinstance(val, (list, tuple))
        if many and any(isinstance(v, (list, tuple)) for v in val):
            raise T2NErrorNotImplemented(
                f"{target} returns lists beside tensors, which has no equivalent in NNEF{_at(node)}"
            )
        # A dot, since torch may well name another node `sort_1`.
        names = [f"{node.name}.{i}" for i in range(len(val))] if many else [node.name]
        named = [(n, v) for n, v in zip(names, val if many else [val], strict=True) if v is not None]
        outputs = tuple(self._located(node, self._value, n, v) for n, v in named)
        self.env[node] = list(outputs) if many else outputs[0]
        args, kwargs = self._argument(node, (tuple(node.args), dict(node.kwargs)))
        return Node(node.name, target, tuple(args), kwargs, outputs, _module_path(node), _source(node))

    def _value(self, name: str, val: Any) -> Value:
        if not isinstance(val, torch.Tensor):
            raise T2NErrorNotImplemented(f"{name} is a {type(val).__name__}, not a tensor; a graph holds tensors only")
        if val.layout is not torch.strided:
            raise T2NErrorNotImplemented(
                f"{name} is sparse ({val.layout}); tract has dense tensors only: use to_dense()"
            )
        shape, strides = (tuple(self.symbols.dim(d) for d in sizes) for sizes in (val.shape, val.stride()))
        dense, below = self.symbols.dim(val.storage_offset()) == 0, sympy.Integer(1)
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            dense, below = dense and (size == 1 or stride == below), below * size
        return Value(name, shape, val.dtype, dense)

    def _located(self, node: FxNode, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(*args)`; an error gets the op and the user's line."""
        try:
            return compute(*args)
        except T2NErrorDynamicShapeValue as error:
            raise T2NErrorDynamicShapeValue(f"{node.target}: {error}{_at(node)}") from None

    def _argument(self, node: FxNode, tree: Any) -> Any:
        def leaf(arg: Any) -> Any:
            if isinstance(arg, FxNode):
                arg = self.env[arg]
            if isinstance(arg, (torch.SymFloat, torch.SymBool)) and (
                isinstance(arg, torch.SymBool) or self.symbols.unnamed(arg)
            ):
                raise T2NErrorNotImplemented(
                    f"{node.target} takes a Python number that is read out of a tensor ({arg}): tract has it only when it runs{_at(node)}\n"
                    "  hint: compute with tensors: leave out `.item()`, float() and `.tolist()`"
                )
            return (
                self._located(node, self.symbols.dim, arg) if isinstance(arg, (torch.SymInt, torch.SymFloat)) else arg
            )

        return pytree.tree_map(leaf, tree)

    def _outputs(self, node: FxNode) -> tuple[Value, ...]:
        signature = self.captured.program.graph_signature
        mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
        if mutated:
            by_name = {n.name: n for n in self.fx.nodes}
            raise keeps_state({fqn: _where(by_name[name]) for name, fqn in mutated.items()})
        leaves = [leaf for leaf in pytree.tree_leaves(node.args) if leaf is not None]
        values: list[Any] = [self.env.get(leaf) if isinstance(leaf, FxNode) else leaf for leaf in leaves]
        if not values:
            raise T2NErrorNotImplemented("the model returns no tensor: there is nothing to export")
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


def _place(node: FxNode) -> Place | None:
    """Last frame of the user's code in torch's stack trace."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if is_users(f[0])]
    return Place(frames[-1][0], int(frames[-1][1]), frames[-1][2], _module_path(node)) if frames else None


def _source(node: FxNode) -> str:
    place = _place(node)
    return f"{place.file}:{place.line} in {place.function}" if place else ""


def _where(node: FxNode) -> Place | str:
    return _place(node) or _module_path(node) or "<root module>"


def _at(node: FxNode) -> str:
    return f"\n  at {_where(node)}"
