"""From float values back to codes: rounding moves up to where values come from, and joins the products there.

All rules are exact, since rounding to codes is monotone: bounds become bounds of codes, what moves elements moves codes, a function of
dequantized codes is a table of 256.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.graph.codes import JOINS, MOVES, POOLS, bounds
from torch_to_nnef.graph.fold import values
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.rewriting import Rewriting
from torch_to_nnef.torch_internals import OpOverload

aten = torch.ops.aten

_FUNCTIONS = frozenset(
    {
        aten.abs.default,
        aten.celu.default,
        aten.elu.default,
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardsigmoid_.default,
        aten.hardswish.default,
        aten.hardswish_.default,
        aten.leaky_relu.default,
        aten.leaky_relu_.default,
        aten.mish.default,
        aten.neg.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softplus.default,
        aten.tanh.default,
    }
)


@dataclass(frozen=True)
class _Grid:
    """What values are rounded to."""

    scale: float
    zero_point: int
    low: int
    high: int

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = ops.quantize(x, self.scale, self.zero_point, self.low, self.high)
        return codes

    def within(self, low: float, high: float) -> _Grid:
        below, above = self.codes(torch.tensor([low, high], dtype=torch.float32)).tolist()
        return replace(self, low=below, high=above)

    @property
    def parts(self) -> tuple[float, int, int, int]:
        return self.scale, self.zero_point, self.low, self.high


def requantize(graph: Graph) -> Graph:
    """`graph` with what is rounded in 8 bits computed in 8 bits where that is the same."""
    lifting = _Lifting(graph)
    for node in graph.nodes:
        if node.target is ops.quantize:
            x, *parts = node.args
            out = node.outputs[0]
            lifting.rewriting.replace(out, lifting.codes(lifting.rewriting.current(x), _Grid(*parts), node, out.name))
        else:
            lifting.rewriting.keep(node)
    graph = _fused(lifting.rewriting.done())
    return replace(graph, scales=_scales(graph))


class _Lifting:
    def __init__(self, graph: Graph) -> None:
        self.rewriting = Rewriting(graph)
        self._known: dict[tuple[str, _Grid], Value] = {}

    def codes(self, value: Value, grid: _Grid, like: Node, name: str = "") -> Value:
        """`value` rounded to `grid`."""
        key = value.name, grid
        if key not in self._known:
            self._known[key] = self._codes(value, grid, like, name)
        return self._known[key]

    def _codes(self, value: Value, grid: _Grid, like: Node, name: str) -> Value:
        node = self.rewriting.maker(value)
        if node is None:
            return self._rounded(value, grid, like, name)
        if (limits := bounds(node)) is not None:
            return self.codes(node.args[0], grid.within(*limits), like, name)
        if node.target is ops.dequantize:
            return self._again(node, grid, like, name)
        if node.target in _FUNCTIONS and (table := self._table(node, grid)) is not None:
            codes = self.rewriting.maker(node.args[0]).args[0]  # type: ignore[union-attr]
            return self._added(ops.look_up, (codes, table), value, node, name)
        if node.target in POOLS and self._is_rescaled_by_channel(node.args[0]):
            return self._rounded(*self._pooled(node, value, grid), like, name)
        if node.target in MOVES and self._is_integer(node.args[0]):
            return self._added(node.target, (self.codes(node.args[0], grid, like), *node.args[1:]), value, node, name)
        if node.target in JOINS and all(map(self._is_integer, node.args[0])):
            parts = [self.codes(part, grid, like) for part in node.args[0]]
            return self._added(node.target, (parts, *node.args[1:]), value, node, name)
        return self._rounded(value, grid, like, name)

    def _is_rescaled_by_channel(self, value: Value) -> bool:
        """Whether rounding has to be computed: then the fewer values are left by pooling, the better."""
        node = self._source(value)
        scale = self.rewriting.tensor(node.args[1]) if node is not None and node.target is ops.rescale else None
        return scale is not None and scale.numel() > 1

    def _pooled(self, node: Node, value: Value, grid: _Grid) -> tuple[Value, _Grid]:
        """A pool over what is not bounded yet, and the bounds in codes."""
        inner = node.args[0]
        while (maker := self.rewriting.maker(inner)) is not None and (limits := bounds(maker)) is not None:
            inner, grid = maker.args[0], grid.within(*limits)
        if inner is node.args[0]:
            return value, grid
        args = (inner, *node.args[1:])
        return self.rewriting.add(node.target, args, node, value.shape, value.dtype, kwargs=node.kwargs), grid

    def _source(self, value: Value) -> Node | None:
        """What `value` is moved and bounded from."""
        node = self.rewriting.maker(value)
        while node is not None and (node.target in MOVES or bounds(node) is not None):
            node = self.rewriting.maker(node.args[0])
        return node

    def _rounded(self, value: Value, grid: _Grid, like: Node, name: str) -> Value:
        return self.rewriting.add(ops.quantize, (value, *grid.parts), like, value.shape, torch.int8, name)

    def _added(self, target: OpOverload, args: tuple[Any, ...], value: Value, node: Node, name: str) -> Value:
        kwargs = node.kwargs if target is node.target else {}
        return self.rewriting.add(target, args, node, value.shape, torch.int8, name, kwargs)

    def _again(self, node: Node, grid: _Grid, like: Node, name: str) -> Value:
        codes: Value = node.args[0]
        scale, zero_point = node.args[1:]
        shape = node.outputs[0].shape
        if (scale, zero_point) != (grid.scale, grid.zero_point):
            table = grid.codes(ops.dequantize(_all_codes(), scale, zero_point))
            return self.rewriting.add(ops.look_up, (codes, self._stored(table, node)), like, shape, torch.int8, name)
        maker = self.rewriting.maker(codes)
        low, high = _limits(maker)
        if grid.low <= low and high <= grid.high:
            return codes
        if maker is not None and maker.target is ops.quantize and low <= grid.high and grid.low <= high:
            both = replace(grid, low=max(low, grid.low), high=min(high, grid.high))
            return self._rounded(maker.args[0], both, maker, name)
        return self.rewriting.add(ops.clamp_codes, (codes, grid.low, grid.high), like, shape, torch.int8, name)

    def _table(self, node: Node, grid: _Grid) -> Value | None:
        """What the function of `node` makes of each code, if its argument is codes."""
        maker = self.rewriting.maker(node.args[0])
        if maker is None or maker.target is not ops.dequantize:
            return None
        _, scale, zero_point = maker.args
        results = node.target(ops.dequantize(_all_codes(), scale, zero_point), *node.args[1:], **node.kwargs)
        return self._stored(grid.codes(results), node)

    def _stored(self, table: torch.Tensor, node: Node) -> Value:
        same = (t for t in self.rewriting.tensors.values() if t.shape == table.shape and t.dtype is table.dtype)
        table = next((t for t in same if torch.equal(t, table)), table)
        return self.rewriting.store(table, f"constant.{node.name}_table")

    def _is_integer(self, value: Value) -> bool:
        """Whether `value` comes from codes or sums without anything between that has to be computed in floats."""
        node = self._source(value)
        if node is not None and node.target in JOINS:
            return all(map(self._is_integer, node.args[0]))
        if node is not None and node.target in _FUNCTIONS:
            node = self.rewriting.maker(node.args[0])
            return node is not None and node.target is ops.dequantize
        return node is not None and node.target in (ops.dequantize, ops.rescale)


def _all_codes() -> torch.Tensor:
    return torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)


def _limits(node: Node | None) -> tuple[int, int]:
    """Between which codes the result of `node` lies."""
    if node is not None and node.target in (ops.quantize, ops.clamp_codes):
        return node.args[-2], node.args[-1]
    return ops.CODES


def _scales(graph: Graph) -> dict[str, float]:
    """What a code means, of weights that only integer products read."""
    scales, others = dict[str, float](), set[str]()
    for node in graph.nodes:
        multiplied = node.args[1] if node.target in ops.PRODUCTS else None
        depthwise = node.target is ops.convolve and ops.is_depthwise(node.args[1].shape, node.args[-1])
        for value in values((node.args, dict(node.kwargs))):
            fqn = graph.weights.get(value.name, "")
            scale = graph.tensors.get(f"{fqn}.scale")
            if value is not multiplied or depthwise or scale is None or scale.numel() > 1:
                others.add(fqn)
            else:
                scales[fqn] = scale.item()
    return {fqn: scale for fqn, scale in scales.items() if fqn not in others}


_WHOLE = {ops.linear: ops.linear_requantized, ops.convolve: ops.convolve_requantized}
_LARGEST_BIAS = 1 << 30


def _fused(graph: Graph) -> Graph:
    """Products whose sums have one scale, and are only rounded to codes again, give codes: tract does that in the kernel."""
    rewriting = Rewriting(graph)
    makers = {value.name: node for node in graph.nodes for value in node.outputs}
    readers = Counter(v.name for node in graph.nodes for v in values((node.args, dict(node.kwargs))))
    readers.update(value.name for value in graph.outputs)
    for node in graph.nodes:
        if node.target is not ops.quantize or not _fuse(rewriting, node, makers, readers):
            rewriting.keep(node)
    return rewriting.done()


def _fuse(rewriting: Rewriting, node: Node, makers: dict[str, Node], readers: Counter[str]) -> bool:
    x, step, zero_point, low, high = node.args
    rescale = makers.get(x.name)
    if rescale is None or rescale.target is not ops.rescale or readers[x.name] > 1:
        return False
    sums, scale, bias = rescale.args
    product, scales = makers[sums.name], rewriting.tensor(scale)
    if readers[sums.name] > 1 or scales is None or scales.numel() != 1:
        return False
    if product.target is ops.convolve and ops.is_depthwise(product.args[1].shape, product.args[-1]):
        return False
    channels = product.args[1].shape[0]
    added = torch.zeros(channels) if bias is None else rewriting.tensor(bias)
    if added is None:
        return False
    counts = torch.round(added.to(torch.float64).reshape(-1) / scales.item())
    if counts.abs().max() > _LARGEST_BIAS:
        return False
    codes, weight, *rest = product.args
    bias = rewriting.store(counts.to(torch.int32), f"{rewriting.weights[weight.name]}.bias")
    args = (codes, weight, bias, *rest, scales.item() / step, zero_point, low, high)
    out = node.outputs[0]
    rewriting.add(_WHOLE[product.target], args, product, out.shape, torch.int8, out.name)
    return True
