"""The four scenarios: what goes in, and that tract's outputs are judged against torch's."""

import copy

import numpy as np
import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer
from trained import archive_in, sample_of, signature_of, trained_model

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorIOPytorchTractNotISO, T2NErrorTract
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.scenarios import scenarios, verify_scenarios
from torch_to_nnef.verify import raise_on_mismatch

IDS = tiny_tokenizer()(TEXT)["input_ids"]
NAMES = ["export", "prompt", "prompt_with_past", "text_generation"]


def runs_of(model, logits=1, ids=IDS, total=None):
    signature = signature_of(model, logits)
    return scenarios(as_step(model, signature), signature, sample_of(model, signature), ids, total)


@pytest.mark.parametrize(("logits", "new"), [(1, 1), (3, 3), (0, 1), (None, 1)])
def test_all_four_hold_in_tract(logits, new, exported):
    runs = runs_of(trained_model(), logits)
    assert [run.name for run in runs] == NAMES
    assert [(run.sizes["P"], run.sizes["S"]) for run in runs[1:]] == [(0, 32), (16, 16), (32 - new, new)]
    archive = archive_in(exported(None, logits))
    comparisons = verify_scenarios(archive, runs, TractCheckTolerance.APPROXIMATE)
    assert all(comparison.ok for comparison in comparisons)
    assert [len(comparison.outputs) for comparison in comparisons] == [5] * 4
    assert comparisons[0].sizes_text.startswith("export: ")
    assert [c.traced for c in comparisons] == [True, False, False, False]


def test_the_past_is_what_the_model_made_of_the_text():
    """Two ways to the same token: the logits agree to the rounding of f32 sums of about ten terms of size one."""
    _, prompt, more, last = runs_of(tiny_model())
    for run in (more, last):
        torch.testing.assert_close(run.outputs["outputs"], prompt.outputs["outputs"], atol=1e-4, rtol=1e-5)
    assert torch.equal(more.inputs["in_cache_key_0"], prompt.outputs["out_cache_key_0"][:, :, :16])


def test_the_total_bounds_past_and_new_tokens():
    assert [run.sizes for run in runs_of(tiny_model(), total=7)[1:]] == [
        {"S": 7, "P": 0},
        {"S": 4, "P": 3},
        {"S": 1, "P": 6},
    ]
    with pytest.raises(T2NErrorInvalidArgument, match="129 tokens exceeds the 128"):
        runs_of(tiny_model(), total=129)
    with pytest.raises(T2NErrorInvalidArgument, match="2 tokens are too few"):
        runs_of(tiny_model(), total=2)
    with pytest.raises(T2NErrorInvalidArgument, match=r"5 tokens are too few .* 6 are needed"):
        runs_of(tiny_model(), logits=3, ids=IDS[:5])


def test_bf16_is_f32_in_files_and_half_precision_in_judgement():
    run = runs_of(tiny_model(dtype=torch.bfloat16))[2]
    inputs, outputs = run.arrays
    assert {array.dtype.name for array in (*inputs.values(), *outputs.values())} == {"int64", "float32"}
    np.testing.assert_array_equal(outputs["outputs"], run.outputs["outputs"].float().numpy())


def test_a_wrong_archive_is_named_by_scenario_and_output(exported):
    model = copy.deepcopy(trained_model())
    model.model.layers[1].self_attn.v_proj.weight[0, 0] += 1
    archive, runs = archive_in(exported()), runs_of(model)
    comparisons = verify_scenarios(archive, runs, TractCheckTolerance.APPROXIMATE)
    assert not any(comparison.ok for comparison in comparisons)
    assert {o.name for c in comparisons for o in c.outputs if not o.ok} == {"outputs", "out_cache_value_1"}
    with pytest.raises(T2NErrorIOPytorchTractNotISO, match="prompt_with_past: S=16, P=16: output 'out_cache_value_1'"):
        raise_on_mismatch(comparisons, [run.input_set for run in runs])


def test_what_tract_refuses_is_named_by_scenario(exported):
    archive = archive_in(exported(None, 3))  # takes three tokens at least
    with pytest.raises(T2NErrorTract, match=r"scenario text_generation: .* S *[>-]"):
        verify_scenarios(archive, runs_of(trained_model())[3:], TractCheckTolerance.APPROXIMATE)
