"""Rotary embeddings that write into themselves while they run, as functions of their inputs alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import nn


def without_writes(model: nn.Module) -> None:
    """Put a functional stand-in where `model` has a longrope embedding.

    The modules between are copied, so that others who share them see nothing of it.
    """
    for name, module in [*model.named_modules()]:
        if getattr(module, "rope_type", None) == "longrope":
            _put(model, name.split("."), _functional(module))


def _functional(rotary: nn.Module) -> nn.Module:
    """`rotary`, which keeps two tables and copies the one for the length of the text over the table it reads."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    read: Any = inspect.unwrap(type(rotary).forward)
    config, device = cast("Any", rotary.config), cast("torch.Tensor", rotary.inv_freq).device
    trained = config.rope_parameters["original_max_position_embeddings"]
    short, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device)
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=trained + 1)

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reader = copy.copy(self)
        reader._buffers = {**self._buffers, "inv_freq": torch.where(position_ids.max() >= trained, long, short)}
        cos, sin = read(reader, x, position_ids)
        return cos, sin

    stand_in = copy.copy(rotary)
    stand_in.__class__ = type(type(rotary).__name__, (type(rotary),), {"forward": forward})
    return stand_in


def _put(model: nn.Module, path: list[str], module: nn.Module) -> None:
    """`module` at `path` below `model`, through copies of what lies between."""
    first, *rest = path
    if rest:
        below = copy.copy(model.get_submodule(first))
        _put(below, rest, module)
        module = below
    model._modules = {**model._modules, first: module}
