"""A graph under change: its nodes so far, who made each value, and new nodes, weights and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from torch_to_nnef.graph.fold import live
from torch_to_nnef.graph.ir import Graph, Node, Shape, Value
from torch_to_nnef.torch_internals import OpOverload, pytree


class Rewriting:
    """Nodes are added in order; a value that is replaced is read as its replacement from then on."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.weights, self.tensors = dict(graph.weights), dict(graph.tensors)
        self._makers: dict[str, Node] = {}
        self._replaced: dict[str, Value] = {}
        self._names = {v.name for node in graph.nodes for v in node.outputs} | {v.name for v in graph.inputs}
        self._names |= {node.name for node in graph.nodes} | set(graph.weights)

    def keep(self, node: Node) -> None:
        """A node as it is, but for what was replaced."""
        args, kwargs = pytree.tree_map_only(Value, self.current, (list(node.args), dict(node.kwargs)))
        node = replace(node, args=tuple(args), kwargs=kwargs)
        self.nodes.append(node)
        self._makers |= dict.fromkeys((value.name for value in node.outputs), node)

    def add(
        self,
        target: OpOverload,
        args: tuple[Any, ...],
        like: Node,
        shape: Shape,
        dtype: torch.dtype,
        name: str = "",
        kwargs: Mapping[str, Any] | None = None,
    ) -> Value:
        """The value of a new node that stands where `like` does in the model; `name`: that of a value it takes the place of."""
        value = Value(name or self.fresh(like.name, target), tuple(shape), dtype)
        self.keep(Node(value.name, target, args, kwargs or {}, (value,), like.module_path, like.source))
        return value

    def store(self, tensor: torch.Tensor, fqn: str) -> Value:
        """`tensor` as a weight of the graph under a name like `fqn`."""
        if (known := next((f for f, held in self.tensors.items() if held is tensor), None)) is None:
            known, count = fqn, 0
            while known in self.tensors:
                count += 1
                known = f"{fqn}_{count}"
            self.tensors[known] = tensor
        name = self._unused(known.replace(".", "_"))
        self.weights[name] = known
        return Value(name, tuple(tensor.shape), tensor.dtype)

    def replace(self, old: Value, new: Value) -> None:
        """Read `new` where `old` was."""
        self._replaced[old.name] = new

    def current(self, value: Value) -> Value:
        """What `value` is now."""
        return self._replaced.get(value.name, value)

    def maker(self, value: Value) -> Node | None:
        """The node that gives `value`; None for inputs and weights."""
        return self._makers.get(value.name)

    def tensor(self, value: Value) -> torch.Tensor | None:
        """The tensor of a weight."""
        fqn = self.weights.get(value.name)
        return None if fqn is None else self.tensors[fqn]

    def fresh(self, name: str, target: OpOverload) -> str:
        """An unused name for a node of `target` beside the node `name`."""
        return self._unused(f"{name}_{target._schema.name.split('::')[1]}")

    def _unused(self, base: str) -> str:
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def done(self) -> Graph:
        """The graph, without what no output depends on."""
        outputs = tuple(map(self.current, self.graph.outputs))
        nodes = live(self.nodes, outputs)
        used = {
            leaf.name for n in nodes for leaf in pytree.tree_leaves((n.args, dict(n.kwargs))) if isinstance(leaf, Value)
        }
        used |= {value.name for value in outputs}
        weights = {name: fqn for name, fqn in self.weights.items() if name in used}
        return replace(self.graph, nodes=tuple(nodes), outputs=outputs, weights=weights, tensors=self.tensors)
