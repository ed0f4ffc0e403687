"""Fourier transforms, on tract's own: complex in and out, unscaled in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.complex_layout import as_complex, lowers_complex, promote, real_layout
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref
from torch_to_nnef.torch_internals import FloorDiv

aten = torch.ops.aten

# -- the three transforms that torch.fft.* is made of; torch spells out padding, norms and shifts


@lowers_complex(aten._fft_c2c.default)
def c2c(e: Emitter, x: Ref, dim: Sequence[Dim], normalization: int, forward: bool) -> Ref:
    """Complex to complex, along every axis of `dim`."""
    axes = [int(d) % x.rank for d in dim]
    return _scaled(e, transformed(e, x, axes, inverse=not forward), axes, normalization)


@lowers_complex(aten._fft_r2c.default)
def r2c(e: Emitter, x: Ref, dim: Sequence[int], normalization: int, onesided: bool) -> Ref:
    """Real to complex; one-sided, the last axis of `dim` keeps the half that tells the other."""
    axes = [d % x.rank for d in dim]
    z = transformed(e, promote(e, x, e.out.dtype), axes[-1:])
    if onesided:
        z = as_complex(e.slice(real_layout(z), axes[-1], 0, e.out.shape[axes[-1]]))
    sizes = [x.shape[axis] for axis in axes]
    return _scaled(e, transformed(e, z, axes[:-1]), axes, normalization, sizes)


@lowers_complex(aten._fft_c2r.default)
def c2r(e: Emitter, x: Ref, dim: Sequence[int], normalization: int, last_dim_size: Dim) -> Ref:
    """The inverse of a one-sided transform."""
    axes = [d % x.rank for d in dim]
    sizes = [e.out.shape[axis] for axis in axes]
    z = transformed(e, x, axes[:-1], inverse=True)
    real = e.squeeze(half_inverse(e, z, axes[-1], last_dim_size), [x.rank])
    return divided(e, real, sizes, normalization)


@lowers(aten.fft_fftshift.default)
@lowers_complex(aten.fft_fftshift.default)
def fftshift(e: Emitter, x: Ref, dim: Sequence[int] | None = None) -> Ref:
    """The zero frequency in the middle."""
    # Not size - size / 2, of which tract makes size / 2.
    return _turned(e, x, dim, lambda size: half(size + 1))


@lowers(aten.fft_ifftshift.default)
@lowers_complex(aten.fft_ifftshift.default)
def ifftshift(e: Emitter, x: Ref, dim: Sequence[int] | None = None) -> Ref:
    """The zero frequency first."""
    return _turned(e, x, dim, half)


def half(size: Dim) -> Dim:
    """Rounded down, as torch writes it."""
    return size // 2 if isinstance(size, int) else FloorDiv(size, 2)


def _turned(e: Emitter, x: Ref, dim: Sequence[int] | None, start: Callable[[Dim], Dim]) -> Ref:
    """Axes read from `start` on, the rest behind."""
    values = real_layout(x)
    for axis in range(x.rank) if dim is None else [d % x.rank for d in dim]:
        size = values.shape[axis]
        places = e.arange(start(size), 1, size, torch.int64)
        turns = e.binary("div", places, size, torch.int64)
        places = e.binary("sub", places, e.binary("mul", turns, size, torch.int64), torch.int64)
        values = e.op("tract_core_gather", values, places, out=values.shape, axis=axis)
    return as_complex(values) if x.dtype.is_complex else values


def transformed(e: Emitter, z: Ref, axes: Sequence[int], inverse: bool = False) -> Ref:
    """Every axis transformed, without a factor."""
    planes = real_layout(z)
    for axis in axes:
        planes = e.op("tract_core_fft", planes, axis=axis, inverse=inverse)
    return as_complex(planes)


def _scaled(e: Emitter, z: Ref, axes: Sequence[int], normalization: int, sizes: Sequence[Dim] | None = None) -> Ref:
    sizes = [z.shape[axis] for axis in axes] if sizes is None else sizes
    return as_complex(divided(e, real_layout(z), sizes, normalization))


def divided(e: Emitter, x: Ref, sizes: Sequence[Dim], normalization: int) -> Ref:
    """By the number of points (2), its root (1), or not (0)."""
    count = math.prod(sizes)
    if normalization == 0:
        return x
    if isinstance(count, int):
        return e.binary("mul", x, 1 / count if normalization == 2 else count**-0.5, x.dtype)
    divisor = e.scalar(count, x.dtype)
    return e.binary("div", x, e.op("sqrt", divisor) if normalization == 1 else divisor, x.dtype)


def half_inverse(e: Emitter, z: Ref, axis: int, size: Dim) -> Ref:
    """Real signal of `size` points of its half spectrum, with a last axis of 1: the real part of the inverse transform of that half.

    Bins that stand for two count twice; the others, 0 and size / 2, count once: min(k, 1) + min(size - 2k, 1).
    """
    planes = real_layout(z)
    weight = e.unsqueeze(_bin_weights(e, planes.shape[axis], size, planes.dtype), _others(axis, planes.rank))
    planes = filled(e, e.op("mul", planes, weight), axis, size)
    return e.slice(real_layout(transformed(e, as_complex(planes), [axis], inverse=True)), z.rank, 0, 1)


def _bin_weights(e: Emitter, bins: Dim, size: Dim, dtype: torch.dtype) -> Ref:
    if isinstance(bins, int) and isinstance(size, int):
        return e.constant(torch.tensor([min(k, 1) + min(size - 2 * k, 1) for k in range(bins)], dtype=dtype), "bins")
    k = e.arange(0, 1, bins, dtype)
    first = e.binary("min", k, 1.0, dtype)
    last = e.binary("min", e.binary("sub", size, e.binary("mul", k, 2.0, dtype), dtype), 1.0, dtype)
    return e.op("add", first, last)


def _others(axis: int, rank: int) -> list[int]:
    return [i for i in range(rank) if i != axis]


def filled(e: Emitter, x: Ref, axis: int, size: Dim) -> Ref:
    """Zeros behind, up to `size`."""
    if x.shape[axis] == size:
        return x
    ahead, behind = x.shape[:axis], x.shape[axis + 1 :]
    zeros = e.broadcast_to(e.full(0.0, x.dtype), (*ahead, size - x.shape[axis], *behind))
    return e.op("concat", [x, zeros], out=(*ahead, size, *behind), dtype=x.dtype, axis=axis)
