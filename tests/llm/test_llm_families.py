"""Families of causal language models, from small random configs: captured, exported, and run in tract against transformers."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from small_families import CONTEXT, FAMILIES, VOCABULARY, config_of, model_of

from torch_to_nnef import TractNNEF, export_model_to_nnef, quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.llm_tract.causal import as_step, cache_argument
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.families import attention_of, context_of, step_signature
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.tract_model import TractModel

# Run in Q40 every day: each has a part that no other one has. The rest, and all in f32, are slow.
EVERY_DAY = {
    "smollm3 (layers without positions)",
    "mistral (window)",
    "qwen2, yarn, window in some layers",
    "qwen3 (qk norm)",
    "phi3, longrope",
    "gemma2 (soft caps)",
    "gemma3 (two rotaries, qk norm)",
    "gpt2 (Conv1D)",
    "gpt-neox (parallel, partial rotary)",
    "olmo (norm without weights, clipped)",
    "granite (multipliers)",
    "stablelm, qk norm, parallel",
}
Q40 = "min_max_q4_0_all"
CASES = [
    pytest.param(name, method, marks=() if method and name in EVERY_DAY else pytest.mark.slow)
    for name in FAMILIES
    for method in (None, Q40)
]


@torch.no_grad()
def of_whole_text(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def close(actual, expected):
    # Logits are of the order of 1 to 10, caches of 1; both sides add up the same f32 products in another order.
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_steps_are_those_of_torch_and_add_up_to_the_whole_text(name, method, tmp_path):
    config = config_of(name)
    model, signature = model_of(config), step_signature(config)
    step, archive = as_step(model, signature), tmp_path / "m.nnef"
    report = quantize_and_verify(
        step,
        signature.sample(VOCABULARY, torch.float32),
        archive,
        method=method,
        input_names=signature.input_names,
        output_names=signature.output_names,
        dynamic_axes=signature.dynamic_axes,
        inplace=method is not None,  # so the model is quantized as the archive is
    )
    assert bool(report.rows) == (method is not None)
    tract, random = TractModel.load(archive), torch.Generator().manual_seed(1)
    for new, past in ((1, 0), (5, 0), (1, 9), (3, 2)):
        inputs = [torch.randint(VOCABULARY, (1, new), generator=random), *signature.past(past, torch.float32, random)]
        with torch.no_grad():
            expected = step(*inputs)
        for actual, want in zip(tract.run(*inputs).values(), expected, strict=True):
            close(actual, want)
    ids = torch.randint(VOCABULARY, (1, 9), generator=random)
    expected = of_whole_text(model, ids)
    caches = signature.past(0, torch.float32)
    for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        logits, *caches = tract.run(ids[:, begin:end], *caches).values()
        close(logits[:, -1], expected[:, end - 1])


def test_a_part_of_a_formula_that_torch_leaves_out_is_not_left_out():
    config = config_of("gemma2 (soft caps)")
    assert attention_of(config) == "eager"
    capped, config.attn_logit_softcapping = model_of(config), None
    assert attention_of(config) is None
    ids = torch.arange(9)[None]
    assert not torch.allclose(of_whole_text(capped, ids), of_whole_text(model_of(config), ids), rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def llama():
    return model_of(config_of("llama"))


@pytest.mark.parametrize("logits", [0, 1, 3, None])
@pytest.mark.parametrize("slices", [True, False])
def test_logits_of_the_positions_asked_for(llama, logits, slices, monkeypatch):
    whole = of_whole_text(llama, ids := torch.arange(5)[None])
    if not slices:  # a forward without that argument
        kind, forward, given = type(llama), type(llama).forward, cache_argument(type(llama))

        def older(self, input_ids, cache, use_cache, return_dict):
            return forward(self, input_ids=input_ids, **{given: cache}, use_cache=use_cache)

        monkeypatch.setattr(kind, "forward", older)
    signature = step_signature(llama.config, logits)
    chosen = [torch.tensor([1, 3])] if logits is None else []
    with torch.no_grad():
        actual, *caches = as_step(llama, signature)(ids, *chosen, *signature.past(0, torch.float32))
    assert len(caches) == 4
    close(actual, whole[:, [1, 3]] if logits is None else whole[:, -logits:])


def test_positions_as_an_input_in_tract(llama, tmp_path):
    signature = step_signature(llama.config, None)
    exported(as_step(llama, signature), signature, tmp_path)
    positions, ids = torch.tensor([4, 0, 2]), torch.arange(5)[None]
    actual = TractModel.load(tmp_path / "m.nnef").run(ids, positions, *signature.past(0, torch.float32))
    close(actual["outputs"], of_whole_text(llama, ids)[:, positions])


def exported(step, signature, folder):
    return export_model_to_nnef(
        step,
        signature.sample(VOCABULARY, torch.float32),
        folder / "m.nnef",
        TractNNEF.latest(dynamic_axes=signature.dynamic_axes),
        input_names=signature.input_names,
        output_names=signature.output_names,
        custom_extensions=signature.extensions,
        compression_level=None,
    )


def test_an_archive_holds_its_sizes(llama, tmp_path):
    signature = step_signature(llama.config, 2)
    tract = TractModel.load(exported(as_step(llama, signature), signature, tmp_path))
    ids = torch.arange(CONTEXT)[None]

    def run(new, past):
        return tract.run(ids[:, :new], *signature.past(past, torch.float32))["outputs"].shape

    assert run(2, 0) == run(CONTEXT, 0) == run(2, CONTEXT - 2) == (1, 2, VOCABULARY)
    for new, past in ((1, 5), (0, 5), (CONTEXT, 1), (2, CONTEXT - 1)):
        with pytest.raises(T2NErrorInvalidArgument, match=r"S >= 2|S\+P <= 64"):
            run(new, past)


def test_a_model_that_turns_a_size_into_a_number_is_refused(llama, tmp_path):
    signature, step = step_signature(llama.config), as_step(llama, step_signature(llama.config))

    class Burns(type(step)):
        def forward(self, ids, *caches):
            logits, *after = super().forward(ids, *caches)
            return [logits + int(caches[0].shape[2]), *after]

    step.__class__ = Burns
    with pytest.raises(T2NErrorDynamicShapeValue, match=r"'P'.* became 3"):
        exported(step, signature, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom (alibi)", "gemma3 with images, on text", "gpt2 (Conv1D)", "opt"])
def test_the_whole_way_of_a_folder_without_tokenizer(name, tmp_path):
    model_of(config_of(name)).save_pretrained(tmp_path / "checkpoint")
    report = export_llm(LlmOptions(export_dirpath=tmp_path / "out", local_dir=tmp_path / "checkpoint"))
    assert report.ok
    assert report.generation.ok
    assert "without a tokenizer" in report.notes[0]


# -- what a config says


def test_signatures():
    assert step_signature(config_of("llama")).layers == ((2, 16, 16),) * 2
    assert step_signature(config_of("gemma3 (two rotaries, qk norm)")).layers == ((2, 16, 16),) * 2
    assert step_signature(config_of("gemma4, text (shared caches)")).layers == ((2, 16, 16),) * 2
    assert step_signature(config_of("falcon (multi-query)")).layers == ((1, 16, 16),) * 2
    assert step_signature(config_of("deepseek-v3, dense (latent keys)")).layers[0] in ((1, 32, 8), (4, 24, 16))


def test_no_weight_is_made_for_a_signature():
    """A model of 400 billion parameters."""
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=126, max_position_embeddings=131072)
    assert step_signature(config).layers == ((8, 128, 128),) * 126


@pytest.mark.parametrize(
    ("name", "changes", "context"),
    [
        ("llama", {}, CONTEXT),
        ("llama3 rotary, biases", {}, CONTEXT),
        ("qwen2, yarn, window in some layers", {"max_position_embeddings": 16}, CONTEXT),
        ("qwen2, yarn, window in some layers", {"max_position_embeddings": 100}, 100),
        ("phi3, longrope", {}, CONTEXT),
        ("gemma3 (two rotaries, qk norm)", {}, CONTEXT),
        ("gpt2 (Conv1D)", {}, CONTEXT),
        ("bloom (alibi)", {}, None),
    ],
)
def test_contexts(name, changes, context):
    assert context_of(config_of(name, **changes)) == context


REFUSED = {
    "mamba": ("Mamba", {}, "LinearAttentionLayer"),
    "mamba2": ("Mamba2", {}, "LinearAttentionLayer"),
    "bamba": ("Bamba", {}, "LinearAttentionLayer"),
    "recurrent_gemma": ("RecurrentGemma", {}, "LinearAttentionLayer|fails"),
    "qwen3_next": ("Qwen3Next", {}, "LinearAttentionLayer"),
    "rwkv": ("Rwkv", {"num_hidden_layers": 2}, "no cache of keys and values"),
    "deepseek_v32": ("DeepseekV32", {}, "DynamicIndexedLayer"),
    "t5gemma": ("T5Gemma", {}, "decoder-only"),
    "bart": ("Bart", {}, "decoder-only"),
    "bert": ("Bert", {}, "is_decoder"),
    "llava": ("Llava", {}, "save the language model"),
    "mpt": ("Mpt", {}, "attention bias"),
    "falcon": ("Falcon", {"alibi": True}, "bf16"),
    "llama": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic rotary",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name_from_the_config_alone(family):
    kind, values, why = REFUSED[family]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("younger than this transformers")
    config = getattr(transformers, f"{kind}Config")(**values)
    with pytest.raises(T2NErrorNotImplemented, match=why) as refused:
        step_signature(config)
    assert str(refused.value).lower().startswith((family, kind.lower()))
    assert len(str(refused.value)) < 400


def test_the_documented_families_are_those_tested():
    page = (Path(__file__).parents[2] / "docs" / "llm_families.md").read_text()
    tested, refused = page.split("## Refused")
    assert set(re.findall(r"^\| `(.+?)` \|", tested, re.M)) == set(FAMILIES)
    assert set(re.findall(r"^\| `(.+?)` \|", refused, re.M)) == set(REFUSED)
