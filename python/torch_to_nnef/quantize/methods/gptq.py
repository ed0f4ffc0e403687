"""`q40_gptq`: least squared error of what a weight computes, by the full second moments of its inputs.

Each weight is fitted to what the float model computes, for the inputs that the weights quantized before give (`Moments.aim`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.float_statistics import calibration_unless_cached
from torch_to_nnef.tensor.quant.calibrated import SWEEPS, quantize_q40_hessian
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.statistics import InputStatistics
    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly

STRENGTH = 0.5
"""How much of what earlier weights changed in its inputs a weight takes back. On SmolLM2, calibrated with 12288 tokens, the KL to the
float model was 0.116 with 0, 0.077 with 0.25, 0.071 with 0.5 and 0.084 with 1."""


def quantize_gptq(
    model: nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    calibration: Any = None,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40_gptq",
    sequential: bool = True,
    calibration_cache: Path | None = None,
    strength: float = STRENGTH,
    damping: float = 0.01,
    act_order: bool = True,
    sweeps: int = SWEEPS,
    **kw: Any,
) -> nn.Module:
    """Quantize weights to Q40 with little error of what they compute, in place; as `quantize_calibrated_`.

    Args:
        model: Changed in place, and returned.
        tokenizer: For a calibration on texts.
        calibration: What `as_calibration` takes.
        to_quantize_module_classes: None: Linear, Embedding, Conv1d, Conv2d.
        selection: Filters, and what the captured graph knows about uses.
        progress: `(done, total, name)`.
        method: Name shown in reports.
        sequential: Inputs are those that the weights quantized before give.
        calibration_cache: A file that keeps what was learned of the float model, whose inputs are taken then; if it is there, no
            calibration is needed.
        strength: 0 to fit each weight to itself; 1 to take back all that earlier weights changed in its inputs.
        damping: See `quantize_q40_hessian`, as for the next two.
        act_order: Round the columns with the largest inputs first.
        sweeps: Passes of descent, at most.
        **kw: Arguments of the registry call that this method does not need.

    Raises:
        T2NErrorInvalidArgument: No calibration, or one that the model cannot be called with.
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.

    """

    def encode(weight: torch.Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
        return encode_gptq(
            weight, name, statistics, strength=strength, damping=damping, act_order=act_order, sweeps=sweeps
        )

    return quantize_calibrated_(
        model, encode, calibration_unless_cached(calibration, tokenizer, model, calibration_cache),
        classes=to_quantize_module_classes, selection=selection, method=method, progress=progress, sequential=sequential,
        cache=calibration_cache,
    )  # fmt: skip


def encode_gptq(
    weight: torch.Tensor,
    name: str,
    statistics: InputStatistics | None,
    *,
    strength: float = STRENGTH,
    damping: float = 0.01,
    act_order: bool = True,
    sweeps: int = SWEEPS,
) -> QTensorTractScaleOnly:
    """Rows [N, K] by their second moments; by scale search if they have none.

    A lookup couples no elements, so that scale search is the best for what is only looked up. Where a head shares the weight, lookups
    add to the diagonal of its moments what they add to the error: `frequency / N`, for all rows its mean.
    """
    learn = None if statistics is None else statistics.learn
    if learn is None or learn.hessian is None:
        return quantize_q40(weight, "scale_search", name=name)
    hessian = learn.hessian
    if learn.frequency is not None:
        share = float(learn.frequency.mean()) / len(learn.frequency)
        hessian = hessian + share * torch.eye(hessian.shape[-1])
    aim = learn.aim(weight, strength, damping)
    return quantize_q40_hessian(aim, hessian, damping=damping, act_order=act_order, sweeps=sweeps, name=name)
