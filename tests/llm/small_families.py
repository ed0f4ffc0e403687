"""Small models of every family of causal language models that is tested, with random weights."""

import torch
import transformers

from torch_to_nnef.llm_tract.families import attention_of

VOCABULARY, CONTEXT = 96, 64
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_ALL = _TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_GROUPED = _ALL | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 16}
_ALTERNATING = _HEADS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = _ALTERNATING | {"query_pre_attn_scalar": 24}
_SHARING = _ALTERNATING | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Past 4 tokens the long factors count, so texts of 5 are computed with both tables.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}

# name -> (Config class, values): the released models in small.
FAMILIES = {
    "llama": ("Llama", _GROUPED),
    "llama3 rotary, biases": (
        "Llama",
        _GROUPED | {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    ),
    "smollm (tied)": ("Llama", _GROUPED | {"tie_word_embeddings": True}),
    "smollm3 (layers without positions)": ("SmolLM3", _GROUPED | {"no_rope_layers": [1, 0]}),
    "mistral (window)": ("Mistral", _GROUPED | {"sliding_window": 4, "head_dim": 24}),
    "ministral3": ("Ministral3", _HEADS),
    "qwen2 (biases)": ("Qwen2", _GROUPED),
    "qwen2, yarn, window in some layers": (
        "Qwen2",
        _GROUPED | {"rope_parameters": _YARN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3 (qk norm)": ("Qwen3", _HEADS),
    "phi (phi-2)": ("Phi", _ALL | {"partial_rotary_factor": 0.5}),
    "phi3 (fused qkv, partial rotary)": ("Phi3", _GROUPED | {"partial_rotary_factor": 0.75}),
    "phi3, longrope": (
        "Phi3",
        _GROUPED | {"original_max_position_embeddings": 4, "rope_parameters": _LONGROPE},
    ),
    "gemma": ("Gemma", _HEADS),
    "gemma2 (soft caps)": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3 (two rotaries, qk norm)": ("Gemma3Text", _GEMMA),
    "gemma3 with images, on text": (
        "Gemma3",
        {"text_config": _GEMMA, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "gemma3n, text (shared caches, sparse)": (
        "Gemma3nText",
        _SHARING | {"laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
    ),
    "gemma4, text": ("Gemma4Text", _ALTERNATING | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    "gemma4, text (shared caches)": ("Gemma4Text", _SHARING | {"global_head_dim": 16}),
    "vaultgemma": ("VaultGemma", _GEMMA),
    "gpt2 (Conv1D)": ("GPT2", _GPT),
    "gpt-bigcode": ("GPTBigCode", _GPT),
    "gpt-neo (local attention)": (
        "GPTNeo",
        _ALL | {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gpt-neox (parallel, partial rotary)": ("GPTNeoX", _ALL | {"rotary_pct": 0.25}),
    "gpt-neox, sequential": ("GPTNeoX", _ALL | {"use_parallel_residual": False}),
    "gptj": ("GPTJ", _GPT | {"rotary_dim": 8}),
    "codegen": ("CodeGen", _GPT | {"rotary_dim": 8}),
    "olmo (norm without weights, clipped)": ("Olmo", _GROUPED | {"clip_qkv": 1.0}),
    "olmo2 (norms after)": ("Olmo2", _GROUPED),
    "olmo3": ("Olmo3", _ALTERNATING),
    "granite (multipliers)": (
        "Granite",
        _GROUPED
        | {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22}
        | {"logits_scaling": 8.0},
    ),
    "stablelm (partial rotary)": ("StableLm", _GROUPED | {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm, qk norm, parallel": ("StableLm", _GROUPED | {"qk_layernorm": True, "use_parallel_residual": True}),
    "falcon (multi-query)": ("Falcon", _ALL | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, new": ("Falcon", _ALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "starcoder2": ("Starcoder2", _GROUPED | {"sliding_window": 4}),
    "cohere (qk norm)": ("Cohere", _GROUPED | {"use_qk_norm": True}),
    "cohere2": ("Cohere2", _ALTERNATING),
    "deepseek-v3, dense (latent keys)": (
        "DeepseekV3",
        _ALL | _LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 2},
    ),
    "minicpm3 (latent keys)": ("MiniCPM3", _ALL | _LATENT | {"num_key_value_heads": 4}),
    "llama4, text, dense (chunked attention)": (
        "Llama4Text",
        _HEADS | {"moe_layers": [], "intermediate_size_mlp": 96, "attention_chunk_size": 4},
    ),
    "mixtral (experts)": ("Mixtral", _GROUPED | {"num_local_experts": 4}),
    "qwen2-moe (shared expert)": ("Qwen2Moe", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3-moe": ("Qwen3Moe", _HEADS | _EXPERTS),
    "gpt-oss (sinks, experts with biases)": ("GptOss", _HEADS | {"num_local_experts": 4, "sliding_window": 4}),
    "olmoe": ("Olmoe", _GROUPED | _EXPERTS),
    "granite-moe": ("GraniteMoe", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3.5-moe": ("Phimoe", _GROUPED | {"num_local_experts": 4}),
    "deepseek-v3 (groups of experts)": (
        "DeepseekV3",
        _ALL
        | _LATENT
        | _EXPERTS
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "glm4-moe": ("Glm4Moe", _HEADS | _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1}),
    "ernie4.5-moe": (
        "Ernie4_5_Moe",
        _GROUPED | _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "llama4, text": (
        "Llama4Text",
        _HEADS
        | {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96}
        | {"attention_chunk_size": 4},
    ),
    "opt": ("OPT", _ALL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "xglm": (
        "XGLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}
        | {"max_position_embeddings": CONTEXT},
    ),
    "bloom (alibi)": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "apertus": ("Apertus", _GROUPED),
    "arcee": ("Arcee", _GROUPED),
    "bitnet": ("BitNet", _GROUPED),
    "cwm": ("Cwm", _ALTERNATING | {"bos_token_id": 0}),
    "diffllama": ("DiffLlama", _GROUPED),
    "doge": ("Doge", _GROUPED),
    "ernie4.5": ("Ernie4_5", _HEADS),
    "exaone4": ("Exaone4", _ALTERNATING),
    "glm": ("Glm", _HEADS),
    "glm4": ("Glm4", _HEADS),
    "helium": ("Helium", _HEADS),
    "hunyuan, dense": ("HunYuanDenseV1", _HEADS),
    "nanochat": ("NanoChat", _GROUPED),
    "nemotron": ("Nemotron", _HEADS),
    "persimmon": ("Persimmon", _ALL),
    "seed-oss": ("SeedOss", _HEADS),
}


def config_of(name, **more):
    kind, values = FAMILIES[name]
    return getattr(transformers, f"{kind}Config")(**values | more)


def model_of(config):
    """Weights wide enough that attention is not uniform and every part of the formula shows in the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model
