"""Interpolation of the axes behind batch and channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec)
def upsample_nearest(
    e: Emitter, input: Ref, output_size: Sequence[Dim] | None, scale_factors: Sequence[float] | None
) -> Ref:
    """Each output takes the input at floor(index / scale)."""
    return _resize(
        e, input, scale_factors, interpolator="nearest", coord_transformer="asymmetric", nearest_mode="floor"
    )


@lowers(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec)
def upsample_linear(
    e: Emitter,
    input: Ref,
    output_size: Sequence[Dim] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> Ref:
    """Between the two nearest inputs on each axis, from pixel centres, or with the corners aligned."""
    transformer = "align_corners" if align_corners else "half_pixel"
    return _resize(e, input, scale_factors, interpolator="linear", coord_transformer=transformer)


def _resize(e: Emitter, x: Ref, scale_factors: Sequence[float] | None, **attributes: Any) -> Ref:
    if scale_factors is not None and all(float(s).is_integer() for s in scale_factors):
        scales = [float(s) for s in scale_factors]
    elif scale_factors is None:
        scales = [_scale(e, before, after) for before, after in zip(x.shape[2:], e.out.shape[2:], strict=True)]
    else:
        raise e.refuse(f"resizing by {list(scale_factors)}: tract takes whole factors, or static sizes (size=)")
    return e.op("tract_core_resize", x, out=e.out.shape, scales=[1.0, 1.0, *scales], **attributes)


def _scale(e: Emitter, before: Dim, after: Dim) -> float:
    """The f32 ratio from which tract computes `after` again: it truncates before * ratio."""
    if not isinstance(before, int) or not isinstance(after, int):
        raise e.refuse("resizing a dynamic axis to a size; use a whole scale_factor")
    ratio = np.float32(after) / np.float32(before)
    while int(np.float32(before) * ratio) < after:
        ratio = np.nextafter(ratio, np.float32(np.inf))
    return float(ratio)
