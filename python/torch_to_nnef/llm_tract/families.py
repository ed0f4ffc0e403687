"""Which causal language models can be one step on plain tensors, and what that step looks like: read from the config, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.llm_tract.causal import Signature, cache_argument
from torch_to_nnef.llm_tract.rotary import without_writes

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

# Rotary tables that reach `factor` times the context of their training; of other kinds max_position_embeddings is the whole.
_STRETCHED = ("yarn", "longrope")
# Layers of a transformers cache. One with a window is one without to us, since the mask of the model applies the window; a dummy reads
# the keys of another layer, and is in transformers from 5.2x on.
_OF_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
# model_type -> an option of its config, and why a model with it is refused.
_REFUSED_OPTIONS = {
    "falcon": ("alibi", "it computes alibi in bf16, which tract has not"),
    "mpt": ("attn_config", "it cuts its attention bias at a place that tract cannot compute from sizes"),
}
_OTHER = "export a model of another family"
_OWN_FORWARD = "give export_model_to_nnef a module whose forward takes and returns that state as tensors"


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
    without_writes(model)
    return Signature(_layers(model.config, _filled_cache(model)), context_of(model.config), logits)


def attention_of(config: PreTrainedConfig) -> str | None:
    """`attn_implementation` for `from_pretrained`: "eager" where others leave out part of the formula; None: what the model prefers."""
    return "eager" if getattr(_text(config), "attn_logit_softcapping", None) else None


def context_of(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model takes: its table of positions, or what its rotary tables are scaled to; None if nothing bounds it."""
    config = _text(config)
    said = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    # 0 or -1 stands for no bound.
    sizes = [size for size in said if isinstance(size, int) and size > 0]
    stretched = [
        int(rope["factor"] * rope["original_max_position_embeddings"])
        for rope in _ropes(config)
        if rope.get("rope_type") in _STRETCHED and {"factor", "original_max_position_embeddings"} <= rope.keys()
    ]
    return max(sizes + stretched) if sizes else None


def vocabulary_of(config: PreTrainedConfig) -> int:
    """How many tokens a model knows; where it takes more than text, its language model."""
    size: int = _text(config).vocab_size
    return size


def _refuse_by_config(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, "an encoder-decoder needs more than one archive", "export a decoder-only model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise _refusal(config, "in an encoder tokens see later ones", "export a decoder (is_decoder in its config)")
    option, why = _REFUSED_OPTIONS.get(config.model_type, ("", ""))
    if option and getattr(config, option):
        raise _refusal(config, why, _OTHER)
    ropes = _ropes(config)
    if len(ropes) > 1 and any(rope.get("rope_type") == "longrope" for rope in ropes):
        raise _refusal(config, "one of several rotary embeddings is longrope", _OTHER)
    if any("dynamic" in (rope.get("rope_type") or "") for rope in ropes):
        what = "a dynamic rotary embedding changes with the length of the text, and the keys in the cache do not"
        raise _refusal(config, what, 'set its rope_type to "default" for the trained context, or to "yarn"')


def _refuse_by_cache(config: PreTrainedConfig) -> None:
    """Refuse a model whose own cache has layers of other states: state-space, linear attention, compressed keys."""
    from transformers import DynamicCache

    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    other = next((kind for kind in kinds if kind not in _OF_KEYS_AND_VALUES), None)
    if other:
        raise _refusal(config, f"the state of a layer ({other}) is not its keys and values", _OWN_FORWARD)


def _bare_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    try:
        model: PreTrainedModel = make(
            config, attn_implementation=attention_of(config), trust_remote_code=trust_remote_code
        )
    except Exception as error:
        what = f"transformers makes no causal language model of this config ({_first_line(error)})"
        instead = (
            "save the language model in it alone"
            if _text(config) is not config
            else "AutoModelForCausalLM has to load it"
        )
        raise _refusal(config, what, instead) from error
    model.train(False)
    return model


def _filled_cache(model: PreTrainedModel) -> Cache:
    """The model's cache after two tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    options: dict[str, Any] = {cache_argument(type(model)): cache, "use_cache": True, "return_dict": True}
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), **options)
    except Exception as error:
        what = f"its forward fails on tokens and a cache alone ({_first_line(error)})"
        raise _refusal(model.config, what, _OWN_FORWARD) from error
    return cache


def _layers(config: PreTrainedConfig, cache: Cache) -> tuple[tuple[int, int, int], ...]:
    """Of each layer: heads, features of a key, features of a value."""
    layers = []
    for i, layer in enumerate(cache.layers):
        sides = [getattr(layer, name, None) for name in ("keys", "values")]
        key, value = ([*side.shape] if side is not None else [] for side in sides)
        if len(key) != 4 or key[:3] != value[:3] or (key[0], key[2]) != (1, 2):
            raise _refusal(config, f"the cache of layer {i} is {key} and {value} for 2 tokens", _OWN_FORWARD)
        layers.append((key[1], key[3], value[3]))
    if not layers:
        raise _refusal(config, "its forward leaves the cache empty", _OWN_FORWARD)
    return tuple(layers)


def _text(config: PreTrainedConfig) -> Any:
    return config.get_text_config(decoder=True)


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Parameters of rotary tables: of the only one, or of one for each type of layer."""
    rope = getattr(_text(config), "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refusal(config: PreTrainedConfig, what: str, instead: str) -> T2NErrorNotImplemented:
    kind = config.model_type or type(config).__name__
    return T2NErrorNotImplemented(f"{kind} cannot be exported: {what}; {instead}")
