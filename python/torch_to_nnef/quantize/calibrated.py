"""Quantize weights by what they are multiplied with, one stage of the model after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.activation import ActivationScaling
from torch_to_nnef.quantize.apply import Progress, packed_rows, put_packed, row_of
from torch_to_nnef.quantize.calibration import Calibration
from torch_to_nnef.quantize.float_statistics import FloatWalk, StatisticsFile, cached
from torch_to_nnef.quantize.folds import Fold
from torch_to_nnef.quantize.rows import snr_db
from torch_to_nnef.quantize.scaling import apply_folds
from torch_to_nnef.quantize.sequence import Order, Replay, Stage, order_of
from torch_to_nnef.quantize.statistics import InputStatistics, InputSums
from torch_to_nnef.quantize.targets import Selection, Target, find_targets
from torch_to_nnef.quantize.watch import Watch
from torch_to_nnef.tensor.offload import OffloadedTensor
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, quantize_q40
from torch_to_nnef.tensor.updater import ModTensorUpdater, Place
from torch_to_nnef.turns import one_at_a_time

if TYPE_CHECKING:
    from typing_extensions import Self

CalibratedEncode = Callable[[torch.Tensor, str, InputStatistics | None], QTensorTractScaleOnly]
"""`(weight rows [N, K], name, statistics)` to its quantized form; statistics are None for a weight the calibration never reached."""


@one_at_a_time
def quantize_calibrated_(
    model: nn.Module,
    encode: CalibratedEncode,
    calibration: Calibration | None,
    *,
    classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    method: str | Callable[[str], str],
    progress: Progress | None = None,
    sequential: bool = True,
    cache: Path | None = None,
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
    scaling: CalibratedEncode | None = None,
) -> nn.Module:
    """Replace the weights asked for by `encode(weight, name, statistics)`, in place; as `quantize_` does, all of them or none.

    Weights are encoded in the order in which the model reads them. The model runs on the calibration in eval mode and without gradients,
    block by block: what a block returned is kept (a value a batch), its inputs are not.

    Args:
        model: Changed in place, and returned.
        encode: Gets the statistics of the inputs of each weight.
        calibration: Batches that the model can be called with, where its parameters are.
        classes: Module classes (with subclasses) whose `weight` is asked for; None for Linear, Embedding, Conv1d, Conv2d.
        selection: Narrows further, and brings what the captured graph knows about uses.
        method: Name shown in rows, or what gives it for a weight.
        progress: Called as `(done, total, name)` before each weight, and once at the end; in bytes of the float weights.
        sequential: Inputs are those that the weights quantized before give; statistics then have the drift from the float model.
            Otherwise they are those of the float model.
        cache: A file that keeps the statistics of the float model, which are used then, whatever `sequential` is. If it is there, it is
            read, and `calibration` may be None.
        beside: Other parameters that take new values with the weights, by name.
        scaling: Scale inputs where `selection.folds` lets them be (`ActivationScaling`); this fast encoder finds by how much.

    Raises:
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.
        T2NErrorInvalidArgument: `selection.include` selects nothing, weights are on disk, inputs are not finite, or `cache` is one of
            another model or calibration.

    """
    targets = find_targets(model, classes, selection)
    wanted = [target for target in targets if target.reason is None]
    if on_disk := [t.places[0].fqn for t in wanted if isinstance(t.tensor, OffloadedTensor)]:
        raise T2NErrorInvalidArgument(f"`{on_disk[0]}` is on disk: calibration runs the model, load it in memory first")
    packed: dict[int, QTensorTractScaleOnly] = {}
    notes: dict[int, dict[str, float | None]] = {}
    done, total = 0, sum(target.nbytes for target in wanted)
    sequential = sequential and cache is None

    def say(what: str) -> None:
        if progress:
            progress(done, total, what)

    with running(model), _Placed(model, beside if sequential else {}) as placed:
        walk = _walk(model, wanted, calibration, placed if sequential else None, cache, say)
        folds = _folds(selection, wanted) if selection and scaling else ()
        scales = ActivationScaling(model, folds, wanted, scaling or encode, encode)
        for group in walk.groups():
            statistics = walk.statistics(group) if isinstance(group, Stage) else None
            if isinstance(group, Stage) and statistics is not None:
                scales.choose(group.targets, statistics, packed)
            for target in group.targets if isinstance(group, Stage) else group:
                name, began = target.places[0].fqn, time.perf_counter()
                say(name)
                scaled, known = scales.scaled(target, statistics)
                codes = packed_rows(scaled, encode, name, None if target.padding else known)
                values = scales.unscaled(target, codes.decompress())
                seconds = time.perf_counter() - began
                notes[id(target.tensor)] = _outputs(target, values, statistics) | {"seconds": seconds}
                packed[id(target.tensor)] = codes
                if sequential:
                    placed.put(target, values)
                done += target.nbytes
    rows = []
    for target in targets:
        new = packed.get(id(target.tensor))
        how = method if isinstance(method, str) else method(target.places[0].fqn) if new is not None else ""
        rows.append(row_of(scales.final(target), new, how, **notes.get(id(target.tensor), {})))
    if progress:
        progress(total, total, "")
    others = apply_folds(model, scales.chosen, leave=packed)
    try:
        put_packed(model, targets, packed, rows, beside)
    except BaseException:
        others.undo()
        raise
    return model


def _folds(selection: Selection, targets: Sequence[Target]) -> list[Fold]:
    """Those that touch no padded weight."""
    padded = {place.fqn for target in targets if target.padding for place in target.places}
    return [f for f in selection.folds if not any(s.fqn in padded for s in (*f.producers, *f.consumers))]


def _walk(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    placed: _Placed | None,
    cache: Path | None,
    step: Callable[[str], None],
) -> Walk | FloatWalk | StatisticsFile:
    """What gives the groups of weights in order, and their statistics."""
    if cache is not None:
        return cached(model, targets, calibration, cache, step)
    if calibration is None:
        raise T2NErrorInvalidArgument("no calibration, and no cache of an earlier one")
    if placed is not None:
        return Walk(model, targets, calibration, placed, step)
    return FloatWalk(model, targets, calibration, step)


def _outputs(target: Target, values: torch.Tensor, statistics: InputStatistics | None) -> dict[str, float | None]:
    """How near the outputs for held-out inputs are, and how near plain min-max would come; nothing if none are held out."""
    if statistics is None or (held_out := statistics.held_out) is None:
        return {}
    exact = target.tensor.detach()
    plain = packed_rows(target, quantize_q40, "signed_extreme").decompress()
    if target.transposed:
        exact, values, plain = exact.mT, values.mT, plain.mT
    return {
        "output_snr_db": snr_db(*held_out.output_error(exact, values)),
        "min_max_output_snr_db": snr_db(*held_out.output_error(exact, plain)),
    }


class Walk:
    """A model on its way through a calibration, stage by stage, in two states: as it was, and quantized so far."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        calibration: Calibration,
        placed: _Placed,
        step: Callable[[str], None],
    ) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._learn = len(calibration.learn)
        batches = [batch.to(device) for batch in (*calibration.learn, *calibration.held_out)]
        self._batches, self._placed, self._step = batches, placed, step
        self._order: Order = order_of(model, targets, batches)
        self._quantized = Replay(model, self._order.blocks, batches)
        self._exact = Replay(model, self._order.blocks, batches)

    def groups(self) -> Iterator[Stage | tuple[Target, ...]]:
        """Stages in order, then the weights that the calibration does not reach."""
        yield from self._order.stages
        if self._order.unused:
            yield self._order.unused

    def statistics(self, stage: Stage) -> InputStatistics | None:
        """Of the inputs of a stage, those before it being quantized."""
        while self._quantized.at < stage.block:
            self._quantized.advance()
            with self._placed.originals():
                self._exact.advance()
        sums = InputSums(len(stage.targets[0].tensor)), InputSums(len(stage.targets[0].tensor))
        for index in range(len(self._batches)):
            self._step(f"inputs of {stage.name}, {index + 1} of {len(self._batches)}")
            inputs, exact = self._inputs(stage, self._quantized, index), self._exact_inputs(stage, index)
            _add(sums[index >= self._learn], inputs, exact)
        learn, held_out = (s.moments(stage.name) for s in sums)
        return None if learn is None else InputStatistics(learn, held_out)

    def _exact_inputs(self, stage: Stage, index: int) -> _Inputs | None:
        """None as long as nothing is quantized: both states are the same."""
        if self._placed.is_exact:
            return None
        with self._placed.originals():
            return self._inputs(stage, self._exact, index)

    def _inputs(self, stage: Stage, replay: Replay, index: int) -> _Inputs:
        """What the first weight of a stage reads, which the others read too."""
        seen = _Inputs()

        @contextmanager
        def watch(enough: Callable[[], None]) -> Iterator[None]:
            def multiplied(target: Target, x: torch.Tensor, start: int, count: int) -> None:
                seen.products.append((x, start, count))
                if seen.uses == stage.calls:
                    enough()

            def looked_up(target: Target, indices: torch.Tensor) -> None:
                seen.lookups.append(indices)
                if seen.uses == stage.calls:
                    enough()

            with Watch(stage.targets[:1], multiplied, looked_up):
                yield

        replay.run(index, watch, stage.block)
        return seen


class _Inputs:
    """What a weight reads in one forward."""

    def __init__(self) -> None:
        self.products: list[tuple[torch.Tensor, int, int]] = []
        self.lookups: list[torch.Tensor] = []

    @property
    def uses(self) -> int:
        """How often it was used."""
        return len(self.products) + len(self.lookups)


def _add(sums: InputSums, inputs: _Inputs, exact: _Inputs | None) -> None:
    """Drift is that of inputs in the same place; which inputs an expert has depends on the model's state."""
    for index, (x, start, count) in enumerate(inputs.products):
        same_place = exact is not None and index < len(exact.products) and exact.products[index][0].shape == x.shape
        in_float = exact.products[index][0] if exact is not None and same_place else None
        sums.multiplied(x, start, count, in_float, drift=exact is not None and count == 1)
    for indices in inputs.lookups:
        sums.looked_up(indices)


class _Placed:
    """New values in the places of old ones, for the time of a walk."""

    def __init__(self, model: nn.Module, beside: Mapping[str, torch.Tensor]) -> None:
        updater = ModTensorUpdater(model)
        olds = {name: updater.get(name) for name in beside}
        self._changes: list[tuple[tuple[Place, ...], torch.Tensor, torch.Tensor]] = [
            (updater.places(old), old, nn.Parameter(beside[name], requires_grad=False)) for name, old in olds.items()
        ]

    @property
    def is_exact(self) -> bool:
        """Whether nothing was changed yet."""
        return not self._changes

    def put(self, target: Target, values: torch.Tensor) -> None:
        """Hold `values` where `target` is held."""
        values = values.to(target.tensor.device)
        if isinstance(target.tensor, nn.Parameter):
            values = nn.Parameter(values, requires_grad=False)
        self._changes.append((target.places, target.tensor, values))
        for place in target.places:
            place.put(values)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """The model as it was."""
        try:
            self.__exit__()
            yield
        finally:
            self.__enter__()

    def __enter__(self) -> Self:
        for places, _, new in self._changes:
            for place in places:
                place.put(new)
        return self

    def __exit__(self, *error: object) -> None:
        for places, old, _ in self._changes:
            for place in places:
                place.put(old)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients, and with attention and LSTMs spelled out: fused, they hide what weights are multiplied with."""
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.LSTM) for module in model.modules()):
            fused_lstm, *_ = torch.backends.mkldnn.set_flags(_enabled=False)  # type: ignore[no-untyped-call]
            stack.callback(torch.backends.mkldnn.set_flags, fused_lstm)
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
