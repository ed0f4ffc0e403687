"""Choices by tensor where weights are not those of plain linears: `Conv1D` of GPT-2 [K, N], stacks of experts [E, N, K]."""

import math

import pytest
import torch
import transformers

from torch_to_nnef import quantize_and_verify, sensitivity
from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.families import step_signature

SIZES = {"vocab_size": 96, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=64, **SIZES)
MIXTRAL = transformers.MixtralConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, num_local_experts=4, num_experts_per_tok=2, **SIZES,
)  # fmt: skip


def made(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def convert(config, path, **choice):
    model = made(config)
    signature = step_signature(model.config)
    report = quantize_and_verify(
        as_step(model, signature),
        signature.sample(SIZES["vocab_size"], torch.float32),
        path,
        input_names=signature.input_names,
        output_names=signature.output_names,
        dynamic_axes=signature.dynamic_axes,
        **choice,
    )
    assert report.ok, report
    return {row.fqn.removeprefix("transformer.").removeprefix("model."): row for row in report.rows}


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        (
            GPT2,
            {"*.c_fc": "f16", "/attn/": "min_max_q4_0", "*mlp.c_proj*": "f32"},
            {
                "wte.weight": "q40", "h.0.attn.c_attn.weight": "q40", "h.0.attn.c_proj.weight": "q40", "h.0.mlp.c_fc.weight": "f16",
                "h.0.mlp.c_proj.weight": "f32",
            },
        ),
        (
            MIXTRAL,
            {"*experts.gate_up_proj": "f16", "/down_proj/": "f32", "*embed_tokens*": "f16"},
            {
                "layers.0.mlp.experts.gate_up_proj": "f16", "layers.0.mlp.experts.down_proj": "f32", "embed_tokens.weight": "f16",
                "lm_head.weight": "q40", "layers.0.self_attn.q_proj.weight": "q40",
            },
        ),
    ],
    ids=["Conv1D", "experts"],
)  # fmt: skip
def test_overrides(config, overrides, expected, tmp_path):
    rows = convert(config, tmp_path / "m.nnef.tgz", overrides=overrides)
    assert {fqn: row.storage for fqn, row in rows.items() if fqn in expected} == expected
    for fqn, row in rows.items():
        if row.storage == "f16":
            assert (row.bits_per_weight, row.method) == (16.0, "f16")
        if "attn.c_" in fqn:
            assert row.method == "min_max_q4_0"


@pytest.mark.parametrize(
    ("config", "some"),
    [(GPT2, "transformer.h.0.mlp.c_fc.weight"), (MIXTRAL, "model.layers.0.mlp.experts.gate_up_proj")],
    ids=["Conv1D", "experts"],
)
def test_budgets_and_sensitivity(config, some, tmp_path):
    rows = convert(config, tmp_path / "m.nnef.tgz", target_bpw=8.0)
    quantized = [row for row in rows.values() if row.quantized]
    assert {row.storage for row in quantized} == {"q40", "f16"}
    bits = sum(8 * row.nbytes_after for row in quantized) / sum(math.prod(row.shape) for row in quantized)
    assert 4.5 < bits <= 8.0
    batches, known = [{"input_ids": torch.arange(48).reshape(2, 24), "use_cache": False}], None
    if config is MIXTRAL:  # a step alone keeps the experts in one piece
        signature = step_signature(config)
        step = as_step(made(config), signature)
        sample = prepare(step, signature.sample(96, torch.float32), signature.input_names, signature.dynamic_axes)
        known = weight_uses(captured_graph(step, sample)[1])
    measure, costs = sensitivity(made(config), batches, uses=known)
    assert measure == "kl"
    assert {cost.fqn for cost in costs} == {row.fqn for row in quantized}
    assert next(cost for cost in costs if cost.fqn == some).cost > 0
