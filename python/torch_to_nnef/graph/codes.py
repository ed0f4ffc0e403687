"""Which values of a graph are codes in disguise: what only moves or picks elements of a dequantized tensor does the same to its codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.graph.fold import IDENTITIES
from torch_to_nnef.graph.ir import Node, Value
from torch_to_nnef.graph.rewriting import Rewriting
from torch_to_nnef.torch_internals import OpOverload

aten = torch.ops.aten

# Calls that pick the largest of some elements, or move elements of their first argument: rounding to codes commutes with them.
POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})
MOVES = (
    IDENTITIES
    | POOLS
    | {
        aten.channel_shuffle.default,
        aten.dropout.default,
        aten.expand.default,
        aten.feature_dropout.default,
        aten.flatten.using_ints,
        aten.flip.default,
        aten.permute.default,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)
JOINS = frozenset({aten.cat.default, aten.stack.default})


@dataclass(frozen=True)
class Codes:
    """A tensor as int8 codes: (code - zero_point) * scale."""

    value: Value
    scale: float
    zero_point: int


def as_codes(rewriting: Rewriting, value: Value, like: Node) -> Codes | None:
    """The codes that `value` stands for exactly; None if there are none."""
    node = rewriting.maker(value)
    if node is None:
        return None
    if node.target is ops.dequantize:
        return Codes(*node.args)
    if node.target in MOVES:
        inner = as_codes(rewriting, node.args[0], like)
        return None if inner is None else _over(rewriting, node, value, [inner], (inner.value, *node.args[1:]))
    if node.target in JOINS:
        parts = [as_codes(rewriting, part, like) for part in node.args[0]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or len({(part.scale, part.zero_point) for part in known}) != 1:
            return None
        return _over(rewriting, node, value, known, ([part.value for part in known], *node.args[1:]))
    if node.target in (aten.relu.default, aten.relu_.default):
        if (inner := as_codes(rewriting, node.args[0], like)) is None:
            return None
        args = (inner.value, max(inner.zero_point, ops.CODES[0]), ops.CODES[1])
        return Codes(rewriting.add(ops.clamp_codes, args, node, value.shape, torch.int8), inner.scale, inner.zero_point)
    return None


def _over(rewriting: Rewriting, node: Node, value: Value, inner: list[Codes], args: tuple[Any, ...]) -> Codes:
    codes = rewriting.add(node.target, args, node, value.shape, torch.int8, kwargs=node.kwargs)
    return Codes(codes, inner[0].scale, inner[0].zero_point)


def _hardtanh(node: Node) -> tuple[float, float]:
    low, high = (*node.args[1:], -1.0, 1.0)[:2] if len(node.args) in (1, 3) else (node.args[1], 1.0)
    return float(node.kwargs.get("min_val", low)), float(node.kwargs.get("max_val", high))


def _clamp(node: Node) -> tuple[Any, Any]:
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    return (-math.inf if low is None else low), (math.inf if high is None else high)


_BOUNDS: Mapping[OpOverload, Callable[[Node], tuple[Any, Any]]] = {
    aten.relu.default: lambda node: (0.0, math.inf),
    aten.relu_.default: lambda node: (0.0, math.inf),
    aten.relu6.default: lambda node: (0.0, 6.0),
    aten.relu6_.default: lambda node: (0.0, 6.0),
    aten.hardtanh.default: _hardtanh,
    aten.hardtanh_.default: _hardtanh,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: lambda node: (node.args[1], math.inf),
    aten.clamp_max.default: lambda node: (-math.inf, node.args[1]),
}


def bounds(node: Node) -> tuple[float, float] | None:
    """Between which numbers a call keeps its argument; None if it does something else."""
    found = _BOUNDS[node.target](node) if node.target in _BOUNDS else None
    return found if found is not None and all(isinstance(bound, (int, float)) for bound in found) else None
