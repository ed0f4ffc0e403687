"""Mixtures of experts. Their weights are stacked matrices [E, N, K]; packed ones have groups along K."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from torch_to_nnef.graph.experts import experts, routed_experts
from torch_to_nnef.op.activation import gelu
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.product import total_over
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref


@lowers(routed_experts)
def routed(e: Emitter, x: Ref, router: Ref, gate_up: Ref, down: Ref, k: int, gate: str, activation: str) -> Ref:
    """Router and experts as tract's own operator, which computes for each token the experts it chose."""
    width = down.shape[2]
    halves = [e.rows(gate_up, start, width, name) for start, name in ((0, "gate"), (width, "up"))]
    return e.op(
        "tract_moe_ffn", x, e.cast(router, x.dtype), halves[0], down, halves[1],
        out=x.shape, k=k, activation=activation, gate=gate, expert_layout="linear",
    )  # fmt: skip


@lowers(experts)
def dense(e: Emitter, x: Ref, chosen: Ref, shares: Ref, gate_up: Ref, down: Ref, activation: str) -> Ref:
    """Every expert on every token, weighted with what the router gave it: zero, mostly."""
    count, features, width = down.shape
    tokens, single = x.shape[0], torch.float32
    both = _each(e, "enk,tk->etn", gate_up, e.beside(gate_up, e.cast(x, single)), (count, tokens, 2 * width))
    gate, up = (e.slice(both, 2, start, width) for start in (0, width))
    hidden = e.op("mul", _ACTIVATIONS[activation](e, gate), up)
    each = _each(e, "enk,etk->etn", down, hidden, (count, tokens, features))
    index = e.unsqueeze(e.arange(0, 1, count, torch.int64), [0, 1])
    here = e.op("eq", e.unsqueeze(chosen, [2]), index, dtype=torch.bool)
    zero = e.unsqueeze(e.full(0, single), [0, 1, 2])
    share = e.op("select", here, e.unsqueeze(e.cast(shares, single), [2]), zero, out=here.shape, dtype=single)
    total = _each(e, "te,etn->tn", total_over(e, share, [1]), each, (tokens, features))
    return e.cast(total, e.out.dtype)


def _each(e: Emitter, expr: str, a: Ref, b: Ref, out: tuple[object, ...]) -> Ref:
    a = a if e.is_quantized(a) else e.cast(a, torch.float32)
    return e.op("tract_core_einsum", [a, b], out=out, dtype=torch.float32, expr=expr, acc="f32")


_ACTIVATIONS: Mapping[str, Callable[[Emitter, Ref], Ref]] = {
    "silu": lambda e, x: e.op("tract_core_silu", x),
    "relu": lambda e, x: e.op("relu", x),
    "gelu": lambda e, x: gelu(e, x, "tanh"),
}
