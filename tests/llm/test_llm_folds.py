"""Folds of the step of a language model: whatever is found leaves its logits, and its text, as they are."""

import pytest
import torch
from small_families import FAMILIES, VOCABULARY, config_of, model_of
from tiny import TEXT, tiny_llama

from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.folds import find_folds
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.families import step_signature
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.quantize.scaling import apply_fold

# Producers in a layer, of families that spell them differently.
EVERY_DAY = {
    "llama3 rotary, biases": "input_layernorm.weight post_attention_layernorm.weight self_attn.v_proj.weight self_attn.v_proj.bias "
    "mlp.up_proj.weight mlp.up_proj.bias",
    "phi3 (fused qkv, partial rotary)": "input_layernorm.weight post_attention_layernorm.weight self_attn.qkv_proj.weight "
    "mlp.gate_up_proj.weight",
    "gemma2 (soft caps)": "input_layernorm.weight pre_feedforward_layernorm.weight self_attn.v_proj.weight mlp.up_proj.weight",
    "gpt2 (Conv1D)": "ln_1.weight ln_1.bias ln_2.weight ln_2.bias attn.c_attn.weight attn.c_attn.bias",
    "gpt-neox (parallel, partial rotary)": "input_layernorm.weight input_layernorm.bias post_attention_layernorm.weight "
    "post_attention_layernorm.bias attention.query_key_value.weight attention.query_key_value.bias",
}
CASES = [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_text_stays_as_it_is(name):
    config = config_of(name)
    model, signature = model_of(config), step_signature(config)
    step = as_step(model, signature)
    sample = signature.sample(VOCABULARY, torch.float32)
    _, graph = captured_graph(step, prepare(step, sample, signature.input_names, signature.dynamic_axes))
    ids = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))

    def run():
        first = step(ids[:, :5], *signature.past(0, torch.float32))
        return first, step(ids[:, 5:], *first[1:])

    # Without a word on caches these stay as they are too.
    for carried, compared in (({}, slice(None)), (signature.carried_positions, slice(1))):
        folds = find_folds(graph, carried)
        before, generator = run(), torch.Generator().manual_seed(2)
        done = [apply_fold(model, fold, torch.exp(torch.randn(fold.channels, generator=generator))) for fold in folds]
        for outputs, expected in zip(run(), before, strict=True):
            for one, other in zip(outputs[compared], expected[compared], strict=True):
                # Roundings of weights are 6e-8; 4e-6 of the largest value was the most in any family.
                assert (one - other).abs().max() <= 2e-5 * other.abs().max()
        for fold in reversed(done):
            fold.undo()
    assert len(folds) >= 2
    if name in EVERY_DAY:
        made = {side.fqn.partition(".0.")[2] for fold in folds for side in fold.producers} - {""}
        assert made == set(EVERY_DAY[name].split())


def test_scaled_inputs_of_a_checkpoint_in_tract(tmp_path):
    """Caches are scaled with the values, and are compared too; so is a text that is generated."""
    checkpoint = tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = LlmOptions(
        export_dirpath=tmp_path / "out", local_dir=checkpoint, compression_method="q40_awq",
        calibration_text=tmp_path / "text.txt", calibration_tokens=96,
    )  # fmt: skip
    report = export_llm(options)
    assert report.ok
    assert {row.method for row in report.rows if row.quantized} == {"q40_awq"}
