"""Sampling at positions given by a tensor, and the affine grids such positions come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.product import contract
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

_MODES = ("bilinear", "nearest", "bicubic")
_PADDING = ("zeros", "border", "reflection")


@lowers(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(
    e: Emitter, input: Ref, grid: Ref, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Ref:
    """Input (N, C, *) at the normalized positions of grid (N, *, axes); -1 and 1 are its corners."""
    mode, padding = _MODES[interpolation_mode], _PADDING[padding_mode]
    grid = e.cast(grid, torch.float32)
    if (mode, padding) == ("bicubic", "border"):
        input, grid = _with_border(e, input, grid, align_corners)
    return e.op(
        "tract_core_grid_sample",
        input,
        grid,
        out=e.out.shape,
        mode=mode,
        padding_mode=padding,
        align_corners=align_corners,
    )


def _with_border(e: Emitter, x: Ref, grid: Ref, align_corners: bool) -> tuple[Ref, Ref]:
    """One more edge around the input, and the positions in it.

    tract moves a position outside of the input to the edge, torch the neighbours that a cubic takes there; they agree from one
    element beyond the edge on.
    """
    sizes = x.shape[2:]
    shape = (*x.shape[:2], *(s + 2 for s in sizes))
    padded = e.op("pad", x, out=shape, padding=[(0, 0), (0, 0), (1, 1), (1, 1)], border="replicated")
    spans = [(s - 1, s + 1) if align_corners else (s, s + 2) for s in reversed(sizes)]
    ratios = [_ratio(e, *span) for span in spans]
    factor = e.op("concat", ratios, out=(len(ratios),), dtype=torch.float32, axis=0)
    return padded, e.binary("mul", grid, factor, torch.float32)


def _ratio(e: Emitter, inner: Dim, outer: Dim) -> Ref:
    if isinstance(inner, int) and isinstance(outer, int):
        return e.constant(torch.tensor([inner / outer]), "ratio")
    return e.unsqueeze(e.op("div", e.scalar(inner, torch.float32), e.scalar(outer, torch.float32), out=()), [0])


@lowers(aten.affine_grid_generator.default)
def affine_grid_generator(e: Emitter, theta: Ref, size: Sequence[Dim], align_corners: bool) -> Ref:
    """The positions theta (N, axes, axes + 1) @ (x, y.., 1) of a regular grid over `size`, which torch fixes at export."""
    spatial = [d for d in size[2:] if isinstance(d, int)]
    axes = len(spatial)
    if axes != len(size) - 2:
        raise e.refuse("a grid of dynamic size")
    regular = aten.affine_grid_generator(torch.eye(axes, axes + 1)[None], [1, 1, *spatial], align_corners)[0]
    points = e.constant(torch.cat([regular, torch.ones(*spatial, 1)], -1), "grid")
    expr = {2: "xyk,nok->nxyo", 3: "xyzk,nok->nxyzo"}[axes]
    return contract(e, [points, theta], expr, e.out.shape)
