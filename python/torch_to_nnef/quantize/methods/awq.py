"""`q40_awq`, `q40_awq_gptq`: inputs scaled by their size where the graph lets them be, then weighted search or GPTQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_to_nnef.log import LOGGER
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.float_statistics import calibration_unless_cached
from torch_to_nnef.quantize.methods.gptq import encode_gptq
from torch_to_nnef.quantize.methods.imatrix import encode_imatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.calibrated import CalibratedEncode
    from torch_to_nnef.quantize.targets import Selection


def quantize_awq(
    model: nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    calibration: Any = None,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40_awq",
    sequential: bool = True,
    calibration_cache: Path | None = None,
    encode: CalibratedEncode = encode_imatrix,
    **kw: Any,
) -> nn.Module:
    """Quantize weights to Q40 in place, their inputs scaled first (`ActivationScaling`); else as `quantize_calibrated_`.

    The factors are chosen by weighted search, which is fast, and kept where they are good for what encodes at last. What takes them up
    changes as well: norms, biases, rows of other weights. Without a graph (`selection.folds`) no inputs are scaled.

    Args:
        model: Changed in place, and returned.
        tokenizer: For a calibration on texts.
        calibration: What `as_calibration` takes.
        to_quantize_module_classes: None: Linear, Embedding, Conv1d, Conv2d.
        selection: Filters, and what the captured graph knows about uses and folds.
        progress: `(done, total, name)`.
        method: Name shown in reports.
        sequential: Inputs are those that the weights quantized before give.
        calibration_cache: See `quantize_gptq`.
        encode: Of the scaled weights.
        **kw: Arguments of the registry call that this method does not need.

    Raises:
        T2NErrorInvalidArgument: No calibration, or one that the model cannot be called with.
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.

    """
    data = calibration_unless_cached(calibration, tokenizer, model, calibration_cache)
    if selection is None or not selection.folds:
        LOGGER.warning("%s: no inputs are scaled, since the graph has no place that takes up a factor", method)
    return quantize_calibrated_(
        model, encode, data, classes=to_quantize_module_classes, selection=selection, method=method, progress=progress,
        sequential=sequential, cache=calibration_cache, scaling=encode_imatrix,
    )  # fmt: skip


def quantize_awq_gptq(
    model: nn.Module,
    calibration: Any = None,
    calibration_cache: Path | None = None,
    method: str = "q40_awq_gptq",
    **kw: Any,
) -> nn.Module:
    """`quantize_awq`, with GPTQ as the encoder."""
    data = {"calibration": calibration, "calibration_cache": calibration_cache}
    return quantize_awq(model, **data, method=method, encode=encode_gptq, **kw)
