"""How the captured graph consumes each parameter: what decides whether it may be packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from torch_to_nnef.graph.experts import experts, routed_experts
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.opaque import weight_use
from torch_to_nnef.graph.recurrent import recurrent
from torch_to_nnef.quantize.targets import Use
from torch_to_nnef.torch_internals import OpOverload, pytree

aten = torch.ops.aten

# (op, position of the argument) -> use.
_USES: Mapping[tuple[OpOverload, int], Use] = {
    (aten.linear.default, 1): Use.LINEAR,
    (aten.mm.default, 1): Use.MATMUL,
    (aten.matmul.default, 1): Use.MATMUL,
    (aten.addmm.default, 2): Use.MATMUL,
    (recurrent, 2): Use.LINEAR,
    (recurrent, 3): Use.LINEAR,
    (recurrent, 6): Use.LINEAR,
    (experts, 3): Use.EXPERTS,
    (experts, 4): Use.EXPERTS,
    (routed_experts, 1): Use.ROUTER,
    (routed_experts, 2): Use.EXPERTS,
    (routed_experts, 3): Use.EXPERTS,
    (aten.embedding.default, 0): Use.EMBEDDING,
    (aten.conv1d.default, 1): Use.CONV,
    (aten.conv1d.padding, 1): Use.CONV,
    (aten.conv2d.default, 1): Use.CONV,
    (aten.conv2d.padding, 1): Use.CONV,
    (aten.conv3d.default, 1): Use.CONV,
    (aten.conv3d.padding, 1): Use.CONV,
    (aten.conv_transpose1d.default, 1): Use.CONV_TRANSPOSE,
    (aten.conv_transpose2d.input, 1): Use.CONV_TRANSPOSE,
}
SAME = frozenset({aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default})
_TRANSPOSES = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.permute_copy.default,
        aten.transpose.int,
    }
)
# The use of a matrix whose transpose is used so.
_OF_TRANSPOSED = {Use.LINEAR: Use.MATMUL, Use.MATMUL: Use.LINEAR}


def _use(node: Node, position: int, index: int, transposed: bool) -> Use:
    if node.target is torch.ops.t2n.module.default:
        use = weight_use(node, position, index)
    else:
        use = _USES.get((node.target, position), Use.OTHER)
    if transposed:
        return _OF_TRANSPOSED.get(use, Use.OTHER)
    return Use.DEPTHWISE_CONV if use is Use.CONV and _is_depthwise(node) else use


def is_transpose(node: Node) -> bool:
    """Whether it exchanges the axes of a matrix; of a permutation that leaves them, the shapes of a square do not tell."""
    if node.target not in _TRANSPOSES or len(node.outputs[0].shape) != 2:
        return False
    axes = [a % 2 for a in pytree.tree_leaves((node.args[1:], dict(node.kwargs)))]
    return axes in ([], [1, 0], [0, 1] if node.target is aten.transpose.int else [])


def _is_depthwise(node: Node) -> bool:
    """Whether every channel has its own filters: `groups` is the last argument of a convolution."""
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    weight: Value = node.args[1]
    return bool(groups > 1 and weight.shape[1] == 1)


def weight_uses(graph: Graph) -> dict[str, frozenset[Use]]:
    """Fqn -> uses, for every tensor the graph reads; all fqns of a shared tensor have the uses of each of them."""
    origin = {name: (id(graph.tensors[fqn]), False) for name, fqn in graph.weights.items()}
    uses = defaultdict[int, set[Use]](set)
    for node in graph.nodes:
        source = origin.get(node.args[0].name) if node.args and isinstance(node.args[0], Value) else None
        if source is not None and (node.target in SAME or is_transpose(node)):
            tensor, transposed = source
            origin[node.outputs[0].name] = (tensor, transposed != is_transpose(node))
            continue
        for position, arg in enumerate((*node.args, *node.kwargs.values())):
            for index, leaf in enumerate(pytree.tree_leaves(arg)):
                if isinstance(leaf, Value) and leaf.name in origin:
                    tensor, transposed = origin[leaf.name]
                    uses[tensor].add(_use(node, position, index, transposed))
    for value in graph.outputs:
        if value.name in origin:
            uses[origin[value.name][0]].add(Use.OTHER)
    used = set(graph.weights.values())
    return {fqn: frozenset(uses[id(t)]) for fqn, t in graph.tensors.items() if fqn in used or id(t) in uses}
