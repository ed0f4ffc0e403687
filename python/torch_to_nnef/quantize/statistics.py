"""What a calibration tells about each weight: second moments of the inputs it is multiplied with."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputStatistics:
    """Of one weight, seen as the rows [N, K] that Q40 divides into groups (K = prod(shape[1:]); the transpose of an `x @ weight`).

    hessian: f32 [G, K, K], the mean of `x x^T` over the inputs x [K] seen (for least squares, half the Hessian of the output error);
        rows [i * N / G, (i + 1) * N / G) of the weight see inputs of their own: G is the groups of a convolution, the experts of a
        stack, else 1. None where only frequencies count (an embedding) or K is too large to keep it.
    diagonal: f32 [G, K], its diagonal; None for a pure embedding.
    frequency: f32 [N], how often each row is looked up, mean 1; None unless it is an embedding (a tied one has all).
    held_out: the same over held-out batches, never learned from; None without any.
    count: number of inputs x seen.
    """

    count: int
    hessian: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    held_out: InputStatistics | None = None

    def output_error(self, exact: torch.Tensor, approximate: torch.Tensor) -> tuple[float, float]:
        """`(signal, noise)` of what the weight computes, for weights [N, ...]: tr(W H W^T) and tr(E H E^T), E = approximate - exact."""
        raise NotImplementedError
