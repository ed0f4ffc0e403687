"""Running sums, products and extremes along one axis."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from torch_to_nnef.graph.ir import Dim, Shape
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import Lowering, lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

_PRODUCT = "y = before * x;"
_LOG_OF_SUM = "y = t2n_logaddexp(before, x);"


@lowers(aten.cumsum.default)
def cumsum(e: Emitter, x: Ref, dim: int) -> Ref:
    """Running sum along one axis; f16 in f32."""
    if not x.rank:
        return e.cast(x, e.out.dtype)
    wide = e.cast(x, _wide(e))
    sums = e.op("tract_core_cumsum", wide, axis=e.axis(dim), exclusive=False, reverse=False)
    return e.cast(sums, e.out.dtype)


def _running(step: str, start: float) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int) -> Ref:
        """One step an element, from `start`; f16 in f32."""
        if not x.rank:
            return e.cast(x, e.out.dtype)
        wide, axis = e.cast(x, _wide(e)), e.axis(dim)
        signature = "(x: tensor<scalar>, before: tensor<scalar>) -> (y: tensor<scalar>)"
        body = e.define(f"t2n_{e.node.target._opname}_step", signature, [step])
        first = e.slice(wide, axis, 0, 1)
        before = e.broadcast_to(e.full(start, wide.dtype), first.shape)
        return e.cast(scan(e, body, axis, {"x": wide}, {"before": (before, "y")})[0], e.out.dtype)

    return lower


def _extreme(comparison: str) -> Lowering:
    def lower(e: Emitter, x: Ref, dim: int) -> list[Ref]:
        """The extreme so far and the last place where it stands; nan is one, and stays."""
        if not x.rank:
            return [x, e.full(0, torch.int64)]
        values, axis = e.cast(x, torch.uint8) if x.dtype is torch.bool else x, dim % x.rank
        body = e.define(
            f"t2n_{e.node.target._opname}_step",
            "(x: tensor<scalar>, best: tensor<scalar>, found: tensor<scalar>, place: tensor<scalar>, one: tensor<scalar>)"
            " -> (y: tensor<scalar>, spot: tensor<scalar>, next: tensor<scalar>)",
            [
                f"better = or(x {comparison} best, ne(x, x));",
                "y = select(better, x, best);",
                "spot = select(better, place, found);",
                "next = place + one;",
            ],
        )
        best = e.slice(values, axis, 0, 1)
        zero, one = (e.full(value, torch.int64) for value in (0, 1))
        states = {
            "best": (best, "y"),
            "found": (e.broadcast_to(zero, best.shape), "spot"),
            "place": (e.broadcast_to(zero, (1,) * x.rank), "next"),
        }
        extremes, spots, _ = scan(e, body, axis, {"x": values}, states, {"one": one})
        return [e.cast(extremes, x.dtype), spots]

    return lower


lowers(aten.cumprod.default)(_running(_PRODUCT, 1.0))
lowers(aten.logcumsumexp.default)(_running(_LOG_OF_SUM, float("-inf")))
lowers(aten.cummax.default)(_extreme(">="))
lowers(aten.cummin.default)(_extreme("<="))


def scan(
    e: Emitter,
    body: str,
    axis: int,
    inputs: Mapping[str, Ref],
    states: Mapping[str, tuple[Ref, str]],
    constants: Mapping[str, Ref] = MappingProxyType({}),
) -> list[Ref]:
    """Run fragment `body` along `axis`, one position of `inputs` at a time; gives each state at every position.

    `states` maps a parameter of the body to its first value and to the result that is its next. tract scans no constants.
    """
    first = next(iter(inputs.values()))
    return e.ops(
        "tract_core_scan",
        body,
        [(name, ref, axis, 1) for name, ref in inputs.items()],
        list(constants.items()),
        [(name, start, result) for name, (start, result) in states.items()],
        [(result, "full", axis, 1) for _, result in states.values()],
        results=[(_along(start, axis, first.shape[axis]), start.dtype) for start, _ in states.values()],
        reset_every_turn=1,
    )


def _wide(e: Emitter) -> torch.dtype:
    return torch.float32 if e.out.dtype is torch.float16 else e.out.dtype


def _along(start: Ref, axis: int, length: Dim) -> Shape:
    return (*start.shape[:axis], length, *start.shape[axis + 1 :])
