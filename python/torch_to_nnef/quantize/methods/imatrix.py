"""`q40_imatrix`: as `q40`, each element's error weighed by the mean square of what it is multiplied with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.float_statistics import calibration_unless_cached
from torch_to_nnef.tensor.quant.calibrated import quantize_q40_weighted
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.statistics import InputStatistics
    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly


def quantize_imatrix(
    model: nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    calibration: Any = None,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40_imatrix",
    sequential: bool = False,
    calibration_cache: Path | None = None,
    **kw: Any,
) -> nn.Module:
    """Quantize weights to Q40 with the least squared error weighed by their inputs, in place; as `quantize_calibrated_`.

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
        **kw: Arguments of the registry call that this method does not need.

    Raises:
        T2NErrorInvalidArgument: No calibration, or one that the model cannot be called with.
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.

    """
    return quantize_calibrated_(
        model, encode_imatrix, calibration_unless_cached(calibration, tokenizer, model, calibration_cache),
        classes=to_quantize_module_classes, selection=selection, method=method, progress=progress, sequential=sequential,
        cache=calibration_cache,
    )  # fmt: skip


def encode_imatrix(weight: torch.Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
    """Rows [N, K] by the diagonal of their second moments; by scale search if they have none.

    What is only looked up has none: how often a row is looked up counts the same for all of its elements.
    """
    importance = None if statistics is None else statistics.learn.diagonal
    if importance is None:
        return quantize_q40(weight, "scale_search", name=name)
    return quantize_q40_weighted(weight, importance, name)
