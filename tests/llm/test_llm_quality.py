"""Perplexity and divergence of a model's forms on a text."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TEXT, tiny_tokenizer
from trained import archive_in, form_of, signature_of, trained_model

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.llm_tract.generation import TorchSteps
from torch_to_nnef.llm_tract.quality import FloatReference
from torch_to_nnef.llm_tract.steps import TractSteps, run_ahead
from torch_to_nnef.llm_tract.texts import windows

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return windows(TOKENIZER, path, context=128, most=90, size=40)


def test_windows_cut_a_text(text, tmp_path):
    ids = TOKENIZER(TEXT)["input_ids"]
    assert [len(window) for window in text.ids] == [40, 40, 10]
    assert [token for window in text.ids for token in window] == ids[:90]
    assert (text.name, text.left_out, text.count) == ("text.txt", True, 87)
    built_in = windows(TOKENIZER, context=32)
    assert {len(window) for window in built_in.ids} == {32}
    assert built_in.left_out
    with pytest.raises(T2NErrorNotFoundFile, match="no text at"):
        windows(TOKENIZER, tmp_path / "none.txt")


def test_texts_that_cannot_be_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(T2NErrorInvalidArgument, match="is not UTF-8"):
        windows(TOKENIZER, path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(T2NErrorInvalidArgument, match="at least two tokens"):
        windows(TOKENIZER, path)


def test_windows_begin_as_the_tokenizer_begins_texts():
    class WithBegin:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True):
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    assert {window[0] for window in windows(WithBegin(), size=20).ids} == {1}
    assert {len(window) for window in windows(WithBegin(), size=20, most=38).ids} == {20}


def test_all_forms_are_measured_as_torch_would(text, exported):
    """The reference is spelled out on whole windows; sums of f32 in another order leave 1e-5 of a perplexity near 1."""
    method = "min_max_q4_0_all"
    model, work, archive = trained_model(), form_of(method), archive_in(exported(method))
    signature = signature_of(model)
    with FloatReference(TorchSteps(model, signature), text, TOKENIZER, 400) as reference:
        forms = ("quantized torch", TorchSteps(work, signature), 100), ("tract", TractSteps(archive), 200)
        quality = reference.quality(forms)
    _, in_torch, in_tract = quality.rows
    losses, divergences, same = [], [], []
    with torch.no_grad():
        for window in text.ids:
            ids = torch.tensor([window])
            p, q = (side(ids).logits[0, :-1].double().log_softmax(-1) for side in (model, work))
            losses += [F.nll_loss(side, ids[0, 1:], reduction="none") for side in (p, q)]
            divergences.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    floats, quants = (math.exp(torch.cat(losses[side::2]).mean()) for side in (0, 1))
    divergences, same = torch.cat(divergences), torch.cat(same)
    assert reference.row.perplexity == pytest.approx(floats, rel=1e-5)
    for row in (in_torch, in_tract):
        assert row.perplexity == pytest.approx(quants, rel=1e-4)
        assert row.kl_mean == pytest.approx(divergences.mean().item(), rel=1e-3)
        assert row.kl_max == pytest.approx(divergences.max().item(), rel=1e-3)
        assert row.top1_same == pytest.approx(same.double().mean().item(), abs=1e-12)
    assert floats < quants
    assert 1e-3 < in_tract.kl_mean < in_tract.kl_max
    assert quality.rows[0].answer.startswith(" Paris. The capital")
    tokens, _ = run_ahead(TorchSteps(work, signature), TOKENIZER("The capital of France is")["input_ids"], 16)
    assert in_torch.answer == in_tract.answer == TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert [row.nbytes for row in quality.rows] == [400, 100, 200]
    section = quality.section()
    assert section.title == "What it costs in words: 87 tokens of text.txt, the rest of it left out"
    assert [row[0] for row in section.rows] == ["float torch", "quantized torch", "tract"]
    assert {len(row) for row in section.rows} == {len(section.header)}
    assert json.loads(json.dumps(quality.to_dict()))["rows"][2]["kl_mean"] == in_tract.kl_mean


def test_the_uncompressed_archive_diverges_by_nothing(text, exported):
    """Logits within 1e-4 make a divergence of about half their square; what is left are sums in another order."""
    model, archive = trained_model(), archive_in(exported(None, 0))
    with FloatReference(TorchSteps(model, signature_of(model)), text, TOKENIZER, 1) as reference:
        row = reference.measure("tract", TractSteps(archive), 1, [])
        itself = reference.measure("again", TorchSteps(model, signature_of(model)), 1, [])
    assert (itself.kl_max, itself.top1_same, itself.perplexity) == (0.0, 1.0, reference.row.perplexity)
    assert row.kl_max < 1e-8
    assert row.top1_same == 1.0


def test_tokens_that_have_no_chance_diverge_without_bound(text):
    class Sure:
        def __init__(self, likeliest):
            self.likeliest = likeliest

        def reset(self): ...

        def keep(self, count): ...

        def feed(self, ids, *, every=False):
            logits = np.full((len(ids), 320), -np.inf, np.float32)
            logits[:, self.likeliest] = 0
            return logits

    with FloatReference(Sure(3), text, TOKENIZER, 1) as reference:
        quality = reference.quality([("", Sure(token), 1) for token in (3, 4)])
    _, same, other = quality.rows
    data = quality.to_dict()
    assert (same.kl_mean, other.kl_mean) == (0.0, math.inf)
    assert data["rows"][2]["kl_max"] == "inf"
    assert data["rows"][0]["perplexity"] == "inf"
