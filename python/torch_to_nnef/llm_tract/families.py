"""Which causal language models can be one step on plain tensors, and what that step looks like: read from the config, without weights."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.llm_tract.causal import Signature, cache_argument

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

# Rotary tables that scale to `factor` times the context they were trained at; "linear" and "default" say their whole context.
_STRETCHED = ("yarn", "longrope")
# Recomputed from the length of the text, while keys in the cache stay as an earlier length made them.
_DYNAMIC = "dynamic"


def step_signature(config: PreTrainedConfig, logits: int | None = 1, *, trust_remote_code: bool = False) -> Signature:
    """The `Signature` of the causal language model that `AutoModelForCausalLM` makes of `config`.

    logits: see `Signature`.

    The model is built without weights and run on two tokens to see the shapes of its cache, so no family is spelled out here.
    Raises `T2NErrorNotImplemented`, naming the family, for a model that is no step on keys and values.
    """
    _refuse_by_config(config)
    with torch.device("meta"):
        model = _bare_model(config, trust_remote_code)
        _refuse_by_cache(model.config)
        cache = _filled_cache(model)
    return Signature(_layers(model.config, cache), context_of(model.config), logits)


def attention_of(config: PreTrainedConfig) -> str | None:
    """`attn_implementation` for `from_pretrained`: "eager" where the others leave out what the model says; None: as the model prefers."""
    return "eager" if getattr(_text(config), "attn_logit_softcapping", None) else None


def context_of(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model takes: its table of positions, or what its rotary tables are scaled to; None if nothing bounds it."""
    config = _text(config)
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    # Config classes keep the value for a model without positions, which 0 or -1 stands for.
    said = [size for size in named if isinstance(size, int) and size > 0]
    stretched = [
        int(rope["factor"] * rope["original_max_position_embeddings"])
        for rope in _ropes(config)
        if rope.get("rope_type") in _STRETCHED and {"factor", "original_max_position_embeddings"} <= rope.keys()
    ]
    return max(said + stretched) if said else None


def _refuse_by_config(config: PreTrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, "an encoder-decoder", "export a decoder-only model")
    if getattr(config, "is_decoder", True) is False:
        raise _refusal(
            config, "an encoder, whose tokens see later ones,", "export a decoder (is_decoder in config.json)"
        )
    if any(_DYNAMIC in (rope.get("rope_type") or "") for rope in _ropes(config)):
        raise _refusal(
            config,
            "a rotary embedding that changes with the length of the text (dynamic NTK)",
            'set rope_type to "default" in config.json for its trained context, or to "yarn" or "linear"',
        )


def _refuse_by_cache(config: PreTrainedConfig) -> None:
    """Refuse a model whose own cache has other layers than keys and values: state-space, linear attention, shared or compressed."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    # Without a window, for its length counts in Python; the mask of the model applies the window.
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    other = next(
        (type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in known), None
    )
    if other:
        raise _refusal(config, f"a state other than keys and values in each layer ({other})", "export another family")


def _bare_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attention_of(config), "trust_remote_code": trust_remote_code}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        raise _refusal(
            config, f"what is no causal language model of transformers ({error})", "export another family"
        ) from error
    if _text(model.config) is not model.config:
        raise _refusal(config, "a model that takes images or sound beside text", "save its language model alone")
    return model.eval()


def _filled_cache(model: PreTrainedModel) -> Cache:
    from transformers import DynamicCache

    accepted = inspect.signature(type(model).forward).parameters
    argument = cache_argument(accepted)
    if argument is None:
        raise _refusal(
            model.config, "a state other than keys and values", "export a model with attention in each layer"
        )
    cache = DynamicCache()
    ids = torch.zeros(1, 2, dtype=torch.int64)
    try:
        model(input_ids=ids, use_cache=True, return_dict=True, **{argument: cache})
    except Exception as error:
        what = f"a forward that fails on tokens and an empty cache ({error})"
        raise _refusal(model.config, what, "export a model whose cache is keys and values in each layer") from error
    return cache


def _layers(config: PreTrainedConfig, cache: Cache) -> tuple[tuple[int, int, int], ...]:
    from transformers.cache_utils import DynamicLayer

    layers = []
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or layer.keys is None:
            kind = type(layer).__name__
            raise _refusal(config, f"a state other than keys and values in layer {i} ({kind})", "export another family")
        key, value = layer.keys.shape, layer.values.shape
        if [len(key), len(value)] != [4, 4] or key[:3] != value[:3] or key[0] != 1 or key[2] != 2:
            raise _refusal(config, f"a cache of shape {[*key]} and {[*value]} for 2 tokens", "export another family")
        layers.append((key[1], key[3], value[3]))
    if not layers:
        raise _refusal(config, "a forward that leaves its cache empty", "export another family")
    return tuple(layers)


def _text(config: PreTrainedConfig) -> Any:
    return config.get_text_config(decoder=True)


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Parameters of rotary tables: of the only one, or of one for each type of layer."""
    rope = getattr(_text(config), "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def _refusal(config: PreTrainedConfig, what: str, instead: str) -> T2NErrorNotImplemented:
    kind = getattr(config, "model_type", "") or type(config).__name__
    return T2NErrorNotImplemented(f"{kind}: {what} cannot be exported as one step on keys and values; {instead}")
