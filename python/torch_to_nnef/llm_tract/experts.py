"""Mixtures of experts of transformers, as torch.export is to see them: loops over the experts that were chosen cannot be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# Class of an activation -> its name in `t2n::experts`.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu",
    "NewGELUActivation": "gelu",
    "ReLU": "relu",
}


@contextmanager
def capturable_experts(model: nn.Module) -> Iterator[None]:
    """While torch traces, the experts of `model` are one operator each, or, where they are of another kind, batched products.

    Outside of a trace nothing changes.
    """
    with ExitStack() as stack:
        for module in model.modules() if torch.compiler.is_compiling() else ():
            if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
                stack.enter_context(mock.patch.object(module, "forward", partial(_form(module), module)))
        yield


def _form(module: Any) -> Callable[..., Tensor]:
    from transformers.integrations.moe import batched_mm_experts_forward

    plain = (
        module.has_gate
        and getattr(module, "is_concatenated", True)
        and not (module.is_transposed or module.has_bias or getattr(module, "has_post_expert_norm", False))
        and type(module)._apply_gate.__name__ == "_default_apply_gate"
        and type(module.act_fn).__name__ in _ACTIVATIONS
    )
    return _one_operator if plain else batched_mm_experts_forward


def _one_operator(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    activation = _ACTIVATIONS[type(module.act_fn).__name__]
    weights = module.gate_up_proj, module.down_proj
    result: Tensor = torch.ops.t2n.experts(hidden_states, top_k_index, top_k_weights, *weights, activation)
    return result
