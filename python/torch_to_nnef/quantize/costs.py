"""What each quantized weight costs alone: one at a time in a model that is otherwise as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.judge import Judge
from torch_to_nnef.quantize.rows import weight_error
from torch_to_nnef.quantize.sequence import Replay, Stage, order_of
from torch_to_nnef.quantize.targets import Target
from torch_to_nnef.tensor.offload import OffloadedTensor
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.quant.int8 import QTensorInt8
from torch_to_nnef.tensor.quant.qtract import QTensorTractTransposed
from torch_to_nnef.tensor.updater import ModTensorUpdater, Place

if TYPE_CHECKING:
    from torch_to_nnef.quantize.apply import Progress


@dataclass(frozen=True)
class TensorCost:
    """What it costs to hold one weight packed.

    elements, nbytes: of the weight, packed. added: bytes that f16 takes more. snr_db: of the weight.
    cost: distance of the model's outputs from the float model's, in the measure of its `Judge`, if nothing else is quantized.
    """

    fqn: str
    elements: int
    nbytes: int
    added: int
    snr_db: float
    cost: float

    @property
    def worth(self) -> float:
        """Cost that one byte more saves, in f16."""
        return self.cost / max(1, self.added)


def costs_alone(
    model: nn.Module, packed: Mapping[str, QTensor], judge: Judge, progress: Progress | None = None
) -> list[TensorCost]:
    """Of each of the weights `packed` (by name) in the float `model`, the worst first; the model ends as it was.

    A forward each on the batches of `judge`, from the block on that holds the weight. Call it where the model is in eval mode and without
    gradients. Raises `T2NErrorInvalidArgument` for weights on disk.
    """
    updater = ModTensorUpdater(model)
    targets = {
        name: Target(updater.get(name), updater.places(updater.get(name)), None, isinstance(q, QTensorTractTransposed))
        for name, q in packed.items()
    }
    refuse_offloaded(target.tensor for target in targets.values())
    names = {id(target.tensor): name for name, target in targets.items()}
    order = order_of(model, list(targets.values()), judge.batches)
    replay = Replay(model, order.blocks, judge.batches)
    found: dict[str, float] = {}
    done, total = 0, sum(target.nbytes for target in targets.values())
    for stage in (*order.stages, Stage(order.unused, 0, -1)):
        while replay.at < stage.block:
            replay.advance()
        for target in stage.targets:
            name = names[id(target.tensor)]
            if progress:
                progress(done, total, name)
            # 8-bit weights round their inputs too; values of others are all that there is to them.
            held = packed[name] if isinstance(packed[name], QTensorInt8) else packed[name].decompress()
            with _held(target.places, held):
                # A weight with several uses may have some in front of the block; one without may have a use nobody saw.
                outputs = replay.outputs() if stage.calls == 1 else [batch(model) for batch in judge.batches]
            found[name] = judge.distance(outputs)
            done += target.nbytes
    if progress:
        progress(total, total, "")
    costs = [_cost(name, targets[name].tensor, packed[name], found[name]) for name in packed]
    return sorted(costs, key=lambda cost: -cost.cost)


def refuse_offloaded(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> None:
    """Raise `T2NErrorInvalidArgument` if one of them is on disk."""
    if any(isinstance(tensor, OffloadedTensor) for tensor in tensors):
        raise T2NErrorInvalidArgument("weights are on disk: measuring runs the model, load it in memory first")


def _cost(name: str, tensor: torch.Tensor, packed: QTensor, cost: float) -> TensorCost:
    nbytes = packed.packed_nbytes
    return TensorCost(
        name, tensor.numel(), nbytes, 2 * tensor.numel() - nbytes, weight_error(tensor.detach(), packed)[0], cost
    )


@contextmanager
def _held(places: Sequence[Place], values: torch.Tensor) -> Iterator[None]:
    """`values` in `places`, for the time of the block."""
    olds = [(place.module._parameters if place.is_parameter else place.module._buffers)[place.name] for place in places]
    new = nn.Parameter(values, requires_grad=False) if places[0].is_parameter else values
    try:
        for place in places:
            place.put(new)
        yield
    finally:
        for place, old in zip(places, olds, strict=True):
            place.put(old)  # type: ignore[arg-type]
