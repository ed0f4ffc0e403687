"""Mixtures of experts of transformers: routers that tract has, routers it has not, experts of another kind."""

from filecmp import cmpfiles

import pytest
import torch
import transformers

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.families import step_signature
from torch_to_nnef.llm_tract.streaming import load_offloaded
from torch_to_nnef.tensor.offload import OffloadedTensor

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
# Config and what is added to its sizes -> the gate of tract_moe_ffn.
ROUTED = {
    "mixtral": (transformers.MixtralConfig, LOCAL, "softmax_topk"),
    "qwen3": (transformers.Qwen3MoeConfig, {**QWEN, "norm_topk_prob": True}, "softmax_topk"),
    "qwen3, not normalized": (transformers.Qwen3MoeConfig, {**QWEN, "norm_topk_prob": False}, "softmax_all"),
    "qwen2, shared expert": (
        transformers.Qwen2MoeConfig,
        {**QWEN, "shared_expert_intermediate_size": 32},
        "softmax_all",
    ),
    "granite": (transformers.GraniteMoeConfig, LOCAL, "softmax_topk"),
}


def tiny(config, changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = config(**SIZES, **changes)
        return transformers.AutoModelForCausalLM.from_config(made).eval()


def convert(model, folder, method):
    signature = step_signature(model.config)
    report = quantize_and_verify(
        as_step(model, signature),
        signature.sample(SIZES["vocab_size"], torch.float32),
        folder / "m.nnef",
        method,
        input_names=signature.input_names,
        output_names=signature.output_names,
        dynamic_axes=signature.dynamic_axes,
    )
    assert report.ok, report
    assert any(comparison.sizes["S"] == 1 for comparison in report.archive)
    experts = {row.fqn.rpartition(".")[2]: row.storage for row in report.rows if ".experts." in row.fqn}
    return (folder / "m.nnef" / "graph.nnef").read_text(), experts


@pytest.mark.parametrize("method", [None, "min_max_q4_0"])
@pytest.mark.parametrize(("config", "changes", "gate"), ROUTED.values(), ids=ROUTED)
def test_routers_of_tract(config, changes, gate, method, tmp_path):
    model = tiny(config, changes)
    forwards = [vars(module).get("forward") for module in model.modules()]
    text, experts = convert(model, tmp_path, method)
    assert text.count("tract_moe_ffn") == 1
    assert f'k = 2, activation = "silu", gate = "{gate}"' in text
    assert experts == ({"gate_up_proj": "q40", "down_proj": "q40"} if method else {})
    assert [vars(module).get("forward") for module in model.modules()] == forwards


@pytest.mark.parametrize("method", [None, "q40"])
def test_another_router_computes_every_expert(method, tmp_path, caplog):
    """GLM-4: groups of experts, and scores that are corrected for the choice alone."""
    text, experts = convert(tiny(transformers.Glm4MoeConfig, {**GLM, "first_k_dense_replace": 0}), tmp_path, method)
    assert "tract_moe_ffn" not in text
    assert experts == ({"gate_up_proj": "q40", "down_proj": "q40"} if method else {})
    assert "router like that of model.layers.0.mlp.experts:" in caplog.text


def test_experts_of_another_kind_stay_in_float(tmp_path):
    """GPT-OSS: biases, a clamped activation, gate and up interleaved."""
    changes = {**LOCAL, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    text, experts = convert(tiny(transformers.GptOssConfig, changes), tmp_path, "q40")
    assert "tract_moe_ffn" not in text
    assert set(experts.values()) == {"f32"}


def test_weights_on_disk_give_the_same_archive(tmp_path):
    """A checkpoint holds every expert on its own; joined and cut again they are never read as a whole."""
    model = tiny(*ROUTED["qwen3"][:2])
    model.save_pretrained(tmp_path / "checkpoint")
    on_disk = load_offloaded(tmp_path / "checkpoint")
    assert isinstance(on_disk.get_parameter("model.layers.0.mlp.experts.gate_up_proj"), OffloadedTensor)
    for name, which in (("memory", model), ("disk", on_disk)):
        convert(which, tmp_path / name, "min_max_q4_0_all")
    files = {path.name for path in (tmp_path / "memory" / "m.nnef").iterdir()}
    assert "model.layers.0.mlp.experts.gate_up_proj.up.dat" in files
    same, differ, broken = cmpfiles(tmp_path / "memory" / "m.nnef", tmp_path / "disk" / "m.nnef", files, shallow=False)
    assert (set(same), differ, broken) == (files, [], [])
