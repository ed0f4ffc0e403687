"""Replacements of torch functions for the time of a capture, where torch would burn a size into the graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import max_pool2d

from torch_to_nnef.graph.istft import istft

Size = int | tuple[int, ...] | list[int]


@contextmanager
def symbolic_max_pool1d() -> Iterator[None]:
    """torch.max_pool1d and torch.istft read their length as a number; these do not."""
    istfts = [mock.patch.object(holder, "istft", istft) for holder in (torch, torch.Tensor)]
    with mock.patch.object(torch, "max_pool1d", _max_pool1d), istfts[0], istfts[1]:
        yield


@contextmanager
def symbolic_sqrt() -> Iterator[None]:
    """math.sqrt reads a size as a number; torch's own root of a size does not."""
    root = math.sqrt

    def sqrt(value: Any) -> Any:
        return (torch.sym_sqrt if isinstance(value, (torch.SymInt, torch.SymFloat)) else root)(value)

    with mock.patch.object(math, "sqrt", sqrt):
        yield


def _max_pool1d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    kernel, pad, spread = ((first, _one(value)) for first, value in ((1, kernel_size), (0, padding), (1, dilation)))
    step = (1, _one(stride)) if stride else kernel
    return max_pool2d(input.unsqueeze(-2), kernel, step, pad, spread, ceil_mode).squeeze(-2)


def _one(value: Size) -> int:
    return value if isinstance(value, int) else value[0]
