"""`f16`: weights that stay floats, of half the size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch_to_nnef.quantize.apply import put_packed, row_of
from torch_to_nnef.quantize.targets import EXCLUDED, Selection, find_targets
from torch_to_nnef.tensor.offload import OffloadedTensor, loaded
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.quant.half import WIDE, as_half

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from torch_to_nnef.quantize.apply import Progress


def keep_half(
    model: nn.Module,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "f16",
    **kw: Any,
) -> nn.Module:
    """Round the selected weights to f16 in place, whatever uses them; the model computes in its own dtype.

    An archive holds 2 bytes a weight; tract casts them once, when it loads it, and holds them in the dtype of the model.

    Raises:
        T2NErrorImpossibleQuantization: A value beyond the range of f16, or NaN.
        T2NErrorInvalidArgument: `selection.include` selects nothing.

    """
    targets = find_targets(model, to_quantize_module_classes, selection)
    packed: dict[int, QTensor] = {}
    rows = []
    for index, target in enumerate(targets):
        excluded = target.reason == EXCLUDED
        read = target
        if target.tensor.dtype in WIDE and not excluded and not isinstance(target.tensor, QTensor):
            if progress:
                progress(index, len(targets), target.places[0].fqn)
            read = replace(target, tensor=loaded(target.tensor.detach()), reason=None)
            half = as_half(read.tensor, target.places[0].fqn)
            packed[id(target.tensor)] = half.offload() if isinstance(target.tensor, OffloadedTensor) else half
        rows.append(row_of(read, packed.get(id(target.tensor)), method))
    put_packed(model, targets, packed, rows)
    return model
