"""Running sums, products and extremes along one axis."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from torch_to_nnef.graph.ir import Dim, Shape
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref

aten = torch.ops.aten

_PRODUCT = "y = before * x;"
# The smallest numbers that need n steps of Euclid's algorithm are Fibonacci's; these counts are beyond each type's last.
_EUCLID = {torch.uint8: 14, torch.int8: 12, torch.int16: 24, torch.int32: 48, torch.int64: 94}
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


@lowers(aten.diff.default)
def diff(e: Emitter, x: Ref, n: int = 1, dim: int = -1, prepend: Ref | None = None, append: Ref | None = None) -> Ref:
    """Differences of neighbours along one axis, n times; of booleans, whether they differ."""
    if not n:
        return x
    axis, dtype = dim % x.rank, e.out.dtype
    parts = [e.cast(part, dtype) for part in (prepend, x, append) if part is not None]
    length = sum(part.shape[axis] for part in parts)
    joined = e.op("concat", parts, out=_along(x, axis, length), axis=axis, dtype=dtype) if len(parts) > 1 else parts[0]
    operator = "tract_core_xor" if dtype is torch.bool else "sub"
    for _ in range(n):
        length = length - 1
        joined = e.binary(operator, e.slice(joined, axis, 1, length), e.slice(joined, axis, 0, length), dtype)
    return joined


@lowers(aten.gcd.default)
def gcd(e: Emitter, x: Ref, other: Ref) -> Ref:
    """Euclid's algorithm, as many steps as the widest numbers can need; a step after the last changes nothing.

    tract wants a scanned input, and that it be read: the count of turns.
    """
    dtype = e.out.dtype
    body = e.define(
        "t2n_gcd_step",
        "(turn: tensor<scalar>, a: tensor<scalar>, b: tensor<scalar>, zero: tensor<scalar>, one: tensor<scalar>)"
        " -> (next_a: tensor<scalar>, next_b: tensor<scalar>)",
        [
            "done = or(eq(b, zero), turn < zero);",
            "next_a = select(done, a, b);",
            "next_b = select(done, b, t2n_fmod_integer(a, select(done, one, b)));",
        ],
    )
    shape = (1, *e.out.shape)
    a, b = (e.unsqueeze(e.broadcast_to(e.cast(side, dtype), e.out.shape), [0]) for side in (x, other))
    turns = e.op("t2n_positions", out=(_EUCLID[dtype],), dtype=torch.int64, hint="turns", length=_EUCLID[dtype])
    turns = e.unsqueeze(e.cast(turns, dtype), range(1, len(shape)))
    constants = {"zero": e.full(0, dtype), "one": e.full(1, dtype)}
    states = {"a": (a, "next_a"), "b": (b, "next_b")}
    reached = scan(e, body, 0, {"turn": turns}, states, constants)[0]
    return e.op("abs", e.squeeze(e.slice(reached, 0, _EUCLID[dtype] - 1, 1), [0]))


@lowers(aten.lcm.default)
def lcm(e: Emitter, x: Ref, other: Ref) -> Ref:
    """|x / gcd * other|, 0 where both are."""
    divisor = e.op("max", gcd(e, x, other), e.full(1))
    return e.op("abs", e.binary("mul", e.binary("div", x, divisor, e.out.dtype), other, e.out.dtype))
