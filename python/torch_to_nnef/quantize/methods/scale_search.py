"""`q40`, the default: the scale of each group with the least squared error among candidates around its extreme."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_to_nnef.quantize.apply import Progress, quantize_
from torch_to_nnef.tensor.quant.qtract import quantize_q40

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from torch_to_nnef.quantize.targets import Selection
    from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly


def quantize_scale_search(
    model: nn.Module,
    classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40",
) -> nn.Module:
    """Quantize the weights of `classes` (None: Linear, Embedding, Conv1d, Conv2d) to Q40 in place, by scale search."""

    def encode(weight: torch.Tensor, name: str) -> QTensorTractScaleOnly:
        return quantize_q40(weight, "scale_search", name=name)

    return quantize_(model, encode, classes=classes, selection=selection, method=method, progress=progress)
