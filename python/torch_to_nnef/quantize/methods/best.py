"""`q40_best`: for each weight the encoder with the least error on held-out inputs, then scales and norms learned end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_to_nnef.log import LOGGER
from torch_to_nnef.quantize.calibrated import quantize_calibrated_, running
from torch_to_nnef.quantize.calibration import Calibration, as_calibration
from torch_to_nnef.quantize.methods.gptq import encode_gptq
from torch_to_nnef.quantize.methods.imatrix import encode_imatrix
from torch_to_nnef.quantize.rows import record, recording
from torch_to_nnef.quantize.tuning import tune
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, quantize_q40
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.rows import TensorRow
    from torch_to_nnef.quantize.statistics import InputStatistics
    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly

Candidate = Callable[[torch.Tensor, str, "InputStatistics | None"], "QTensorTractScaleOnly"]

CANDIDATES: Mapping[str, Candidate] = {
    "min_max_q4_0": lambda rows, name, statistics: quantize_q40(rows, "signed_extreme", name=name),
    "q40": lambda rows, name, statistics: quantize_q40(rows, "scale_search", name=name),
    "q40_imatrix": encode_imatrix,
    "q40_gptq, own inputs": lambda rows, name, statistics: encode_gptq(rows, name, statistics, strength=0.0),
    "q40_gptq": encode_gptq,
}
"""What `q40_best` tries, simple ones first: of equals, the first is taken."""


def quantize_best(
    model: nn.Module,
    tokenizer: Any = None,
    calibration: Any = None,
    *,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    candidates: Mapping[str, Candidate] = CANDIDATES,
    tuning_passes: int = 3,
    method: str = "q40_best",
    **kw: Any,
) -> nn.Module:
    """Quantize each weight to Q40 by the candidate with the least held-out output error, then tune the scales, in place.

    The budget is stated in work, not in seconds, so that results do not depend on the machine: every candidate is tried on every weight,
    and tuning goes `tuning_passes` times over the calibration, a training step in f32 each batch. What is learned is kept if held-out
    outputs come closer to the float model's and no weight is left with more held-out error than min-max; norms and biases are learned too.

    Arguments and errors are those of `quantize_gptq`; `tuning_passes=0` leaves tuning out.
    """
    data = as_calibration(calibration, tokenizer, model)
    floats = dict(model.named_parameters())
    chosen: dict[str, str] = {}

    def encode(rows: torch.Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
        tried = {key: candidate(rows, name, statistics) for key, candidate in candidates.items()}
        errors = {key: _error(rows, packed, statistics) for key, packed in tried.items()}
        chosen[name] = min(errors, key=errors.__getitem__)
        return tried[chosen[name]]

    def quantize(encode: Candidate, data: Calibration, how: str, beside: Mapping[str, torch.Tensor]) -> list[TensorRow]:
        with recording() as rows:
            quantize_calibrated_(
                model, encode, data, classes=to_quantize_module_classes, selection=selection, progress=progress,
                method=lambda name: f"{method}: {chosen[name]}{how}", beside=beside,
            )  # fmt: skip
        return rows

    rows = quantize(encode, data, "", {})
    try:
        tuned = _tuned(model, floats, data, tuning_passes, progress) if tuning_passes else {}
        packed = {name: tensor for name, tensor in tuned.items() if isinstance(tensor, QTensorTractScaleOnly)}
        if tuned:  # once more, since held-out errors are others now
            untuned = dict(model.named_parameters())
            _put(model, floats)
            judged = Calibration(data.held_out or data.learn, data.held_out)
            spent = {row.fqn: row.seconds for row in rows}
            beside = {name: tensor for name, tensor in tuned.items() if name not in packed}
            after = quantize(lambda rows, name, statistics: packed[name].stored, judged, ", tuned", beside)
            if worse := [row.fqn for row in after if _is_worse(row)]:
                LOGGER.info("tuning undone: it leaves `%s` with more error than min-max", worse[0])
                _put(model, untuned)
            else:
                rows = [replace(row, seconds=spent.get(row.fqn)) for row in after]
    except BaseException:
        _put(model, floats)
        raise
    for row in rows:
        record(row)
    return model


def _is_worse(row: TensorRow) -> bool:
    known = row.output_snr_db is not None and row.min_max_output_snr_db is not None
    return known and (row.output_snr_db or 0.0) < (row.min_max_output_snr_db or 0.0)


def _error(rows: torch.Tensor, packed: QTensorTractScaleOnly, statistics: InputStatistics | None) -> float:
    """On held-out inputs; of a weight that the calibration does not reach, its own."""
    if statistics is None:
        return packed.squared_error(rows.contiguous())[1]
    return statistics.judge.output_error(rows, packed.decompress())[1]


def _tuned(
    model: nn.Module, floats: Mapping[str, nn.Parameter], data: Calibration, passes: int, progress: Progress | None
) -> Mapping[str, torch.Tensor]:
    def step(done: int, total: int) -> None:
        if progress:
            progress(done, total, "tuning scales")

    with running(model):
        tuned = tune(model, floats, data, passes=passes, step=step)
    LOGGER.info("tuning: held-out distance to the float model %.3g -> %.3g", tuned.before, tuned.after)
    return tuned.tensors


def _put(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    updater = ModTensorUpdater(model)
    for name, tensor in tensors.items():
        updater.update_by_name(name, tensor)
