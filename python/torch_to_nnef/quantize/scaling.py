"""Apply a `Fold`: divide channels where they are made, multiply them where they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.tensor.offload import OffloadedTensor, loaded, offload
from torch_to_nnef.tensor.quant.base import QScalePerGroupF16
from torch_to_nnef.tensor.quant.compressors import GROUP, NibblePacking
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, QTensorTractTransposed
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch_to_nnef.quantize.folds import Fold, Slices
    from torch_to_nnef.tensor.updater import Place


def apply_fold(model: nn.Module, fold: Fold, factors: Tensor) -> Scaled:
    """Scale the channels of `fold` by `factors` [channels] > 0: what `model` computes stays the same but for rounding.

    As `apply_folds`.
    """
    return apply_folds(model, [(fold, factors)])


def apply_folds(model: nn.Module, chosen: Iterable[tuple[Fold, Tensor]], leave: Container[int] = ()) -> Scaled:
    """Divide and multiply parameters by factors [channels] > 0, but for those whose ids are in `leave`.

    New parameters take the places of the old ones, which are not written to. Products are computed in f32 (f64 for f64) and rounded
    once to the dtype of each parameter; by powers of two they are exact, as long as no exponent leaves the dtype.

    Raises:
        T2NErrorInvalidArgument: Factors that are not positive finite numbers, one a channel, or that a dtype cannot take.

    """
    updater = ModTensorUpdater(model)
    changes: dict[int, tuple[Tensor, tuple[Place, ...], Tensor]] = {}
    for fold, factors in chosen:
        if factors.shape != (fold.channels,) or not bool(torch.isfinite(factors).all() and (factors > 0).all()):
            raise T2NErrorInvalidArgument(
                f"factors must be {fold.channels} positive finite numbers: got {factors!r:.200}"
            )
        for sides, by in ((fold.producers, 1 / factors.double()), (fold.consumers, factors.double())):
            for side in sides:
                held = updater.get(side.fqn)
                if id(held) not in leave:
                    _, places, value = changes.get(id(held), (held, updater.places(held), loaded(held.detach())))
                    changes[id(held)] = (held, places, scaled(value, side, by))
    return Scaled(changes.values())


class Scaled:
    """Parameters that were replaced; `undo` puts the old ones back."""

    def __init__(self, changes: Iterable[tuple[Tensor, tuple[Place, ...], Tensor]]) -> None:
        self._changes = [(old, places, _kept(old, new)) for old, places, new in changes]
        try:
            for _, places, new in self._changes:
                for place in places:
                    place.put(new)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """The model holds the parameters that it held before, the same objects."""
        for old, places, _ in self._changes:
            for place in places:
                place.put(old)


def spread(slices: Slices, factors: Tensor) -> Tensor:
    """Of `factors` [channels] the one of each slice, 1 where it has no channel."""
    channels = torch.tensor(slices.channels)
    return torch.where(channels >= 0, factors[channels.clamp(min=0)], torch.ones_like(factors[:1]))


def scaled(tensor: Tensor, slices: Slices, factors: Tensor) -> Tensor:
    """`tensor` with its slices multiplied by their `factors` [channels]."""
    wide = tensor.dtype if tensor.dtype is torch.float64 else torch.float32
    by = spread(slices, factors).to(wide)
    by = by.reshape([-1 if axis == slices.axis else 1 for axis in range(tensor.dim())])
    product = ((tensor.to(wide) + slices.offset) * by - slices.offset).to(tensor.dtype)
    if not bool(torch.isfinite(product).all()) and bool(torch.isfinite(tensor).all()):
        raise T2NErrorInvalidArgument(f"`{slices.fqn}`: a factor leaves the range of {tensor.dtype}")
    return product


def rescaled(packed: QTensorTractScaleOnly, slices: Slices, factors: Tensor) -> QTensorTractScaleOnly | None:
    """`packed` with its rows multiplied by their `factors`: its codes, and scales that are rounded to f16 once more.

    That is at most 2^-11 of a value, a hundredth of a step between codes. None if a scale would leave the normal numbers of f16.
    """
    transposed, stored = isinstance(packed, QTensorTractTransposed), packed.stored
    codes, scales = stored.planes()
    rows = scales.float().reshape(len(slices.channels), -1)
    product = (rows * spread(slices, factors.float())[:, None]).half()
    smallest = torch.finfo(torch.float16).tiny
    if not bool((torch.isfinite(product) & ((product.abs() >= smallest) | (rows.abs() < smallest))).all()):
        return None
    scheme = QScalePerGroupF16(GROUP, product.reshape(-1, 1), n_bits=4)
    new = QTensorTractScaleOnly.from_packed(
        codes, stored.shape, scheme, packed.dtype, (NibblePacking(),), packed.nnef_name
    )
    return new.transposed() if transposed else new


def _kept(old: Tensor, new: Tensor) -> Tensor:
    kept = offload(new) if isinstance(old, OffloadedTensor) else new
    return nn.Parameter(kept, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else kept
