"""A mixture of experts as one call: `t2n::experts`, and `t2n::routed_experts` where tract has a router like the one in front of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from torch_to_nnef.graph.fold import IDENTITIES, live
from torch_to_nnef.graph.ir import Graph, Node, Shape, Value
from torch_to_nnef.log import LOGGER
from torch_to_nnef.torch_internals import OpOverload

aten = torch.ops.aten

# Activations of tract_moe_ffn, by its names.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": partial(gelu, approximate="tanh"),
    "relu": relu,
}

torch.library.define(
    "t2n::experts",
    "(Tensor x, Tensor chosen, Tensor shares, Tensor gate_up, Tensor down, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "t2n::routed_experts",
    "(Tensor x, Tensor router, Tensor gate_up, Tensor down, int k, str gate, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
experts = torch.ops.t2n.experts.default
# A node of ours alone: torch never runs it.
routed_experts = torch.ops.t2n.routed_experts.default


@torch.library.impl("t2n::experts", "CompositeExplicitAutograd")
def _compute(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """For each of x [T, D] the sum of `shares` [T, k] of what its `chosen` [T, k] experts give.

    An expert is down[e] (act(gate[e] x) * up[e] x), with gate and up stacked in gate_up [E, 2H, D], and down [E, D, H].
    """
    result = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[rows], gate_up[expert]).chunk(2, -1)
        y = linear(ACTIVATIONS[activation](gate) * up, down[expert]) * shares[rows, place, None]
        result.index_add_(0, rows, y.to(x.dtype))
    return result


torch.library.register_fake("t2n::experts", lambda x, *rest: torch.empty_like(x))

# From the shares back to the logits of the router -> the gate of tract_moe_ffn. `share` divides by the sum.
_GATES: Mapping[tuple[str, ...], str] = {
    ("share", "topk", "softmax"): "softmax_topk",
    ("softmax", "topk"): "softmax_topk",
    ("topk", "softmax"): "softmax_all",
    ("topk", "sigmoid"): "sigmoid",
    ("sigmoid", "topk"): "sigmoid",
    ("topk",): "raw",
}
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default})
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_STEPS: Mapping[OpOverload, str] = {
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.sigmoid.default: "sigmoid",
    aten.topk.default: "topk",
    aten.div.Tensor: "share",
}


def join_routers(graph: Graph) -> Graph:
    """Experts and their router as one node, where the router is one that tract has."""
    if all(node.target is not experts for node in graph.nodes):
        return graph
    reader = _Reader(graph)
    nodes = [reader.joined(node) if node.target is experts else node for node in graph.nodes]
    return replace(graph, nodes=tuple(live(nodes, graph.outputs)))


def warn_of_dense_experts(graph: Graph) -> None:
    """Say that mixtures of experts with a router that tract does not have take more time."""
    paths = [node.module_path for node in graph.nodes if node.target is experts]
    if paths:
        LOGGER.warning(
            "tract has no router like that of %s%s: the archive computes every expert for each token",
            paths[0], f" and {len(paths) - 1} more" if len(paths) > 1 else "",
        )  # fmt: skip


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.weights = graph.weights
        self.makers = {value.name: node for node in graph.nodes for value in node.outputs}

    def joined(self, node: Node) -> Node:
        """`node` with its router; as it is if that is not understood."""
        x, chosen, shares, gate_up, down, activation = node.args
        path, topk, logits = self._path(shares)
        gate = _GATES.get(path)
        product = self._maker(logits)
        if gate is None or topk is None or product is None or product.target is not aten.linear.default:
            return node
        router = self._same(product.args[1])
        if (
            self._same(chosen) != topk.outputs[1]
            or self._rows(product.args[0]) != self._rows(x)
            or len(product.args) > 2
            or router.name not in self.weights
        ):
            return node
        args = (x, router, gate_up, down, topk.args[1], gate, activation)
        return replace(node, target=routed_experts, args=args, kwargs={})

    def _path(self, shares: Value) -> tuple[tuple[str, ...], Node | None, Value]:
        """The steps that make `shares`, the one that chooses, and what they start from."""
        steps, topk, value = list[str](), None, self._same(shares)
        while (node := self._maker(value)) is not None and self._is_step(node):
            steps.append(_STEPS[node.target])
            topk = node if node.target is aten.topk.default else topk
            value = self._same(node.args[0])
        return tuple(steps), topk, value

    def _is_step(self, node: Node) -> bool:
        """Whether it works on the last axis, as a router does."""
        kind = _STEPS.get(node.target)
        if kind == "softmax":
            return _is_last(node.args[1], node)
        if kind == "topk":
            return all(_is_last(axis, node) for axis in node.args[2:3]) and all(node.args[3:4]) and not node.kwargs
        return kind == "sigmoid" or (kind == "share" and self._is_share(node))

    def _is_share(self, node: Node) -> bool:
        """Whether it divides by the sum over the last axis of what it divides."""
        total = self._maker(node.args[1])
        return (
            total is not None
            and total.target is aten.sum.dim_IntList
            and self._same(total.args[0]) == self._same(node.args[0])
            and [_is_last(axis, node) for axis in total.args[1]] == [True]
            and bool(total.args[2:3] == (True,) or total.kwargs.get("keepdim"))
        )

    def _maker(self, value: Any) -> Node | None:
        return self.makers.get(self._same(value).name) if isinstance(value, Value) else None

    def _same(self, value: Value) -> Value:
        """`value` before it was cast or copied."""
        return self._before(value, IDENTITIES | _CASTS)

    def _rows(self, value: Value) -> tuple[Value, Shape]:
        """`value` before it was viewed, and as what: the same elements in the same order."""
        start = self._before(value, IDENTITIES | _CASTS | _VIEWS)
        return start, value.shape

    def _before(self, value: Value, moves: frozenset[OpOverload]) -> Value:
        while (node := self.makers.get(value.name)) is not None and node.target in moves:
            source: Value = node.args[0]
            if source.dtype.is_floating_point != value.dtype.is_floating_point:
                break
            value = source
        return value


def _is_last(axis: int, node: Node) -> bool:
    return axis in (-1, len(node.outputs[0].shape) - 1)
