"""Number types of a language model: which parts may not be in f16, which models cannot be, and what becomes of bf16.

tract computes in f32 and f16. Where a model was trained in bf16, which reaches as far as f32, nothing kept its values below 65504.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorRuntime
from torch_to_nnef.log import LOGGER

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION, LINEAR = "force_attention_inner_in_f32", "force_linear_accumulation_in_f32"
_BIASED_KEYS = "biases of hundreds on its keys lift scores beyond f16"
_SHARP = "its scores before the softmax are known to leave f16"
_SUMS = "sums of its feed-forward layers are known to leave f16 on the way"
_LARGE = "sums of its layers come near the largest f16"

# model_type -> option of TractNNEF -> why a model of that type in f16 needs it. What is not here, like Llama, was seen to do without:
# in SmolLM2-135M products of queries and keys reach 331, the feed-forward layers 22500, of 65504. No norm is here: models of
# transformers that need them in f32 say so themselves.
FORCED: Mapping[str, Mapping[str, str]] = {
    "gemma": {LINEAR: _LARGE},
    "gemma2": {LINEAR: _LARGE},
    "gemma3": {LINEAR: _LARGE},
    "gemma3_text": {LINEAR: _LARGE},
    "glm": {ATTENTION: _SHARP},
    "glm4": {LINEAR: _SUMS},
    "gpt_neox": {ATTENTION: _SHARP},
    "phi": {ATTENTION: _SHARP},
    "phi3": {ATTENTION: _SHARP},
    "qwen2": {ATTENTION: _BIASED_KEYS},
    "qwen2_moe": {ATTENTION: _BIASED_KEYS},
}
# Between the layers, where no option reaches.
_BEYOND = "what its layers add up exceeds the largest f16, 65504, in torch as well: export it in f32 (-dt f32)"
BEYOND_HALF: Mapping[str, str] = {"gemma2": _BEYOND, "gemma3": _BEYOND, "gemma3_text": _BEYOND}


def forced_for(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, str]:
    """Options of `TractNNEF` that a model of this config needs in `dtype`, each with the reason; none outside of f16.

    What is returned is to be said; a model whose numbers leave f16 whatever the options is warned of here.
    """
    if dtype is not torch.float16:
        return {}
    if reason := BEYOND_HALF.get(config.model_type):
        LOGGER.warning("%s in f16: %s", config.model_type, reason)
    return dict(FORCED.get(config.model_type, {}))


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """`model` as tract can hold it: bf16 parameters and buffers become f32, each the same number, in place; others stay.

    Packed weights keep their codes, and those that lie on disk stay there.
    """
    if any(tensor.dtype is torch.bfloat16 for tensor in (*model.parameters(), *model.buffers())):
        LOGGER.warning("tract has no bf16: the archive holds and computes the same numbers in f32")
        nn.Module.float(model)  # that of transformers refuses what was read from GGUF
    return model


def check_finite(logits: torch.Tensor) -> None:
    """Raise `T2NErrorRuntime` for logits that are no numbers: tract may well agree, and the archive would be as useless as the model."""
    if logits.isnan().any() or logits.isposinf().any():
        dtype = str(logits.dtype).removeprefix("torch.")
        raise T2NErrorRuntime(
            f"the model computes NaN or infinity in {dtype}, in torch already; f32 (-dt f32) has the widest range"
        )


def cache_dtype(name: str) -> torch.dtype:
    """The dtype of caches that a user asks for; raises `T2NErrorInvalidArgument` for bf16, which tract has not."""
    dtypes = {"f32": torch.float32, "f16": torch.float16}
    if name not in dtypes:
        raise T2NErrorInvalidArgument(f"inputs cannot be {name}: tract has no such type; caches are f32 or f16")
    return dtypes[name]
