"""Windows as columns and back (unfold, fold): convolutions with the filters that take one position each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.conv import transposed
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref
from torch_to_nnef.torch_internals import FloorDiv

aten = torch.ops.aten


@lowers(aten.im2col.default)
def im2col(
    e: Emitter,
    x: Ref,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Ref:
    """The windows of each channel of (N, C, H, W) side by side: (N, C * positions, windows)."""
    planes = e.reshape(x, (math.prod(x.shape[:-2]), 1, *x.shape[-2:]))
    counts = [_count(*axis) for axis in zip(x.shape[-2:], kernel_size, stride, padding, dilation, strict=True)]
    columns = e.op(
        "conv",
        planes,
        _one_hot(e, kernel_size, x.dtype),
        out=(planes.shape[0], math.prod(kernel_size), *counts),
        border="constant",
        padding=[(p, p) for p in padding],
        stride=list(stride),
        dilation=list(dilation),
        groups=1,
    )
    return e.reshape(columns, e.out.shape)


@lowers(aten.col2im.default)
def col2im(
    e: Emitter,
    x: Ref,
    output_size: Sequence[Dim],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Ref:
    """The sum of windows (N, C * positions, windows) put where they were taken from: (N, C, H, W)."""
    geometry = list(zip(output_size, kernel_size, stride, padding, dilation, strict=True))
    counts = [_count(*axis) for axis in geometry]
    left = [
        size + 2 * p - d * (k - 1) - 1 - (c - 1) * s for (size, k, s, p, d), c in zip(geometry, counts, strict=True)
    ]
    more = [int(n) for n in left if isinstance(n, int) or n.is_Integer]
    if len(more) < len(left):
        raise e.refuse("folding into a dynamic size that the windows may not fill; use stride 1 or a static size")
    lead = e.out.shape[:-2]
    planes = e.reshape(x, (math.prod(lead), math.prod(kernel_size), *counts))
    taps = _one_hot(e, kernel_size, x.dtype)
    image = transposed(
        e,
        planes,
        e.op("transpose", taps, out=(1, taps.shape[0], *kernel_size), axes=[1, 0, 2, 3]),
        None,
        out=(planes.shape[0], 1, *output_size),
        stride=list(stride),
        padding=list(padding),
        more=more,
        dilation=list(dilation),
    )
    return e.reshape(image, e.out.shape)


def _one_hot(e: Emitter, kernel_size: Sequence[int], dtype: torch.dtype) -> Ref:
    """(positions, 1, *kernel): filter i takes position i."""
    if not dtype.is_floating_point:
        raise e.refuse("folding of integers: tract convolves floats; cast to float")
    positions = math.prod(kernel_size)
    return e.constant(torch.eye(positions, dtype=dtype).reshape(positions, 1, *kernel_size), "taps")


def _count(size: Dim, kernel: int, stride: int, padding: int, dilation: int) -> Dim:
    """Number of windows along an axis."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    return room // stride + 1 if isinstance(room, int) else (room if stride == 1 else FloorDiv(room, stride)) + 1
