"""Padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.cut import joined
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# torch's mode -> as tract spells it.
_BORDERS = {"constant": "constant", "reflect": "reflect", "replicate": "replicated"}


@lowers(aten.constant_pad_nd.default)
def constant_pad(e: Emitter, x: Ref, pad: Sequence[Dim], value: Scalar = 0) -> Ref:
    """Padded with a constant; `pad` starts at the last axis."""
    return pad_mode(e, x, pad, "constant", value)


@lowers(aten.pad.default)
def pad_mode(e: Emitter, x: Ref, pad: Sequence[Dim], mode: str = "constant", value: Scalar | None = None) -> Ref:
    """Padded by torch.nn.functional.pad's rules; negative amounts cut."""
    sides: list[tuple[Dim, Dim]] = list(zip(pad[::2], pad[1::2], strict=True))
    sides = [*[(0, 0)] * (x.rank - len(sides)), *reversed(sides)]
    added = [(_added(before), _added(after)) for before, after in sides]
    cut = [(_cut(before), _cut(after)) for before, after in sides]
    # A replicated border is still there when all it was taken from is cut away; a circular one continues what is left.
    if mode == "circular":
        return _joined(e, _trimmed(e, x, cut), added, None)
    return _trimmed(e, _padded(e, x, added, mode, value or 0), cut)


def _added(side: Dim) -> Dim:
    return max(side, 0) if isinstance(side, int) else side


def _cut(side: Dim) -> int:
    return max(-side, 0) if isinstance(side, int) else 0


def _trimmed(e: Emitter, x: Ref, amounts: Sequence[tuple[int, int]]) -> Ref:
    for axis, (begin, end) in enumerate(amounts):
        x = e.slice(x, axis, begin, x.shape[axis] - begin - end) if begin or end else x
    return x


def _padded(e: Emitter, x: Ref, amounts: Sequence[tuple[Dim, Dim]], mode: str, fill: Scalar) -> Ref:
    if all(sides == (0, 0) for sides in amounts):
        return x
    static = all(isinstance(side, int) for sides in amounts for side in sides)
    if not static and mode != "constant":
        raise e.refuse(f"padding {amounts} in mode {mode!r}: the amounts are dynamic; pad with a constant")
    if mode == "constant" and not (static and _is_literal(fill, x.dtype)):
        return _joined(e, x, amounts, e.full(fill))
    # tract pads numbers only.
    numbers = e.cast(x, torch.uint8) if x.dtype is torch.bool else x
    filled: dict[str, Any] = {"value": float(fill)} if mode == "constant" else {}
    shape = tuple(before + size + after for size, (before, after) in zip(x.shape, amounts, strict=True))
    padded = e.op("pad", numbers, out=shape, padding=amounts, border=_BORDERS[mode], **filled)
    return e.binary("ne", padded, 0, torch.uint8, result=torch.bool) if x.dtype is torch.bool else padded


def _is_literal(fill: Scalar, dtype: torch.dtype) -> bool:
    """Whether tract, whose border value is f32, pads with exactly `fill`."""
    return math.isfinite(fill) and (
        dtype in (torch.float16, torch.float32) or float(torch.tensor(fill).float()) == fill
    )


def _joined(e: Emitter, x: Ref, amounts: Sequence[tuple[Dim, Dim]], fill: Ref | None) -> Ref:
    """Parts put before and after `x`: of the value `fill`, or without one what stands at its other end."""

    def part(axis: int, begin: Dim, amount: Dim) -> list[Ref]:
        if amount == 0:
            return []
        shape = (*x.shape[:axis], amount, *x.shape[axis + 1 :])
        return [e.slice(x, axis, begin, amount) if fill is None else e.broadcast_to(fill, shape)]

    for axis, (before, after) in enumerate(amounts):
        size = x.shape[axis]
        x = joined(e, [*part(axis, size - before, before), x, *part(axis, 0, after)], axis)
    return x
