"""`min_max_q4_0*`: scales from the extreme (or a percentile) of each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.apply import Progress, quantize_
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly


def quantize_min_max(
    model: nn.Module,
    classes: Sequence[type[nn.Module]] | None = (nn.Linear,),
    percentile: float = 1.0,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "min_max_q4_0",
) -> nn.Module:
    """Quantize the weights of `classes` in place to Q40, scale = signed extreme of 32 weights / -8 (ggml's rule).

    A `percentile` in (0, 1) takes that quantile of the magnitudes instead, in the groups where it does not raise the
    error.
    """
    if not 0 < percentile <= 1:
        raise T2NErrorInvalidArgument(f"percentile must be in (0, 1]: got {percentile}")

    def encode(weight: torch.Tensor, name: str) -> QTensorTractScaleOnly:
        return quantize_q40(weight, "min_max", percentile, name)

    return quantize_(model, encode, classes=classes, selection=selection, method=method, progress=progress)
