"""Replacements of torch functions for the time of a capture, where torch would burn a size into the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import max_pool2d

_LN2 = math.log(2)
Size = int | tuple[int, ...] | list[int]


@contextmanager
def symbolic_max_pool1d() -> Iterator[None]:
    """torch.max_pool1d reads its length as a number; the same over one row of two dimensions does not."""
    with mock.patch.object(torch, "max_pool1d", _max_pool1d):
        yield


@contextmanager
def symbolic_math() -> Iterator[None]:
    """The functions of `math` read a size as a number; torch's own forms of them do not."""
    with ExitStack() as stack:
        for name, symbolic in _SYMBOLIC.items():
            stack.enter_context(mock.patch.object(math, name, _either(getattr(math, name), symbolic)))
        yield


_SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    "sqrt": torch._sym_sqrt,
    "log2": torch._sym_log2,
    "log": lambda size: torch._sym_log2(size) * _LN2,
}


def _either(number: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    def function(value: Any, *rest: Any) -> Any:
        return (symbolic if isinstance(value, (torch.SymInt, torch.SymFloat)) and not rest else number)(value, *rest)

    return function


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
