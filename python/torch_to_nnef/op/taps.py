"""Interpolation along an axis whose size is known when the model runs: torch's formulas over gathered neighbours."""

from __future__ import annotations

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Ref

_F32 = torch.float32


def nearest_taps(e: Emitter, x: Ref, axis: int, after: Dim, factor: float | None, offset: float) -> Ref:
    """The input at floor((index + offset) * step)."""
    index = e.binary("add", e.arange(0, 1, after, _F32), offset, _F32)
    source = e.op("floor", e.binary("mul", index, _step(e, x.shape[axis], after, factor), _F32))
    return e.op("t2n_neighbour", x, source, _last(e, x, axis), out=_resized(x, axis, after), axis=axis)


def weighted_taps(e: Emitter, x: Ref, axis: int, after: Dim, factor: float | None, aligned: bool, cubic: bool) -> Ref:
    """A mean of the two nearest inputs, or of the four nearest weighted by a cubic; in f32."""
    before, index = x.shape[axis], e.arange(0, 1, after, _F32)
    if aligned:
        # An output of one position takes the first input: any finite step will do.
        gaps = e.op("max", e.scalar(after - 1, _F32), 1.0)
        source = e.binary("mul", index, e.op("div", e.scalar(before - 1, _F32), gaps), _F32)
    else:
        centres = e.binary("mul", e.binary("add", index, 0.5, _F32), _step(e, before, after, factor), _F32)
        source = e.binary("sub", centres, 0.5, _F32)
    if not cubic:
        source = e.binary("max", source, 0.0, _F32)
    around = [a for a in range(x.rank) if a != axis]
    operator = "t2n_interpolate_cubic" if cubic else "t2n_interpolate_linear"
    x = e.cast(x, _F32)
    return e.op(operator, x, source, _last(e, x, axis), out=_resized(x, axis, after), axis=axis, around=around)


def _step(e: Emitter, before: Dim, after: Dim, factor: float | None) -> Ref | float:
    """Distance of two outputs, in inputs."""
    return 1 / factor if factor is not None else e.op("div", e.scalar(before, _F32), e.scalar(after, _F32))


def _last(e: Emitter, x: Ref, axis: int) -> Ref | float:
    return e.scalar(x.shape[axis] - 1, _F32)


def _resized(x: Ref, axis: int, after: Dim) -> tuple[Dim, ...]:
    return (*x.shape[:axis], after, *x.shape[axis + 1 :])
