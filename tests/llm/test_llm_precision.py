"""Number types of a language model, on a tiny Llama: f16 with each option, bf16, caches of another type than the model."""

import logging
from dataclasses import fields, replace

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config

from torch_to_nnef import TractModel, export_model_to_nnef
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorIOPytorchTractNotISO, T2NErrorRuntime
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.families import step_signature
from torch_to_nnef.llm_tract.precision import ATTENTION, BEYOND_HALF, FORCED, cache_dtype, forced_for, widened
from torch_to_nnef.llm_tract.scenarios import scenarios
from torch_to_nnef.op.half import PARTS
from torch_to_nnef.tensor.quant import QTensor


def exported(model, folder, cached=None, tolerance="very", **options):
    """The archive, checked, and the lines of its graph."""
    signature = replace(step_signature(model.config), cached=cached)
    target = TractNNEF.latest(dynamic_axes=signature.dynamic_axes, check_io_tolerance=tolerance, **options)
    path = export_model_to_nnef(
        as_step(model, signature),
        signature.sample(model.config.vocab_size, model.dtype),
        folder / "model.nnef",
        target,
        signature.input_names,
        signature.output_names,
        compression_level=None,
        custom_extensions=signature.extensions,
    )
    return TractModel.load(path), (path / "graph.nnef").read_text().splitlines()


def dtypes(archive):
    return {fact.dtype for fact in (*archive.inputs[1:], *archive.outputs)}


@pytest.fixture(scope="module")
def half():
    return tiny_model(dtype=torch.float16, num_hidden_layers=1)


@pytest.fixture(scope="module")
def in_half(half, tmp_path_factory):
    return exported(half, tmp_path_factory.mktemp("half"))


def test_a_half_model_holds_two_bytes_a_weight(half, in_half):
    archive, lines = in_half
    assert dtypes(archive) == {"float16"}
    held = sum(weight.numel() for weight in {id(w): w for w in half.parameters()}.values())
    assert archive.weight_bytes < 2.2 * held
    assert (
        sum('acc = "f16"' in line for line in lines) == 7 + 1 + 2
    )  # linear layers, the head, both products of attention


@pytest.mark.parametrize(
    ("option", "sums"), [(ATTENTION, 'acc = "f16"'), ("force_linear_accumulation_in_f32", 'acc = "f32"')]
)
def test_an_option_is_verified_and_seen(option, sums, half, in_half, tmp_path):
    _, without = in_half
    archive, within = exported(half, tmp_path, **{option: True})
    assert dtypes(archive) == {"float16"}
    linear = [line for line in within if "tract_core_einsum([" in line and "_weight" in line]
    assert len(linear) == 7 + 1
    assert all(sums in line for line in linear)
    assert any("attention_cast" in line or "attn_cast" in line for line in set(within) - set(without)) == (
        option == ATTENTION
    )


def test_norms_that_a_model_has_in_single_stay_so(half, in_half, tmp_path):
    assert exported(half, tmp_path, force_norm_in_f32=True)[1] == in_half[1]


def test_norms_of_a_model_that_leaves_them_to_torch(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = GPTNeoXConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)
    model = GPTNeoXForCausalLM(config).half().eval()
    half, single = (exported(model, tmp_path, **options)[1] for options in ({}, dict.fromkeys(PARTS, True)))
    assert sum("tract_core_rms_norm" in line for line in half) == 3
    assert sum("= t2n_layer_norm_affine(" in line for line in single) == 3


def test_no_option_changes_a_model_in_single(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    assert exported(model, tmp_path)[1] == exported(model, tmp_path, **dict.fromkeys(PARTS, True))[1]


def test_scores_beyond_half_are_rescued_by_the_option_that_the_error_names(tmp_path):
    model = tiny_model(dtype=torch.float16, num_hidden_layers=1)
    with torch.no_grad():
        for side in ("q_proj", "k_proj"):
            getattr(model.model.layers[0].self_attn, side).weight *= 200  # scores around 1e5
    with pytest.raises(T2NErrorIOPytorchTractNotISO, match=f"{ATTENTION}=True"):
        exported(model, tmp_path)
    exported(model, tmp_path, **{ATTENTION: True})


def test_types_known_to_leave_half_force_options_that_exist():
    known = {field.name for field in fields(TractNNEF)}
    assert all(known.issuperset(forced) and all(forced.values()) for forced in FORCED.values())
    assert forced_for(Qwen2Config(), torch.float16) == dict(FORCED["qwen2"])
    assert forced_for(Qwen2Config(), torch.float32) == {}
    assert forced_for(tiny_config(), torch.float16) == {}


def test_what_no_option_rescues_is_said(caplog):
    config = tiny_config()
    for kind in BEYOND_HALF:
        config.model_type = kind
        with caplog.at_level(logging.WARNING, "torch_to_nnef"):
            forced_for(config, torch.float32)
            assert not caplog.records
            forced_for(config, torch.float16)
        assert "-dt f32" in caplog.text
        caplog.clear()


def test_a_model_that_overflows_in_torch_is_no_reference():
    model = tiny_model(dtype=torch.float16, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 3e4
        model.model.layers[0].mlp.up_proj.weight *= 3e4
    signature = step_signature(model.config)
    with pytest.raises(T2NErrorRuntime, match=r"NaN or infinity in float16.*-dt f32"):
        scenarios(as_step(model, signature), signature, signature.sample(320, model.dtype), range(9))


def test_bf16_is_the_same_numbers_in_single(tmp_path, caplog):
    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with caplog.at_level(logging.WARNING, "torch_to_nnef"):
        assert widened(model) is model
    assert "bf16" in caplog.text
    for name, weight in model.named_parameters():
        assert weight.dtype is torch.float32
        assert torch.equal(weight, before[name].double().float())
    archive, _ = exported(model, tmp_path, tolerance="approximate")
    assert dtypes(archive) == {"float32"}


def test_other_types_are_not_touched(half, caplog):
    weights = list(half.parameters())
    assert all(a is b for a, b in zip(weights, widened(half).parameters(), strict=True))
    assert not caplog.records


def test_packed_weights_of_bf16_keep_their_codes(tmp_path):
    from torch_to_nnef.compress import quantize_weights_min_max_Q4_0

    model = quantize_weights_min_max_Q4_0(tiny_model(dtype=torch.bfloat16, num_hidden_layers=1))
    codes = {name: w.u8_blob.clone() for name, w in model.named_parameters() if isinstance(w, QTensor)}
    assert codes
    widened(model)
    for name, weight in model.named_parameters():
        assert weight.dtype is torch.float32
        assert (name in codes) == isinstance(weight, QTensor)
        assert name not in codes or torch.equal(weight.u8_blob, codes[name])
    exported(model, tmp_path, tolerance="approximate")


@pytest.mark.parametrize(("dtype", "cached"), [("float16", "f32"), ("float32", "f16")])
def test_caches_of_another_type_go_round_in_it(dtype, cached, tmp_path):
    model = tiny_model(dtype=getattr(torch, dtype), num_hidden_layers=1)
    archive, _ = exported(model, tmp_path, cached=cache_dtype(cached))
    caches = {fact.dtype for fact in (*archive.inputs[1:], *archive.outputs[1:])}
    assert caches == {{"f16": "float16", "f32": "float32"}[cached]}
    assert archive.outputs[0].dtype == dtype


def test_caches_cannot_be_what_tract_has_not():
    with pytest.raises(T2NErrorInvalidArgument, match="f32 or f16"):
        cache_dtype("bf16")
