"""Calibration data: batches that a model is run on, some to learn from, others held out to judge by."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument

_HELD_OUT = 5  # one batch in so many


class Batch(NamedTuple):
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """What `model` returns."""
        return model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Calibration:
    """Batches to learn from, and batches that nothing is learned from, which methods are judged by."""

    learn: tuple[Batch, ...]
    held_out: tuple[Batch, ...] = ()
