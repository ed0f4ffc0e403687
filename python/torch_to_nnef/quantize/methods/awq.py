"""`q40_awq`, `q40_awq_gptq`: inputs scaled by their size where the graph lets them be, then weighted search or GPTQ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_to_nnef.log import LOGGER
from torch_to_nnef.quantize.calibrated import CalibratedEncode, quantize_calibrated_
from torch_to_nnef.tensor.quant.calibrated import quantize_q40_hessian, quantize_q40_weighted
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.calibration import Calibration
    from torch_to_nnef.quantize.statistics import InputStatistics
    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly


def quantize_awq(
    model: nn.Module,
    calibration: Calibration,
    classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40_awq",
    encode: CalibratedEncode | None = None,
) -> nn.Module:
    """Quantize the weights of `classes` in place to Q40, after scaling their inputs as `ActivationScaling` does.

    The factors are chosen by weighted search, which is fast, whatever encodes at last: `encode`, or weighted search too. What takes the
    factors up (norms, biases, rows of other weights) changes as well; without a graph (`selection.folds`) nothing is scaled.
    """
    if selection is None or not selection.folds:
        LOGGER.warning("%s: the graph has no place that takes up a scale, so no inputs are scaled", method)
    return quantize_calibrated_(
        model, encode or weighted, calibration, classes=classes, selection=selection, method=method, progress=progress,
        scaling=weighted,
    )  # fmt: skip


def weighted(rows: Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
    """The scales of least error weighted by the mean square of each input; plain search where no input is known."""
    if statistics is None or statistics.learn.diagonal is None:
        return quantize_q40(rows, name=name)
    return quantize_q40_weighted(rows, statistics.learn.diagonal, name)


def gptq(rows: Tensor, name: str, statistics: InputStatistics | None) -> QTensorTractScaleOnly:
    """GPTQ by the second moments of the inputs; weighted search where these are too large to be kept whole."""
    hessian = None if statistics is None else statistics.learn.hessian
    if hessian is None or hessian.shape[1] > 1:
        return weighted(rows, name, statistics)
    return quantize_q40_hessian(rows, hessian[:, 0], name=name)
