"""How far outputs move if a few values are rounded to the other of two codes, as happens between two exact ways to compute a sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.graph.capture import Captured
from torch_to_nnef.graph.codes import MOVES
from torch_to_nnef.graph.ir import Graph, Value
from torch_to_nnef.graph.products import FACTORS
from torch_to_nnef.tensor.quant import QTensorInt8
from torch_to_nnef.torch_internals import pytree

# A bias in whole sums is off by half of one, which is up to a hundredth of a code: so often rounding may fall otherwise.
_SHARE = 0.01
# The largest difference of a few runs is an estimate: outputs may differ by this much more.
_RUNS, _MARGIN = 3, 2.0

_ROUNDS = frozenset({ops.quantize, ops.linear_requantized, ops.convolve_requantized, ops.look_up})


def rounds(graph: Graph) -> bool:
    """Whether anything is rounded to codes while `graph` runs."""
    return any(node.target in _ROUNDS for node in graph.nodes)


def steps(graph: Graph) -> tuple[float, ...]:
    """For each output that is codes of 8 bits its scale, 0 for others."""
    makers = {value.name: node for node in graph.nodes for value in node.outputs}

    def step(value: Value) -> float:
        node = makers.get(value.name)
        while node is not None and node.target in MOVES:
            node = makers.get(node.args[0].name)
        return float(node.args[1]) if node is not None and node.target is ops.dequantize else 0.0

    return tuple(map(step, graph.outputs))


def slack(captured: Captured, graph: Graph, tensors: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """For each output of `graph` how far it may be from torch's at these inputs if a hundredth of the codes of each tensor is one off.

    One at least. That is no more than a third of the noise that rounding to 8 bits makes anyway (0.1 of a code against 0.29, RMS).
    """
    found = list(steps(graph))
    exact = _outputs(captured, tensors, None)
    for seed in range(_RUNS):
        for i, (a, b) in enumerate(zip(exact, _outputs(captured, tensors, seed), strict=True)):
            if a.is_floating_point() and a.numel():
                moved = float((a.double() - b.double()).abs().max())
                found[i] = max(found[i], _MARGIN * moved)
    # One code more, counted in f32.
    return tuple(step * (1 + 1e-5) for step in found)


@torch.no_grad()
def _outputs(captured: Captured, tensors: Sequence[torch.Tensor], seed: int | None) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(captured.run(tensors, _Flipping(captured.program.graph_module, seed)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class _Flipping(torch.fx.Interpreter):
    """Runs a capture with some codes one off; with none for no seed."""

    def __init__(self, module: torch.fx.GraphModule, seed: int | None) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._random = None if seed is None else torch.Generator().manual_seed(seed)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call of the graph; what it rounds is rounded otherwise here and there."""
        if target in FACTORS:
            weight, other = (args[i] for i in FACTORS[target])
            if isinstance(weight, QTensorInt8) and (q := weight.input_qparams) is not None:
                codes = self._flipped(q.quantize(other), q.quant_min, q.quant_max)
                args = tuple(q.dequantize(codes).to(other.dtype) if a is other else a for a in args)
        if target is ops.dequantize_chosen:
            codes, *rest, low = args
            args = (self._flipped(codes, low, low + 255), *rest, low)
        result = super().call_function(target, args, dict(kwargs))
        if str(target).startswith("quantized_decomposed.quantize_per_tensor"):
            low, high = args[3], args[4]
            result = self._flipped(result, low, high)
        return result

    def _flipped(self, codes: torch.Tensor, low: int, high: int) -> torch.Tensor:
        if self._random is None:
            return codes
        chosen = torch.rand(codes.shape, generator=self._random)
        if chosen.numel():  # one at least, however few there are
            chosen.view(-1)[chosen.argmin()] *= _SHARE
        moved = (chosen < _SHARE).to(torch.int32) - 2 * (chosen < _SHARE / 2).to(torch.int32)
        return (codes.to(torch.int32) + moved).clamp(low, high).to(codes.dtype)
