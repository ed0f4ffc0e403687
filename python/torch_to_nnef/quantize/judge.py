"""How far a changed model is from what it was: KL divergence where outputs are distributions, else relative error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.calibration import Batch
from torch_to_nnef.torch_internals import pytree

Measure = Literal["kl", "error"]
UNITS: dict[Measure, str] = {"kl": "KL", "error": "relative error"}
_ROWS = 128  # distributions compared at a time


class Judge:
    """The outputs of a model on some batches, and how far others are from them.

    measure: `kl`: mean of KL(model || other), in nats, over the distributions along the last axis of the logits; `error`: |a - b|^2 / |a|^2
    over all float outputs. None: `kl` where the output says that it has logits, as those of transformers do, or is made of probabilities.

    Run it where the model is in eval mode and without gradients. Raises `T2NErrorInvalidArgument` for outputs without floats, or that are
    not finite.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], measure: Measure | None = None) -> None:
        self.batches = batches
        outputs = [batch(model) for batch in batches]
        says_logits = all(_logits(output) is not None for output in outputs)
        self._exact = [_floats(output) for output in outputs]
        if not all(self._exact) or not all(bool(t.isfinite().all()) for tensors in self._exact for t in tensors):
            raise T2NErrorInvalidArgument(
                f"{type(model).__name__}: its outputs on the calibration are no finite floats"
            )
        as_kl = says_logits or all(_are_probabilities(tensors[0]) for tensors in self._exact)
        if measure not in (*UNITS, None):
            raise T2NErrorInvalidArgument(f"measure: one of {', '.join(UNITS)} is expected, not {measure!r}")
        self.measure: Measure = measure or ("kl" if as_kl else "error")

    def distance(self, outputs: Sequence[Any]) -> float:
        """Of outputs on each of the batches."""
        total = weight = 0.0
        for exact, output in zip(self._exact, outputs, strict=True):
            found = _floats(output)
            part = _divergence(exact[0], found[0]) if self.measure == "kl" else _error(exact, found)
            total, weight = total + part[0], weight + part[1]
        return total / weight if weight else total

    def __call__(self, model: nn.Module) -> float:
        """Distance of `model`."""
        return self.distance([batch(model) for batch in self.batches])


def _logits(output: Any) -> torch.Tensor | None:
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else None


def _floats(output: Any) -> list[torch.Tensor]:
    """Logits alone where the output names them."""
    if (logits := _logits(output)) is not None:
        return [logits.float()]
    leaves = pytree.tree_leaves(output)
    return [leaf.float() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _are_probabilities(values: torch.Tensor) -> bool:
    if not values.dim() or values.shape[-1] < 2 or not values.numel():
        return False
    return bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-3).all())


def _divergence(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, int]:
    """Sum of KL(exact || other), and of how many distributions."""
    as_log = torch.log if _are_probabilities(exact) else None
    total = 0.0
    for p, q in zip(_rows(exact), _rows(other), strict=True):
        # Where p is 0, nothing is added, whatever q is.
        log_p, log_q = (as_log(v) if as_log else v.log_softmax(-1) for v in (p, q))
        total += float(torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(dtype=torch.float64))
    return max(total, 0.0), exact.numel() // max(1, exact.shape[-1])


def _rows(values: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = values.reshape(-1, values.shape[-1])
    yield from (flat[start : start + _ROWS] for start in range(0, len(flat), _ROWS))


def _error(exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float]:
    """`(noise, signal)`."""
    noise = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(exact, other, strict=True))
    return noise, sum(float(a.square().sum(dtype=torch.float64)) for a in exact)
