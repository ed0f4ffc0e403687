"""Which weights stay in f16, so that the others cost no more than asked for: in bits a weight, or in divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.log import LOGGER
from torch_to_nnef.quantize.apply import row_of
from torch_to_nnef.quantize.calibrated import running
from torch_to_nnef.quantize.costs import TensorCost, costs_alone, refuse_offloaded
from torch_to_nnef.quantize.judge import UNITS, Judge, Measure
from torch_to_nnef.quantize.rows import TensorRow, record, recording
from torch_to_nnef.quantize.targets import Target
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.quant.half import WIDE, as_half
from torch_to_nnef.tensor.quant.int8 import QTensorInt8, quantize_int8
from torch_to_nnef.tensor.quant.padded import QTensorTractPadded, padded
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, QTensorTractTransposed, quantize_q40
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.calibration import Batch

Apply = Callable[[frozenset[str]], nn.Module]
"""Quantizes the model in place, but for the weights of these names, which are kept in f16, and records rows."""


_OTHER_MODEL = "target_bpw and max_kl: not for a method that makes another model"


@dataclass(frozen=True)
class Budget:
    """What quantization may cost; one of both.

    target_bpw: most bits a weight, on average over the weights that are packed otherwise (4.5 in Q40, 8 in int8, 16 in f16). max_kl: most
    KL(float || quantized) on the data, in nats, measured on the whole model.
    """

    target_bpw: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        """Raises `T2NErrorInvalidArgument` for both, and for numbers out of range."""
        if self.target_bpw is not None and self.max_kl is not None:
            raise T2NErrorInvalidArgument("target_bpw and max_kl: ask for one of both")
        for name, value in (("target_bpw", self.target_bpw), ("max_kl", self.max_kl)):
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise T2NErrorInvalidArgument(f"{name}: {value!r} is not a number above 0")

    def __bool__(self) -> bool:
        return self.target_bpw is not None or self.max_kl is not None


def quantize_within(
    budget: Budget, model: nn.Module, apply: Apply, data: Sequence[Batch], progress: Progress | None = None
) -> nn.Module:
    """Quantize `model` by `apply`, with the weights kept in f16 that cost most for their bytes; changed in place, and returned.

    What each weight costs alone is measured on `data`. `max_kl` takes the fewest of that order with which the whole model, measured again
    each time, is within it. A method that changes other weights too (it scales norms, or learns them) runs once more for each
    measurement; its weights are ordered by what they cost in plain Q40.

    Raises:
        T2NErrorInvalidArgument: The budget cannot be met, weights are on disk, or the method makes another model.

    """
    refuse_offloaded(list(model.parameters()))
    with running(model):
        trial = _Trial(model, apply, data, "kl" if budget.max_kl is not None else None)
        try:
            costs = costs_alone(model, trial.packed_alone(), trial.judge, progress)
            order = sorted(costs, key=lambda cost: -cost.worth)
            bits, divergence = budget.target_bpw, budget.max_kl or 0.0
            kept = trial.fewest(order, divergence) if bits is None else _fitting(order, bits)
            rows = trial.attempt(frozenset(cost.fqn for cost in kept))
        except BaseException:
            trial.restore()
            raise
    unit, storage = UNITS[trial.judge.measure], trial.storage
    why = {cost.fqn: f"f16: {cost.cost:.2g} {unit} in {storage[cost.fqn]} alone" for cost in kept}
    LOGGER.info("%s of %s weights stay in f16", len(kept), len(order))
    for row in rows:
        record(replace(row, method=why[row.fqn]) if row.fqn in why else row)
    return model


def costs_of(
    model: nn.Module,
    apply: Apply,
    data: Sequence[Batch],
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> tuple[Measure, list[TensorCost]]:
    """What each weight that `apply` packs costs alone, the worst first, and in which measure; the model ends as it was.

    Raises `T2NErrorInvalidArgument` for weights on disk, and for a method that changes other weights too.
    """
    refuse_offloaded(list(model.parameters()))
    with running(model):
        trial = _Trial(model, apply, data, measure)
        if not trial.alone:
            raise T2NErrorInvalidArgument(
                "the method changes other weights too, so that none can be judged alone: take q40"
            )
        return trial.judge.measure, costs_alone(model, trial.packed_alone(), trial.judge, progress)


def _fitting(order: Sequence[TensorCost], most: float) -> Sequence[TensorCost]:
    """Costs in `order` that can be saved with at most `most` bits a weight."""
    elements = max(1, sum(cost.elements for cost in order))
    nbytes = sum(cost.nbytes for cost in order)
    room = int(most * elements / 8) - nbytes
    if room < 0:
        raise T2NErrorInvalidArgument(
            f"target_bpw={most}: packed weights have {8 * nbytes / elements:.2f} bits already"
        )
    kept = []
    for cost in order:
        if cost.added <= room and cost.cost > 0:
            kept.append(cost)
            room -= cost.added
    return kept


class _Trial:
    """A model on which one choice is tried after the other."""

    def __init__(self, model: nn.Module, apply: Apply, data: Sequence[Batch], measure: Measure | None) -> None:
        self._model, self._apply = model, apply
        holders: list[dict[str, Any]] = [h for m in model.modules() for h in (m._parameters, m._buffers)]
        self._float = [(holder, dict(holder)) for holder in holders]
        self._originals = dict(ModTensorUpdater(model).tensors())
        self.judge = Judge(model, data, measure)
        try:
            self._rows = self._run(frozenset())
            now = dict(ModTensorUpdater(model).tensors())
        finally:
            self.restore()
        if now.keys() != self._originals.keys():
            raise T2NErrorInvalidArgument(_OTHER_MODEL)
        changed = {name: new for name, new in now.items() if new is not self._originals[name]}
        self._new = {name: new for name, new in changed.items() if isinstance(new, QTensor)}
        self._packed = {
            name: new for name, new in self._new.items() if isinstance(new, (QTensorTractScaleOnly, QTensorInt8))
        }
        self.alone = all(n in self._new or torch.equal(new, self._originals[n]) for n, new in changed.items())
        """Whether nothing but packed weights changed, so that each can be exchanged without the others."""

    def packed_alone(self) -> Mapping[str, QTensor]:
        """Each weight as it may be put in the float model; those that only fit together are packed once more."""
        return self._packed if self.alone else {name: self._plain(name) for name in self._packed}

    @property
    def storage(self) -> Mapping[str, str]:
        """How each packed weight is stored."""
        return {name: packed.storage_name for name, packed in self._packed.items()}

    def _plain(self, name: str) -> QTensor:
        weight = self._originals[name].detach()
        packed = self._packed[name]
        if isinstance(packed, QTensorInt8):
            return quantize_int8(weight, per_channel=packed.axis is not None, axis=packed.axis or 0, name=name)
        if isinstance(packed, QTensorTractTransposed):
            return quantize_q40(weight.mT, name=name).transposed()
        if isinstance(packed, QTensorTractPadded):
            return QTensorTractPadded.of(quantize_q40(padded(weight), name=name), weight.shape[1])
        return quantize_q40(weight, name=name)

    def restore(self) -> None:
        """The float model."""
        for holder, before in self._float:
            holder.clear()
            holder.update(before)

    def attempt(self, kept: frozenset[str]) -> Sequence[TensorRow]:
        """Quantize all but `kept`; returns the rows."""
        self.restore()
        return self._exchange(kept) if self.alone else self._run(kept)

    def _run(self, kept: frozenset[str]) -> Sequence[TensorRow]:
        with recording() as rows:
            if self._apply(kept) is not self._model:
                raise T2NErrorInvalidArgument(_OTHER_MODEL)
        return rows

    def _exchange(self, kept: frozenset[str]) -> Sequence[TensorRow]:
        updater = ModTensorUpdater(self._model)
        rows = {row.fqn: row for row in self._rows}
        for name, packed in self._new.items():
            new, tensor = packed, self._originals[name]
            if name in kept:
                target = Target(tensor, updater.places(tensor), "kept in its own 16 bits")
                if tensor.dtype not in WIDE:
                    rows[name] = row_of(target, None, "f16")
                    continue
                new = as_half(tensor.detach(), name)
                rows[name] = row_of(replace(target, reason=None), new, "f16")
            updater.update_by_ref(tensor, new)
        return list(rows.values())

    def fewest(self, order: Sequence[TensorCost], most: float) -> Sequence[TensorCost]:
        """The shortest beginning of `order` that, kept, has the whole model within `most`."""

        @cache
        def measured(count: int) -> float:
            self.attempt(frozenset(cost.fqn for cost in order[:count]))
            found = self.judge(self._model)
            LOGGER.info("max_kl: %s with %s of %s weights in f16", f"{found:.3g}", count, len(order))
            return found

        if measured(0) <= most:
            return ()
        if (least := measured(len(order))) > most:
            raise T2NErrorInvalidArgument(f"max_kl={most}: with all of its weights in f16 the model is at {least:.3g}")
        below, above = 0, len(order)
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (below, middle) if measured(middle) <= most else (middle, above)
        return order[:above]
