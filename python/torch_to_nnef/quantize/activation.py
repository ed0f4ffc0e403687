"""Activation-aware scaling: channels that see large inputs are made large in the weights that read them, just before these are encoded.

AWQ (Lin et al. 2023, arXiv 2306.00978, section 3.2): s = size^alpha for the root mean square `size` of each input, with the alpha of
the least error of what the weights compute. What divides by s again are the producers of a `Fold`, so nothing is left to do at run
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_to_nnef.quantize.folds import Fold, Slices
from torch_to_nnef.quantize.scaling import rescaled, scaled, spread
from torch_to_nnef.quantize.statistics import InputStatistics
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.quantize.targets import Target
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly

Encode = Callable[[Tensor, str, InputStatistics | None], "QTensorTractScaleOnly"]

_ALPHAS = tuple(i / 10 for i in range(1, 9))
_ROWS = 96  # of each matrix, that alphas are compared on
_SMALLEST = 1e-2  # size of an input, of the mean: of dead channels nothing is known


class ActivationScaling:
    """Chooses factors for the folds of a model whose weights are encoded one after the other.

    search: a fast encoder, by which factors are chosen. encode: the one to come, which they have to be good for.

    The model keeps its own scale as long as it is walked through; `chosen` is applied in the end. Weights that were encoded before
    a fold that they produce for is chosen have their rows rescaled as they are: Q40 has the scale of a row in those of its groups.
    """

    def __init__(
        self, model: nn.Module, folds: Sequence[Fold], wanted: Sequence[Target], search: Encode, encode: Encode
    ) -> None:
        updater = ModTensorUpdater(model)
        self._held = {side.fqn: updater.get(side.fqn) for fold in folds for side in (*fold.producers, *fold.consumers)}
        self._wanted = {id(target.tensor): target for target in wanted}
        self._open = [fold for fold in folds if self._is_legal(fold)]
        self._search, self._encode = search, encode
        self.chosen: list[tuple[Fold, Tensor]] = []
        self._reads: dict[int, tuple[Slices, Tensor]] = {}

    def choose(
        self, targets: Iterable[Target], statistics: InputStatistics, packed: dict[int, QTensorTractScaleOnly]
    ) -> None:
        """Decide on the folds that scale inputs of `targets`; `packed` are weights encoded so far, by the id of the float ones."""
        now = {id(target.tensor) for target in targets}
        for fold in [f for f in self._open if any(id(self._held[side.fqn]) in now for side in f.consumers)]:
            self._open.remove(fold)
            readers = [side for side in fold.consumers if id(self._held[side.fqn]) in self._wanted]
            makers = [side for side in fold.producers if id(self._held[side.fqn]) in self._wanted]
            # What is not encoded yet reads the same inputs; or it is left alone.
            same = len({side.channels for side in readers}) == 1
            if not same or any(id(self._held[side.fqn]) not in packed for side in makers):
                continue
            weights = [_Weight.of(self._rows(side), side, statistics) for side in readers]
            factors = best_factors(weights, fold.channels, self._search, self._encode)
            rescaling = (
                {}
                if factors is None
                else {
                    id(self._held[side.fqn]): rescaled(packed[id(self._held[side.fqn])], side, 1 / factors)
                    for side in makers
                }
            )
            if factors is None or None in rescaling.values():
                continue
            packed.update({key: new for key, new in rescaling.items() if new is not None})
            self.chosen.append((fold, factors))
            self._reads.update({id(self._held[side.fqn]): (side, factors) for side in readers})

    def scaled(self, target: Target, statistics: InputStatistics | None) -> tuple[Target, InputStatistics | None]:
        """`target` as it is to be encoded, and what is known of its inputs then."""
        if id(target.tensor) not in self._reads or statistics is None:
            return target, statistics
        side, factors = self._reads[id(target.tensor)]
        by = by_input(self._rows(side), side, factors)
        return replace(target, tensor=scaled(target.tensor.detach(), side, factors)), statistics.divided(by)

    def unscaled(self, target: Target, values: Tensor) -> Tensor:
        """`values` of the encoded `target`, to be read by inputs that are not scaled."""
        if id(target.tensor) not in self._reads:
            return values
        side, factors = self._reads[id(target.tensor)]
        return scaled(values, side, 1 / factors)

    def final(self, target: Target) -> Target:
        """`target` with the float weight that it stands for in the end."""
        tensor = target.tensor.detach()
        for fold, factors in self.chosen:
            for sides, by in ((fold.producers, 1 / factors), (fold.consumers, factors)):
                for side in sides:
                    if self._held[side.fqn] is target.tensor:
                        tensor = scaled(tensor, side, by)
        return replace(target, tensor=tensor)

    def _rows(self, side: Slices) -> Tensor:
        """The weight as rows [N, K] of what it sums over: of the transpose of [K, N], and of all matrices in a stack."""
        weight = self._held[side.fqn].detach()
        if side.axis == 0:
            return weight.mT
        return weight.flatten(1) if side.axis == 1 else weight.flatten(0, -2)

    def _is_legal(self, fold: Fold) -> bool:
        """Whether nothing is packed yet, and what will be before the factors are known can be rescaled: whole rows."""
        held = [self._held[side.fqn] for side in (*fold.producers, *fold.consumers)]
        makers = [(self._wanted.get(id(self._held[side.fqn])), side) for side in fold.producers]
        return not any(isinstance(tensor, QTensor) for tensor in held) and all(
            target is None or side.axis == target.transposed for target, side in makers
        )


@dataclass(frozen=True)
class _Weight:
    """Rows [N, K] of a weight, and what is known of their inputs."""

    rows: Tensor
    side: Slices
    statistics: InputStatistics

    @classmethod
    def of(cls, rows: Tensor, side: Slices, statistics: InputStatistics) -> _Weight:
        return cls(rows.float(), side, statistics)

    def some(self) -> _Weight:
        """Some rows of each of its matrices."""
        diagonal = self.statistics.learn.diagonal
        matrices = 1 if diagonal is None else len(diagonal)
        groups = self.rows.reshape(matrices, -1, self.rows.shape[1])
        kept = torch.linspace(0, groups.shape[1] - 1, min(_ROWS, groups.shape[1])).long()
        return replace(self, rows=groups[:, kept].flatten(0, 1))


def best_factors(weights: Sequence[_Weight], channels: int, search: Encode, encode: Encode) -> Tensor | None:
    """Factors [channels] with which the weights lose the least when `search` encodes them; None if `encode` then gains nothing.

    Judged by held-out inputs where there are some, on some rows of each weight.
    """
    sizes = _sizes(weights, channels)
    if sizes is None:
        return None
    some, ones = [weight.some() for weight in weights], torch.ones(channels)
    candidates = [ones, *(sizes**alpha for alpha in _ALPHAS)]
    errors = [_error(some, factors, search) for factors in candidates]
    factors = candidates[min(range(len(errors)), key=errors.__getitem__)]
    if factors is ones:
        return None
    return factors if _error(some, factors, encode) < _error(some, ones, encode) else None


def _error(weights: Iterable[_Weight], factors: Tensor, encode: Encode) -> float:
    """Squared error of what the weights compute if their inputs are divided by `factors`."""
    total = 0.0
    for weight in weights:
        by = by_input(weight.rows, weight.side, factors)
        rows, statistics = weight.rows * by, weight.statistics.divided(by)
        total += statistics.judge.output_error(rows, encode(rows, weight.side.fqn, statistics).decompress())[1]
    return total


def _sizes(weights: Sequence[_Weight], channels: int) -> Tensor | None:
    """Root mean square [channels] of the inputs of each channel, over all that read it, around 1; None if nothing is known."""
    total, count = torch.zeros(channels), torch.zeros(channels)
    for weight in weights:
        if (diagonals := weight.statistics.learn.diagonal) is None:
            return None
        diagonal = diagonals.mean(0)
        index = torch.tensor(weight.side.channels).repeat_interleave(len(diagonal) // len(weight.side.channels))
        total.index_add_(0, index[index >= 0], diagonal[index >= 0] / diagonal.mean())
        count.index_add_(0, index[index >= 0], torch.ones(int((index >= 0).sum())))
    sizes = (total / count).sqrt()
    if not bool(torch.isfinite(sizes).all()) or not bool(sizes.any()):
        return None
    sizes = sizes.clamp(min=_SMALLEST * float(sizes.mean()))
    return sizes / (sizes.max() * sizes.min()).sqrt()


def by_input(rows: Tensor, side: Slices, factors: Tensor) -> Tensor:
    """Factor [K] of each input of `rows`: a channel of a convolution has one for each element of its filter."""
    return spread(side, factors).repeat_interleave(rows.shape[1] // len(side.channels))
