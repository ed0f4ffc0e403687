"""What a calibration tells about each weight: second moments of the inputs it is multiplied with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.tensor.quant.compressors import GROUP

LARGEST_BLOCK = 4096
"""Inputs whose second moments are kept together: factoring them takes the cube of it in time."""


@dataclass(frozen=True)
class Moments:
    """Means over the inputs of one weight, seen as rows [N, K] that Q40 divides into groups.

    Weights have G matrices with inputs of their own (groups of a convolution, experts of a stack), whose rows follow each other. A matrix
    of moments that would be too large is kept as its P diagonal blocks of k x k, P * k = K.

    hessian: f32 [G, P, k, k], mean of x x^T: for least squares, half the Hessian of the output error.
    drift: f32 [G, P, k, k], mean of x d^T, where x + d is what the float model has in the place of x; None if x is that.
    drift_square: f32 [G, P, k, k], mean of d d^T.
    frequency: f32 [N], how often each row is looked up, mean 1; None unless it is an embedding.
    """

    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    drift_square: torch.Tensor | None = None
    frequency: torch.Tensor | None = None

    @property
    def diagonal(self) -> torch.Tensor | None:
        """f32 [G, K], mean of x^2."""
        return None if self.hessian is None else self.hessian.diagonal(dim1=-2, dim2=-1).flatten(1)

    def output_error(self, exact: torch.Tensor, approximate: torch.Tensor) -> tuple[float, float]:
        """`(signal, noise)`: means over the inputs of |W (x + d)|^2 and |W (x + d) - Q x|^2, summed over rows.

        For `exact` W and `approximate` Q of shape [N, ...]; for lookups, |w|^2 and |w - q|^2 of the rows as often as they are looked up.
        """
        signal = noise = 0.0
        if self.hessian is not None:
            w = _blocks(exact, self.hessian)
            e = w - _blocks(approximate, self.hessian)
            signal += _trace(w, self.hessian, w)
            noise += _trace(e, self.hessian, e)
            if self.drift is not None and self.drift_square is not None:
                crossed, squared = _trace(w, self.drift.mT, w), _trace(w, self.drift_square, w)
                signal += 2 * crossed + squared
                noise += 2 * _trace(e, self.drift, w) + squared
        if self.frequency is not None:
            w, e = exact.flatten(1).double(), (exact - approximate).flatten(1).double()
            share = self.frequency.double() / len(w)
            signal += float(share @ w.square().sum(1))
            noise += float(share @ e.square().sum(1))
        return signal, max(noise, 0.0)

    def divided(self, by: torch.Tensor) -> Moments:
        """Of inputs that are divided by `by` [K]."""

        def scaled(matrix: torch.Tensor | None) -> torch.Tensor | None:
            if matrix is None:
                return None
            parts = by.reshape(matrix.shape[1], -1)
            return matrix / (parts[:, :, None] * parts[:, None, :])

        return replace(
            self, hessian=scaled(self.hessian), drift=scaled(self.drift), drift_square=scaled(self.drift_square)
        )

    def aim(self, weight: torch.Tensor, strength: float, damping: float = 0.01) -> torch.Tensor:
        """The weight [N, ...] that, times x, is closest to `weight` times x + strength * d: W + strength * W D^T H^-1, D the drift.

        GPTAQ (Li et al. 2025, arXiv 2504.02692) with strength 1; less than 1 keeps it from fitting the noise of few inputs.
        """
        if self.hessian is None or self.drift is None or not strength:
            return weight
        w = _blocks(weight, self.hessian)
        correction = torch.linalg.solve(damped(self.hessian.double(), damping), self.drift.double() @ w.mT).mT
        aimed: torch.Tensor = (w + strength * correction).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
        return aimed


@dataclass(frozen=True)
class InputStatistics:
    """Moments over the inputs to learn from; `held_out`: over others, by which results are judged."""

    learn: Moments
    held_out: Moments | None = None

    @property
    def judge(self) -> Moments:
        """Held-out moments; without any, those learned from."""
        return self.held_out or self.learn

    def divided(self, by: torch.Tensor) -> InputStatistics:
        """Of inputs that are divided by `by` [K]."""
        return InputStatistics(self.learn.divided(by), self.held_out and self.held_out.divided(by))


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """[..., k, k] with `damping` times its mean diagonal added on it; 1 where it is all zero."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return hessian + added[..., None, None] * torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)


def block_count(width: int) -> int:
    """P: in how many blocks of a multiple of 32 the moments of rows of `width` are kept."""
    groups = width // GROUP
    return next((p for p in range(1, groups + 1) if groups % p == 0 and width // p <= LARGEST_BLOCK), 1)


class InputSums:
    """Of all inputs of a weight: `Moments` in the making. rows: as many as can be looked up."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._products: MomentSums | None = None
        self._lookups: torch.Tensor | None = None

    def multiplied(
        self, x: torch.Tensor, start: int, count: int, exact: torch.Tensor | None = None, *, drift: bool = False
    ) -> None:
        """Take in inputs [R, G, K] of some of `count` matrices, and what the float model has there; drift: whether it may have any."""
        if self._products is None:
            self._products = MomentSums(count, x.shape[-1], x.device, drift)
        self._products.add(x, start, exact)

    def looked_up(self, indices: torch.Tensor) -> None:
        """Take in lookups."""
        if self._lookups is None:
            self._lookups = torch.zeros(self._rows)
        self._lookups += torch.bincount(indices.flatten().cpu(), minlength=self._rows)

    def moments(self, name: str) -> Moments | None:
        """None of no inputs. Raises `T2NErrorInvalidArgument` if some are not finite."""
        frequency = None if self._lookups is None else self._lookups / self._lookups.mean().clamp_min(1e-12)
        if self._products is not None:
            return self._products.moments(name, frequency)
        return None if frequency is None else Moments(frequency=frequency)


class MomentSums:
    """Sums that `Moments` are the means of, for a weight of G matrices with rows of K."""

    def __init__(self, matrices: int, width: int, device: torch.device, drift: bool) -> None:
        blocks = block_count(width)
        shape = matrices, blocks, width // blocks, width // blocks
        self._sums = [torch.zeros(shape, device=device) for _ in range(3 if drift else 1)]
        self._counts = torch.zeros(matrices, dtype=torch.float64)

    def add(self, x: torch.Tensor, start: int = 0, exact: torch.Tensor | None = None) -> None:
        """Take in inputs [R, G', K] of matrices [start, start + G'), and `exact`, what the float model has in their place."""
        inputs = self._arranged(x)
        stop = start + x.shape[1]
        self._counts[start:stop] += len(x)
        pairs = [(inputs, inputs)]
        if exact is not None:
            drift = self._arranged(exact) - inputs
            pairs += [(inputs, drift), (drift, drift)]
        for sums, (left, right) in zip(self._sums, pairs, strict=False):
            sums[start:stop] += left.mT @ right

    def _arranged(self, x: torch.Tensor) -> torch.Tensor:
        """[G', P, R, k]."""
        rows, matrices, _ = x.shape
        return x.float().reshape(rows, matrices, self._sums[0].shape[1], -1).permute(1, 2, 0, 3)

    def moments(self, name: str, frequency: torch.Tensor | None = None) -> Moments:
        """The means. Raises `T2NErrorInvalidArgument` if inputs were not finite."""
        counts = self._counts.clamp_min(1)[:, None, None, None].float()
        means = [(sums.cpu() / counts) for sums in self._sums]
        if not all(bool(mean.isfinite().all()) for mean in means):
            raise T2NErrorInvalidArgument(
                f"calibration: inputs of `{name}` are not finite (NaN, Inf, or squares beyond f32)"
            )
        return Moments(**dict(zip(("hessian", "drift", "drift_square"), means, strict=False)), frequency=frequency)


def _blocks(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """f64 [G, P, N / G, k]."""
    matrices, parts, size, _ = hessian.shape
    return weight.double().reshape(matrices, -1, parts, size).transpose(1, 2)


def _trace(left: torch.Tensor, matrix: torch.Tensor, right: torch.Tensor) -> float:
    """Sum of the traces of left @ matrix @ right^T."""
    return float(((left @ matrix.double()) * right).sum())
