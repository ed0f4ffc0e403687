"""`q40_imatrix`: the scale of each group with the least squared error weighted by the mean square of each input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.tensor.quant.calibrated import quantize_q40_weighted
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.statistics import InputStatistics
    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly


def quantize_imatrix(
    model: nn.Module,
    tokenizer: Any = None,
    calibration: Any = None,
    *,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40_imatrix",
    **kw: Any,
) -> nn.Module:
    """Quantize weights to Q40 by a scale search under the diagonal of the Hessian (llama.cpp's importance matrix), in place.

    Arguments and errors are those of `quantize_gptq`. Inputs are those of the float model.
    """

    def encode(rows: torch.Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
        return weighted(rows, name, statistics)

    return quantize_calibrated_(
        model, encode, as_calibration(calibration, tokenizer, model), classes=to_quantize_module_classes,
        selection=selection, method=method, progress=progress, sequential=False,
    )  # fmt: skip


def weighted(rows: torch.Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
    """Codes for rows [N, K] by weighted scale search; unweighted where nothing is known of products with them."""
    if statistics is None or (importance := statistics.learn.diagonal) is None:
        return quantize_q40(rows, "scale_search", name=name)
    return quantize_q40_weighted(rows, importance, name)
