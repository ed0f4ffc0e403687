"""`q40_awq`, `q40_awq_gptq`: channels that see large inputs are made large in the weights, where the graph shows what takes it back.

AWQ (Lin et al. 2023, arXiv 2306.00978, section 3.2): s = size^alpha for the root mean square `size` of each input, with the alpha of
the least error of what the weights compute. What divides by s again are the producers of a `Fold`, so that nothing is left to do at
run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_to_nnef.quantize.folds import Fold, Slices
from torch_to_nnef.quantize.scaling import Scaled, apply_fold, spread
from torch_to_nnef.quantize.statistics import InputStatistics
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly

Encode = Callable[[Tensor, str, InputStatistics | None], "QTensorTractScaleOnly"]
Known = Mapping[str, InputStatistics | None]

_ALPHAS = tuple(i / 10 for i in range(1, 9))
_ROWS = 96  # of each weight, that alphas are compared on
_SMALLEST = 1e-2  # size of an input, of the mean: of dead channels nothing is known


@dataclass
class ActivationScaling:
    """Scales the inputs of weights just before these are encoded.

    folds: of the captured graph. encode: an encoder of rows, the one to come or a faster one. waiting: names of all weights that will
    be encoded; a fold is left out if not all of its weights can be judged at once.
    """

    folds: Sequence[Fold]
    encode: Encode
    waiting: set[str]
    applied: list[Scaled] = field(default_factory=list)
    encoded: set[str] = field(default_factory=set)

    def __call__(self, model: nn.Module, statistics: Known) -> dict[str, InputStatistics | None]:
        """Apply the folds that scale inputs of the weights `statistics` names; returns what is then known of these."""
        known = dict(statistics)
        self.waiting -= known.keys()
        for fold in self.folds:
            fold = _renamed(fold, model)
            readers = [side for side in fold.consumers if known.get(side.fqn) is not None]
            names = {side.fqn for side in (*fold.producers, *fold.consumers)}
            late = names & self.encoded or {side.fqn for side in fold.consumers} & self.waiting
            if late or not readers or _is_packed(model, names):
                continue
            factors = best_factors(model, replace(fold, consumers=tuple(readers)), known, self.encode)
            if factors is not None:
                self.applied.append(apply_fold(model, fold, factors))
                for side in readers:
                    known[side.fqn] = scaled_statistics(known[side.fqn], _by_input(_rows(model, side), side, factors))
        self.encoded |= known.keys()
        return known

    def undo(self) -> None:
        """Every parameter as it was, where the model still holds what a fold put there or anything else."""
        while self.applied:
            self.applied.pop().undo()


def best_factors(model: nn.Module, fold: Fold, known: Known, encode: Encode) -> Tensor | None:
    """Factors [channels] with which `fold.consumers` lose the least when they are encoded; None if nothing is gained.

    Judged by held-out inputs where there are some, on some rows, and in the end on all: never worse than no factors.
    """
    sizes = _sizes(model, fold, known)
    ones = torch.ones_like(sizes)
    some = [_weight_of(model, side, known, _ROWS) for side in fold.consumers]
    candidates = [ones, *(sizes**alpha for alpha in _ALPHAS)]
    errors = [_error(some, factors, encode) for factors in candidates]
    factors = candidates[min(range(len(errors)), key=errors.__getitem__)]
    every = [_weight_of(model, side, known) for side in fold.consumers]
    return factors if _error(every, factors, encode) < _error(every, ones, encode) else None


@dataclass(frozen=True)
class _Weight:
    """Rows [n, K] of a weight, and what is known of its inputs."""

    rows: Tensor
    side: Slices
    statistics: InputStatistics


def _error(weights: Iterable[_Weight], factors: Tensor, encode: Encode) -> float:
    """Squared error of what the weights compute if their inputs are divided by `factors`."""
    total = 0.0
    for weight in weights:
        by = _by_input(weight.rows, weight.side, factors)
        rows, statistics = weight.rows * by, scaled_statistics(weight.statistics, by)
        judge = statistics.held_out or statistics
        total += judge.output_error(rows, encode(rows, weight.side.fqn, statistics).decompress())[1]
    return total


def _sizes(model: nn.Module, fold: Fold, known: Known) -> Tensor:
    """Root mean square of the inputs of each channel, over all that read it, around 1."""
    total, count = torch.zeros(fold.channels), torch.zeros(fold.channels)
    for side in fold.consumers:
        rows, statistics = _rows(model, side), known[side.fqn]
        channels = torch.tensor(side.channels).repeat_interleave(rows.shape[1] // len(side.channels))
        seen = channels >= 0
        diagonal = statistics.diagonal.mean(0).cpu()
        total.index_add_(0, channels[seen], diagonal[seen] / diagonal.mean())
        count.index_add_(0, channels[seen], torch.ones(int(seen.sum())))
    sizes = (total / count).sqrt()
    sizes = sizes.clamp(min=_SMALLEST * float(sizes.mean()) or 1.0)  # all zeros: ones
    return sizes / (sizes.max() * sizes.min()).sqrt()


def scaled_statistics(statistics: InputStatistics, by: Tensor) -> InputStatistics:
    """Of inputs divided by `by` [K]: their second moments are divided by the products."""
    hessian, diagonal, held_out = statistics.hessian, statistics.diagonal, statistics.held_out
    return replace(
        statistics,
        hessian=None if hessian is None else hessian / (by[:, None] * by),
        diagonal=None if diagonal is None else diagonal / by.square(),
        held_out=None if held_out is None else scaled_statistics(held_out, by),
    )


def _weight_of(model: nn.Module, side: Slices, known: Known, most: int | None = None) -> _Weight:
    rows, statistics = _rows(model, side), known[side.fqn]
    groups = rows.unflatten(0, (len(statistics.diagonal), -1))
    if most is not None and groups.shape[1] > most:
        groups = groups[:, torch.linspace(0, groups.shape[1] - 1, most).long()]
    return _Weight(groups.flatten(0, 1).float(), side, statistics)


def _rows(model: nn.Module, side: Slices) -> Tensor:
    """The weight as rows [N, K] of what it sums over: of the transpose of [K, N], and of all matrices in a stack."""
    weight = loaded(ModTensorUpdater(model).get(side.fqn).detach())
    if side.axis == 0:
        return weight.mT
    return weight.flatten(1) if side.axis == 1 else weight.flatten(0, -2)


def _by_input(rows: Tensor, side: Slices, factors: Tensor) -> Tensor:
    """Factor [K] of each input of `rows`: a channel of a convolution has one for each element of its filter."""
    return spread(side, factors).repeat_interleave(rows.shape[1] // len(side.channels))


def _renamed(fold: Fold, model: nn.Module) -> Fold:
    """With the first name that `model` has for each parameter."""
    updater = ModTensorUpdater(model)

    def first(sides: Sequence[Slices]) -> tuple[Slices, ...]:
        return tuple(replace(side, fqn=updater.places(updater.get(side.fqn))[0].fqn) for side in sides)

    return replace(fold, producers=first(fold.producers), consumers=first(fold.consumers))


def _is_packed(model: nn.Module, names: Iterable[str]) -> bool:
    updater = ModTensorUpdater(model)
    return any(isinstance(updater.get(name), QTensor) for name in names)
