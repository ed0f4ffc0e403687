"""Interpolation of the axes behind batch and channels, axis by axis: every mode torch has is separable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.separable import along
from torch_to_nnef.op.statement import Ref
from torch_to_nnef.op.taps import nearest_taps, weighted_taps

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Mode:
    """An interpolation: torch's operator over two axes, and tract's name for it if it has it."""

    operator: Callable[..., torch.Tensor]
    interpolator: str | None
    aligned: bool = False

    def of(self, rows: torch.Tensor, after: int, factor: float | None) -> torch.Tensor:
        """Torch's operator on each row."""
        corners = () if self.interpolator == "nearest" else (self.aligned,)
        return self.operator(rows[None, :, None], [1, after], *corners, None, factor)[0, :, 0]


@lowers(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(e: Emitter, input: Ref, scale_factors: Sequence[float] | None) -> Ref:
    """Each output takes the input at floor(index / scale)."""
    return _resize(e, input, scale_factors, Mode(aten.upsample_nearest2d.default, "nearest"))


@lowers(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec)
def upsample_nearest_exact(e: Emitter, input: Ref, scale_factors: Sequence[float] | None) -> Ref:
    """Each output takes the input at floor((index + 0.5) / scale)."""
    return _resize(e, input, scale_factors, Mode(aten._upsample_nearest_exact2d.default, "nearest"))


_LINEAR = aten.upsample_bilinear2d.default
_SMOOTH = {
    aten.upsample_linear1d.vec: (_LINEAR, "linear"),
    aten.upsample_bilinear2d.vec: (_LINEAR, "linear"),
    aten.upsample_trilinear3d.vec: (_LINEAR, "linear"),
    aten.upsample_bicubic2d.vec: (aten.upsample_bicubic2d.default, "cubic"),
    aten._upsample_bilinear2d_aa.vec: (aten._upsample_bilinear2d_aa.default, None),
    aten._upsample_bicubic2d_aa.vec: (aten._upsample_bicubic2d_aa.default, None),
    aten.upsample_bilinear2d.default: (_LINEAR, "linear"),
    aten.upsample_bicubic2d.default: (aten.upsample_bicubic2d.default, "cubic"),
    aten._upsample_bilinear2d_aa.default: (aten._upsample_bilinear2d_aa.default, None),
    aten._upsample_bicubic2d_aa.default: (aten._upsample_bicubic2d_aa.default, None),
}


@lowers(*(op for op in _SMOOTH if op._overloadname == "vec"))
def upsample_smooth(
    e: Emitter,
    input: Ref,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> Ref:
    """A weighted mean of neighbours on each axis, from pixel centres or with the corners aligned."""
    return _resize(e, input, scale_factors, Mode(*_SMOOTH[e.node.target], align_corners))


@lowers(*(op for op in _SMOOTH if op._overloadname == "default"))
def upsample_smooth2d(
    e: Emitter,
    x: Ref,
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Ref:
    """The same with a factor an axis."""
    return _resize(e, x, [scales_h, scales_w], Mode(*_SMOOTH[e.node.target], align_corners))


def _resize(e: Emitter, x: Ref, factors: Sequence[float | None] | None, mode: Mode) -> Ref:
    """The resize of tract where it gives the same; else a product with torch's weights, or their formula if the axis is dynamic."""
    given: list[float | None] = [None] * (x.rank - 2) if factors is None else list(factors)
    axes = list(zip(range(2, x.rank), given, strict=True))
    scales = {axis: scale for axis, factor in axes if (scale := _scale(x.shape[axis], e.out.shape[axis], factor, mode))}
    for axis, factor in axes:
        before, after = x.shape[axis], e.out.shape[axis]
        if axis in scales or (before == after and factor is None):
            continue
        if isinstance(before, int) and isinstance(after, int):
            x = _by_weights(e, x, axis, before, after, factor, mode)
        elif mode.interpolator is None:
            raise e.refuse("antialiasing of a dynamic axis: its weights are computed at export; make the axis static")
        else:
            x = _by_formula(e, x, axis, after, factor, mode)
    if any(scale != 1 for scale in scales.values()):
        x = e.op(
            "tract_core_resize",
            x,
            out=e.out.shape,
            scales=[scales.get(axis, 1.0) for axis in range(x.rank)],
            interpolator=mode.interpolator,
            coord_transformer=_coordinates(mode),
        )
    return e.cast(x, e.out.dtype)


def _coordinates(mode: Mode) -> str:
    if mode.interpolator == "nearest":
        return "asymmetric"
    return "align_corners" if mode.aligned else "half_pixel"


def _scale(before: Dim, after: Dim, factor: float | None, mode: Mode) -> float | None:
    """The f32 factor from which tract computes the same values and size, or None."""
    if mode.interpolator is None:
        return None
    ratio = after / before
    whole = float(ratio) if not getattr(ratio, "free_symbols", ()) and float(ratio).is_integer() else None
    if mode.interpolator == "nearest":
        return whole if whole and _replicates(mode, int(whole), factor) else None
    if factor is not None and factor != whole and not mode.aligned:
        return None
    if whole is not None:
        return whole
    if not isinstance(before, int) or not isinstance(after, int):
        return None
    scale = np.float32(after) / np.float32(before)
    while int(np.float32(before) * scale) < after:  # tract truncates the product
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)


def _replicates(mode: Mode, times: int, factor: float | None) -> bool:
    """Whether torch, which multiplies by an f32 inverse of the factor, takes each input `times` times."""
    inputs = torch.arange(4096.0)
    outputs = mode.of(inputs[None], len(inputs) * times, factor)[0]
    return bool((outputs == inputs.repeat_interleave(times)).all())


def _by_weights(e: Emitter, x: Ref, axis: int, before: int, after: int, factor: float | None, mode: Mode) -> Ref:
    if mode.interpolator != "nearest":
        return along(e, x, axis, mode.of(torch.eye(before), after, factor).T)
    positions = e.constant(mode.of(torch.arange(float(before))[None], after, factor)[0].long(), "positions")
    return e.op("tract_core_gather", x, positions, out=(*x.shape[:axis], after, *x.shape[axis + 1 :]), axis=axis)


def _by_formula(e: Emitter, x: Ref, axis: int, after: Dim, factor: float | None, mode: Mode) -> Ref:
    if mode.interpolator == "nearest":
        offset = 0.5 if mode.operator is aten._upsample_nearest_exact2d.default else 0.0
        return nearest_taps(e, x, axis, after, factor, offset)
    return weighted_taps(e, x, axis, after, factor, mode.aligned, cubic=mode.interpolator == "cubic")
