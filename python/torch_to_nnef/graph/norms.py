"""Convolutions whose result only a batch norm reads."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch_to_nnef.graph.fold import values
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.products import CONVOLUTIONS, NORMALIZATIONS
from torch_to_nnef.quantize.norms import Norm


def find_norms(graph: Graph) -> tuple[Norm, ...]:
    """Those whose tensors are weights that nothing else reads."""
    makers = {value.name: node for node in graph.nodes for value in node.outputs}
    readers = Counter(v.name for node in graph.nodes for v in values((node.args, dict(node.kwargs))))
    readers.update(value.name for value in graph.outputs)
    shared = Counter(id(graph.tensors[fqn]) for fqn in graph.weights.values())

    def name(value: Any) -> str | None:
        """Of a weight that is read once."""
        fqn = graph.weights.get(value.name) if isinstance(value, Value) else None
        once = fqn is not None and readers[value.name] == 1 and shared[id(graph.tensors[fqn])] == 1
        return fqn if once else None

    return tuple(
        norm for node in graph.nodes if node.target in NORMALIZATIONS and (norm := _norm(node, makers, readers, name))
    )


def _norm(node: Node, makers: dict[str, Node], readers: Counter[str], name: Any) -> Norm | None:
    convolution = makers.get(node.args[0].name)
    if convolution is None or convolution.target not in CONVOLUTIONS or readers[node.args[0].name] > 1:
        return None
    bias = convolution.args[2] if len(convolution.args) > 2 else convolution.kwargs.get("bias")
    weight, offset, mean, variance = node.args[1:5]
    given = [v for v in (convolution.args[1], bias, weight, offset, mean, variance) if v is not None]
    if mean is None or variance is None or not all(map(name, given)):
        return None
    eps = float(node.args[NORMALIZATIONS[node.target]])
    return Norm(name(convolution.args[1]), name(bias), name(weight), name(mean), name(variance), eps)
