"""How the captured graph consumes each parameter: what decides whether it may be packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.opaque import weight_use
from torch_to_nnef.graph.recurrent import recurrent
from torch_to_nnef.quantize.targets import Use
from torch_to_nnef.torch_internals import OpOverload, pytree

aten = torch.ops.aten

# (op, position of the argument) -> use.
_USES: Mapping[tuple[OpOverload, int], Use] = {
    (aten.linear.default, 1): Use.LINEAR,
    (recurrent, 2): Use.LINEAR,
    (recurrent, 3): Use.LINEAR,
    (recurrent, 6): Use.LINEAR,
    (aten.embedding.default, 0): Use.EMBEDDING,
    (aten.conv1d.default, 1): Use.CONV,
    (aten.conv1d.padding, 1): Use.CONV,
    (aten.conv2d.default, 1): Use.CONV,
    (aten.conv2d.padding, 1): Use.CONV,
    (aten.conv_transpose1d.default, 1): Use.CONV_TRANSPOSE,
    (aten.conv_transpose2d.input, 1): Use.CONV_TRANSPOSE,
}
_SAME = frozenset({aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default})


def _use(node: Node, position: int, index: int) -> Use:
    if node.target is torch.ops.t2n.module.default:
        return weight_use(node, position, index)
    use = _USES.get((node.target, position), Use.OTHER)
    return Use.DEPTHWISE_CONV if use is Use.CONV and _is_depthwise(node) else use


def _is_depthwise(node: Node) -> bool:
    """Whether every channel has its own filters: `groups` is the last argument of a convolution."""
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    weight: Value = node.args[1]
    return bool(groups > 1 and weight.shape[1] == 1)


def weight_uses(graph: Graph) -> dict[str, frozenset[Use]]:
    """Fqn -> uses, for every tensor the graph reads; all fqns of a shared tensor have the uses of each of them."""
    origin = {name: id(graph.tensors[fqn]) for name, fqn in graph.weights.items()}
    uses = defaultdict[int, set[Use]](set)
    for node in graph.nodes:
        if node.target in _SAME and isinstance(node.args[0], Value) and node.args[0].name in origin:
            origin[node.outputs[0].name] = origin[node.args[0].name]
            continue
        for position, arg in enumerate((*node.args, *node.kwargs.values())):
            for index, leaf in enumerate(pytree.tree_leaves(arg)):
                if isinstance(leaf, Value) and leaf.name in origin:
                    uses[origin[leaf.name]].add(_use(node, position, index))
    for value in graph.outputs:
        if value.name in origin:
            uses[origin[value.name]].add(Use.OTHER)
    used = set(graph.weights.values())
    return {fqn: frozenset(uses[id(t)]) for fqn, t in graph.tensors.items() if fqn in used or id(t) in uses}
