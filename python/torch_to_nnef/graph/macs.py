"""Multiply-accumulates of a graph, and which of them run on 8-bit codes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.graph.axes import symbol
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.recurrent import recurrent
from torch_to_nnef.torch_internals import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A product of the graph: the operator, its multiply-accumulates, and why they run on floats if they do.

    module_path: dotted; empty for the root module.
    """

    module_path: str
    operator: str
    macs: int
    reason: str = ""


@dataclass(frozen=True)
class Arithmetic:
    """All products of a graph, in order; between them, how often each operator runs on floats although codes go in or come out."""

    products: tuple[Product, ...]
    float_operators: Mapping[str, int]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run at the sample sizes."""
        return sum(product.macs for product in self.products)

    @property
    def integer_macs(self) -> int:
        """Those on codes."""
        return sum(product.macs for product in self.products if not product.reason)

    @property
    def integer_share(self) -> float:
        """0 to 1."""
        return self.integer_macs / self.macs if self.macs else 0.0


def _of_linear(node: Node) -> Any:
    return math.prod(node.outputs[0].shape) * node.args[1].shape[1]


def _of_convolution(node: Node) -> Any:
    return math.prod(node.outputs[0].shape) * math.prod(node.args[1].shape[1:])


def _of_transposed(node: Node) -> Any:
    return math.prod(node.args[0].shape) * math.prod(node.args[1].shape[1:])


def _of_matrices(node: Node) -> Any:
    return math.prod(node.outputs[0].shape) * node.args[0].shape[-1]


def _of_sum(node: Node) -> Any:
    return math.prod(node.outputs[0].shape) * node.args[1].shape[-1]


def _of_attention(node: Node) -> Any:
    query, key, value = node.args[:3]
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _of_recurrent(node: Node) -> Any:
    return math.prod(node.outputs[0].shape[:-1]) * sum(
        math.prod(v.shape) for v in (node.args[2], node.args[3]) if isinstance(v, Value)
    )


_MACS: Mapping[OpOverload, Callable[[Node], Any]] = {
    ops.linear: _of_linear,
    ops.linear_requantized: _of_linear,
    ops.convolve: _of_convolution,
    ops.convolve_requantized: _of_convolution,
    aten.linear.default: _of_linear,
    aten.conv1d.default: _of_convolution,
    aten.conv2d.default: _of_convolution,
    aten.conv3d.default: _of_convolution,
    aten.conv1d.padding: _of_convolution,
    aten.conv2d.padding: _of_convolution,
    aten.conv3d.padding: _of_convolution,
    aten.conv_transpose1d.default: _of_transposed,
    aten.conv_transpose2d.input: _of_transposed,
    aten.conv_transpose3d.input: _of_transposed,
    aten.mm.default: _of_matrices,
    aten.bmm.default: _of_matrices,
    aten.matmul.default: _of_matrices,
    aten.addmm.default: _of_sum,
    aten.baddbmm.default: _of_sum,
    aten.scaled_dot_product_attention.default: _of_attention,
    recurrent: _of_recurrent,
}


def arithmetic(graph: Graph, sizes: Mapping[str, int]) -> Arithmetic:
    """The products of `graph` at these sizes of its symbols."""
    makers = {value.name: node for node in graph.nodes for value in node.outputs}
    known = {symbol(name): size for name, size in sizes.items()}
    products = []
    for node in graph.nodes:
        if node.target in _MACS:
            macs = int(sympy.sympify(_MACS[node.target](node)).subs(known))
            reason = _of_codes(node) if node.target in ops.PRODUCTS else _reason(graph, node, makers)
            products.append(Product(node.module_path, _operator(node), macs, reason))
    return Arithmetic(tuple(products), dict(_between(graph, makers)))


def _operator(node: Node) -> str:
    name: str = node.target._schema.name.split("::")[1]
    return name.removesuffix("_requantized")


def _of_codes(node: Node) -> str:
    depthwise = node.target is ops.convolve and ops.is_depthwise(node.args[1].shape, node.args[-1])
    return "the sums of codes are exact in f32, which tract is faster with for depthwise" if depthwise else ""


def _reason(graph: Graph, node: Node, makers: Mapping[str, Node]) -> str:
    """Why a product runs on floats."""
    given = [arg for arg in node.args if isinstance(arg, Value)]
    if any((maker := makers.get(arg.name)) is not None and maker.target is ops.dequantize_weight for arg in given):
        return "its weight is in 8 bits, its input is not" if _is_plain(node) else "tract has no 8-bit kernel for it"
    return (
        "its weight is in float" if any(arg.name in graph.weights for arg in given[1:]) else "both factors are computed"
    )


def _is_plain(node: Node) -> bool:
    return node.target not in (
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        recurrent,
    )


def _between(graph: Graph, makers: Mapping[str, Node]) -> Counter[str]:
    """Operators that read dequantized codes, products apart."""
    found = Counter[str]()
    for node in graph.nodes:
        read = (makers.get(arg.name) for arg in _tensors(node))
        if node.target not in _MACS and any(maker is not None and maker.target is ops.dequantize for maker in read):
            found[_operator(node)] += 1
    return found


def _tensors(node: Node) -> list[Value]:
    leaves = (leaf for arg in node.args for leaf in (arg if isinstance(arg, (list, tuple)) else [arg]))
    return [leaf for leaf in leaves if isinstance(leaf, Value)]
