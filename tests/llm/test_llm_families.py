"""Families of causal language models, from small random configs: captured, exported, and run in tract against transformers."""

import pytest
import torch
import transformers
from torch import nn

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.llm_tract.causal import as_step, cache_argument
from torch_to_nnef.llm_tract.families import attention_of, context_of, step_signature
from torch_to_nnef.tract_model import TractModel

VOCABULARY, CONTEXT = 96, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# As in the released configs, in proportion: (name of a Config class, values).
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4, "short_factor": [1.0] * 6}
FAMILIES = {
    "llama": ("Llama", GROUPED),
    "llama3 rotary, biases": (
        "Llama",
        GROUPED
        | {"attention_bias": True, "mlp_bias": True}
        | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    ),
    "smollm (tied)": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "smollm3 (NoPE)": ("SmolLM3", GROUPED | {"no_rope_layers": [1, 0]}),
    "mistral (window)": ("Mistral", GROUPED | {"sliding_window": 4, "head_dim": 24}),
    "qwen2 (biases)": ("Qwen2", GROUPED),
    "qwen2, yarn, window": (
        "Qwen2",
        GROUPED | {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3 (qk norm)": ("Qwen3", GROUPED | {"head_dim": 16}),
    "phi3 (fused qkv, partial rotary)": ("Phi3", GROUPED | {"partial_rotary_factor": 0.75}),
    "phi3, longrope": (
        "Phi3",
        GROUPED
        | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4}
        | {"rope_parameters": LONG | {"long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0], "partial_rotary_factor": 0.75}},
    ),
    "gemma": ("Gemma", GROUPED | {"head_dim": 16}),
    "gemma2 (soft caps)": (
        "Gemma2",
        GROUPED
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3 (two rotaries, qk norm)": (
        "Gemma3Text",
        GROUPED
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2 (Conv1D)": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    ),
    "gpt-neox (parallel, partial rotary)": ("GPTNeoX", SIZES | {"rotary_pct": 0.25}),
    "gpt-neox, sequential": ("GPTNeoX", SIZES | {"use_parallel_residual": False}),
    "olmo (norm without weights, clipped)": ("Olmo", GROUPED | {"clip_qkv": 1.0}),
    "olmo2 (norms after)": ("Olmo2", GROUPED),
    "granite (multipliers)": (
        "Granite",
        GROUPED
        | {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.1},
    ),
    "stablelm (partial rotary)": ("StableLm", GROUPED | {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm, qk norm, parallel": ("StableLm", GROUPED | {"qk_layernorm": True, "use_parallel_residual": True}),
    "phi (phi-2)": ("Phi", SIZES | {"partial_rotary_factor": 0.5}),
    "falcon (multi-query)": ("Falcon", SIZES | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, new": ("Falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "starcoder2": ("Starcoder2", GROUPED | {"sliding_window": 4}),
    "cohere": ("Cohere", GROUPED | {"use_qk_norm": True}),
    "cohere2": ("Cohere2", GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "gptj": (
        "GPTJ",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 8},
    ),
    "opt": ("OPT", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "bloom (alibi)": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt-bigcode": (
        "GPTBigCode",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    ),
    "gpt-neo": (
        "GPTNeo",
        SIZES | {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "glm4": ("Glm4", GROUPED | {"head_dim": 16}),
    "exaone4": ("Exaone4", GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "helium": ("Helium", GROUPED | {"head_dim": 16}),
    "nemotron": ("Nemotron", GROUPED | {"head_dim": 16}),
    "seed-oss": ("SeedOss", GROUPED | {"head_dim": 16}),
    "ernie4.5": ("Ernie4_5", GROUPED | {"head_dim": 16}),
    "olmo3": ("Olmo3", GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "deepseek-v3 (latent keys), dense": (
        "DeepseekV3",
        SIZES
        | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "kv_lora_rank": 32, "q_lora_rank": 32}
        | {"qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16},
    ),
    "codegen": (
        "CodeGen",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 8},
    ),
}


def config_of(name):
    kind, values = FAMILIES[name]
    return getattr(transformers, f"{kind}Config")(**values)


def model_of(config):
    """Weights wide enough that attention is not uniform and every part of the formula shows in the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def full(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_whole_text(name, tmp_path):
    config = config_of(name)
    model, signature = model_of(config), step_signature(config)
    step = as_step(model, signature)
    archive = tmp_path / "m.nnef"
    quantize_and_verify(
        step,
        signature.sample(VOCABULARY, torch.float32),
        archive,
        method=None,
        input_names=signature.input_names,
        output_names=signature.output_names,
        dynamic_axes=signature.dynamic_axes,
    )
    tract = TractModel.load(archive)
    random = torch.Generator().manual_seed(1)
    for new, past in ((1, 0), (5, 0), (1, 9), (3, 2)):
        inputs = [torch.randint(VOCABULARY, (1, new), generator=random), *signature.past(past, torch.float32, random)]
        with torch.no_grad():
            expected = step(*inputs)
        for actual, want in zip(tract.run(*inputs).values(), expected, strict=True):
            close(actual, want)
    ids = torch.randint(VOCABULARY, (1, 9), generator=random)
    expected = full(model, ids)
    caches = signature.past(0, torch.float32)
    for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        logits, *caches = tract.run(ids[:, begin:end], *caches).values()
        close(logits[:, -1], expected[:, end - 1])
