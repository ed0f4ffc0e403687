"""Learn scales and norms end to end: codes stay, what they are multiplied with moves until the outputs are those of the float model.

The last step of EfficientQAT (Chen et al. 2024, arXiv 2407.11062), with the float model's outputs in the place of labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.func import functional_call

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.calibration import Batch, Calibration
from torch_to_nnef.tensor.quant.base import QScalePerGroupF16
from torch_to_nnef.tensor.quant.compressors import GROUP
from torch_to_nnef.tensor.quant.padded import QTensorTractPadded
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly
from torch_to_nnef.tensor.updater import ModTensorUpdater
from torch_to_nnef.torch_internals import pytree

_RATE = 1e-3  # of what a scale is, a step
_WARM_UP = 4
_BETAS = (0.9, 0.95)
Step = Callable[[int, int], None]


@dataclass
class _Scales:
    """A packed weight whose scales can learn."""

    packed: QTensorTractScaleOnly
    change: nn.Parameter = field(init=False)
    """Relative, one a group."""

    def __post_init__(self) -> None:
        stored = self.packed.stored
        self._codes = stored.decompress_to_u8().reshape(-1, GROUP).to(torch.int8) - 8
        self._scale = stored.qscheme.scale.float().reshape(-1, 1)
        self.change = nn.Parameter(torch.zeros_like(self._scale))

    def weight(self) -> torch.Tensor:
        """f32, in the shape of the weight."""
        values = (self._scale * (1 + self.change) * self._codes).reshape(self.packed.stored_shape)
        if isinstance(self.packed, QTensorTractPadded):
            return values[:, : self.packed.shape[1]]
        return values if tuple(self.packed.shape) == tuple(self.packed.stored_shape) else values.mT

    def repacked(self) -> QTensorTractScaleOnly:
        """With the scales learned, in f16."""
        scale = (self._scale * (1 + self.change.detach())).clamp(-65504, 65504).half()
        scheme = QScalePerGroupF16(GROUP, scale, n_bits=4)
        packed = self.packed
        return type(packed).from_packed(
            packed.u8_blob, packed.shape, scheme, packed.dtype, packed.u8_compressors, packed.nnef_name
        )


@dataclass(frozen=True)
class Tuned:
    """What tuning came to: mean loss over the held-out batches (those learned from, without any) before and after, and the new tensors."""

    before: float
    after: float
    tensors: Mapping[str, torch.Tensor]


def tune(
    model: nn.Module,
    floats: Mapping[str, torch.Tensor],
    calibration: Calibration,
    *,
    passes: int = 3,
    step: Step | None = None,
) -> Tuned:
    """Scales of the Q40 weights of `model` and its vectors (norms, biases) for the least distance of its outputs to the float model's.

    The distance is the KL divergence over the last axis of `logits`, if outputs have these, else the squared error over the squared
    size. Nothing is changed in `model`; put the tensors there. Where the held-out distance does not fall, there are none.

    Args:
        model: With packed weights, in eval mode, on any device.
        floats: Its float parameters by name, as they were.
        calibration: Batches; each of those to learn from is one step.
        passes: Over these batches. Time and memory of a step are those of a training step in f32.
        step: Called as `(done, total)`.

    Raises:
        T2NErrorInvalidArgument: The model returns no float tensors.

    """
    updater = ModTensorUpdater(model)
    scales = {n: _Scales(t) for n, t in updater.tensors() if isinstance(t, QTensorTractScaleOnly)}
    vectors = {
        name: nn.Parameter(tensor.detach().float().clone())
        for name, tensor in updater.tensors()
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 1 and tensor.is_floating_point()
    }
    rest = {
        n: t.detach().float()
        for n, t in updater.tensors()
        if t.is_floating_point() and n not in scales and n not in vectors
    }
    exact = {name: tensor.detach().float() for name, tensor in floats.items()}

    def distance(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = outputs_of(functional_call(model, exact, batch.args, dict(batch.kwargs)))
        now = {name: learned.weight() for name, learned in scales.items()}
        got = outputs_of(functional_call(model, {**rest, **vectors, **now}, batch.args, dict(batch.kwargs)))
        return distance_of(wanted, got)

    def mean(batches: Sequence[Batch]) -> float:
        with torch.no_grad():
            return sum(float(distance(batch)) for batch in batches) / len(batches)

    judges = calibration.held_out or calibration.learn
    before = mean(judges)
    learned = [*(s.change for s in scales.values()), *vectors.values()]
    optimizer = torch.optim.Adam(learned, lr=_RATE, betas=_BETAS)
    total = passes * len(calibration.learn)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / _WARM_UP) * (1 + math.cos(math.pi * i / max(total, 1))) / 2
    )
    with torch.enable_grad():
        for index in range(total):
            if step:
                step(index, total)
            distance(calibration.learn[index % len(calibration.learn)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    packed = {name: s.repacked() for name, s in scales.items()}
    for name, repacked in packed.items():
        scales[name] = _Scales(repacked)  # judged as they will be stored
    after = mean(judges)
    if not after < before:
        return Tuned(before, before, {})
    typed = {name: vector.detach().to(updater.get(name).dtype) for name, vector in vectors.items()}
    return Tuned(before, after, {**packed, **typed})


def outputs_of(returned: object) -> dict[str, torch.Tensor]:
    """Float tensors among what a model returned; of a language model of transformers, its logits alone."""
    if isinstance(logits := getattr(returned, "logits", None), torch.Tensor):
        return {"logits": logits}
    leaves = pytree.tree_leaves(returned if not hasattr(returned, "to_tuple") else returned.to_tuple())
    found = {
        str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }
    if not found:
        raise T2NErrorInvalidArgument("the model returns no float tensors: there is nothing to compare")
    return found


def distance_of(wanted: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """KL(wanted || got) of logits, in nats a prediction; of other outputs, squared error over squared size, the mean over outputs."""
    if "logits" in wanted:
        p, q = (outputs["logits"].float().log_softmax(-1) for outputs in (wanted, got))
        return (p.exp() * (p - q)).sum(-1).mean()
    shares = [
        (got[n] - w).float().square().sum() / w.float().square().sum().clamp_min(1e-30) for n, w in wanted.items()
    ]
    return torch.stack(shares).mean()
