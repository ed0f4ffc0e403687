"""`q40_gptq`: codes that make up for each other's errors, for the inputs that the weights quantized before give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.tensor.quant.calibrated import quantize_q40_hessian
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.statistics import InputStatistics
    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly

STRENGTH = 0.5
"""How much of the drift of its inputs a weight takes back: SmolLM2's KL is 0.116 with 0, 0.077 with 0.25, 0.071 with 0.5, 0.084 with 1."""


def quantize_gptq(
    model: nn.Module,
    tokenizer: Any = None,
    calibration: Any = None,
    *,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    strength: float = STRENGTH,
    method: str = "q40_gptq",
    **kw: Any,
) -> nn.Module:
    """Quantize weights to Q40 by GPTQ on scales of least Hessian-weighted error, in the order the model reads them, in place.

    Each weight is fitted to what the float model computes, not to itself (GPTAQ), see `Moments.aim`. Embeddings that are only looked up
    are quantized by scale search: no two of their elements meet in a sum.

    Args:
        model: Changed in place; exactly as before if an error is raised.
        tokenizer: For a calibration of texts.
        calibration: What `as_calibration` takes; a few thousand inputs a weight, as those in use.
        to_quantize_module_classes: Modules whose `weight` is asked for; None for Linear, Embedding, Conv1d, Conv2d.
        selection: Filters, and what the captured graph knows about uses.
        progress: `(done, total, name)`.
        strength: 0 to fit each weight to itself; 1 to take back all of what earlier weights changed in its inputs.
        method: Name shown in reports.
        **kw: Other arguments of the registry call.

    Raises:
        T2NErrorInvalidArgument: No calibration, or one that the model cannot be called with.
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.

    """

    def encode(rows: torch.Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
        return fitted(rows, name, statistics, strength)

    return quantize_calibrated_(
        model, encode, as_calibration(calibration, tokenizer, model), classes=to_quantize_module_classes,
        selection=selection, method=method, progress=progress,
    )  # fmt: skip


def fitted(
    rows: torch.Tensor, name: str, statistics: InputStatistics | None, strength: float = STRENGTH
) -> QTensorTractScaleOnly:
    """Codes for rows [N, K] by GPTQ; by scale search where nothing is known of products with them."""
    if statistics is None or statistics.learn.hessian is None:
        return quantize_q40(rows, "scale_search", name=name)
    return quantize_q40_hessian(statistics.learn.aim(rows, strength), statistics.learn.hessian, name=name)
