"""Make channels alike before activations get one scale: what is large is divided where it is made, and the weights that read it multiplied.

After SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4), which divides channel k by |x_k|^alpha / |w_k|^(1 - alpha). Sizes are
root mean squares here, not maxima, which few data do not tell (SmolLM2: KL to float 0.096, with maxima 0.188); and the alpha of each fold
is that of the least noise. What divides are the producers of a `Fold`, so nothing is left to do at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_to_nnef.quantize.folds import Fold, Slices
from torch_to_nnef.quantize.inputs import Product, Products
from torch_to_nnef.quantize.scaling import Scaled, apply_folds, spread
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.quantize.targets import Target

_ALPHAS = tuple(i / 10 for i in range(11))
_SMALLEST = 1e-3  # size of a channel, of the largest: of dead ones nothing is known
_WORTH = 0.9  # of the noise, at most, for a fold to be used


class ChannelRanges:
    """Smallest, largest and mean square value of each input channel of each target, while `watch()` is entered."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self.of: dict[int, _Ranges] = {}

    def watch(self) -> Products:
        """To enter while the model runs."""
        return Products(self._targets, self._see, lambda *_: None)

    def _see(self, target: Target, weight: Tensor, x: Tensor, product: Product) -> None:
        channels_last = x if target.tensor.dim() == 2 else x.movedim(1, -1)
        found = _Ranges.of(channels_last.reshape(-1, channels_last.shape[-1]).float())
        known = self.of.get(id(target.tensor))
        self.of[id(target.tensor)] = found if known is None else known.joined(found)


@dataclass(frozen=True)
class _Ranges:
    """Of K channels: f32 [K] each, and how many rows these are of."""

    low: Tensor
    high: Tensor
    energy: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor) -> _Ranges:
        """Of x [R, K]."""
        zero = torch.zeros(1, device=x.device)
        return cls(x.amin(0).minimum(zero), x.amax(0).maximum(zero), x.square().sum(0), len(x))

    @property
    def size(self) -> Tensor:
        """Root mean square [K]."""
        return (self.energy / self.rows).sqrt()

    def joined(self, other: _Ranges) -> _Ranges:
        """Of the rows of both."""
        return _Ranges(
            self.low.minimum(other.low),
            self.high.maximum(other.high),
            self.energy + other.energy,
            self.rows + other.rows,
        )


@dataclass(frozen=True)
class _Reader:
    """A weight that reads a fold: [N, K, elements of a filter], and what its inputs are."""

    weight: Tensor
    side: Slices
    ranges: _Ranges

    def noise(self, factors: Tensor) -> float:
        """Mean square of what the rounding of inputs, divided by `factors`, and of weights, multiplied by them, adds to outputs.

        A step of size d adds d^2 / 12 a value (inputs have one step, rows of the weight one each), times the energy of the other factor.
        """
        by = spread(self.side, factors)
        weight = self.weight * by[None, :, None]
        step = ((self.ranges.high / by).max() - (self.ranges.low / by).min()) / 255
        steps = weight.abs().amax((1, 2)) / 127
        energy = (self.ranges.size / by).square().sum() * weight.shape[2]
        return float((step.square() * weight.square().sum() + steps.square().sum() * energy) / 12)


def smooth(model: nn.Module, folds: Sequence[Fold], targets: Sequence[Target], ranges: ChannelRanges) -> Scaled:
    """Scale the channels of those `folds` that gain by it; all of their readers are among `targets`, or the fold is left alone."""
    updater = ModTensorUpdater(model)
    wanted = {id(target.tensor): target for target in targets}
    chosen = []
    for fold in folds:
        held = [updater.get(side.fqn) for side in (*fold.producers, *fold.consumers)]
        readers = list(_readers(fold, held[len(fold.producers) :], wanted, ranges))
        if len(readers) != len(fold.consumers) or any(isinstance(tensor, QTensor) for tensor in held):
            continue
        factors = _best(readers, fold.channels)
        if factors is not None:
            chosen.append((fold, factors))
    return apply_folds(model, chosen)


def _readers(
    fold: Fold, tensors: Iterable[Tensor], wanted: dict[int, Target], ranges: ChannelRanges
) -> Iterator[_Reader]:
    """Those whose slices are the channels of their inputs, one each."""
    for side, tensor in zip(fold.consumers, tensors, strict=True):
        target, seen = wanted.get(id(tensor)), ranges.of.get(id(tensor))
        if target is not None and seen is not None and len(seen.low) == len(side.channels):
            rows = tensor.detach().mT if target.transposed else tensor.detach()
            if side.axis == (0 if target.transposed else 1):
                yield _Reader(rows.float().reshape(*rows.shape[:2], -1), side, seen)


def _best(readers: Sequence[_Reader], channels: int) -> Tensor | None:
    """Factors [channels] of the least noise; None if there is little to gain."""
    inputs, weights = torch.zeros(channels), torch.zeros(channels)
    for reader in readers:
        index = torch.tensor(reader.side.channels)
        for total, size in ((inputs, reader.ranges.size), (weights, reader.weight.square().mean((0, 2)).sqrt())):
            total.scatter_reduce_(0, index[index >= 0], size.cpu()[index >= 0], "amax")
    if not bool(inputs.any()) or not bool(weights.any()):
        return None
    inputs, weights = (size.clamp(min=_SMALLEST * float(size.max())) for size in (inputs, weights))
    ones = torch.ones(channels)
    candidates = [inputs**alpha / other for alpha in _ALPHAS for other in (weights ** (1 - alpha), ones)]
    noises = [sum(reader.noise(factors) for reader in readers) for factors in candidates]
    best = min(range(len(noises)), key=noises.__getitem__)
    factors = candidates[best] / candidates[best].log().mean().exp()
    return factors if noises[best] < _WORTH * sum(reader.noise(ones) for reader in readers) else None
