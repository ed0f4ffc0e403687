"""Metrics in the terms of a model's kind, for float torch, quantized torch and the archive in tract."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.verify.metrics import Metrics, measure

ORDER = ["float torch", "quantized torch", "archive in tract"]


class Head(nn.Module):
    """A small net that ends as told."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.end = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), end

    def forward(self, x):
        return self.end(self.body(x))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 64), nn.Linear(64, 40)

    def forward(self, ids):
        return self.head(self.embed(ids))


def report_of(model, x, tmp_path, **options):
    report = quantize_and_verify(model.eval(), x, tmp_path / "m.nnef.tgz", "min_max_q4_0_all", **options)
    assert report.ok
    assert [row.name for row in report.metrics.rows] == ORDER
    return report


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda x: x.softmax(-1), "probabilities"),
        (lambda x: x.log_softmax(-1), "log-probabilities"),
        (torch.sigmoid, "chances"),
        (lambda x: x, "values"),
    ],
)
def test_the_last_call_says_what_an_output_is(tmp_path, end, kind):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    metrics = report_of(Head(end), x, tmp_path).metrics
    assert metrics.kind == kind
    assert metrics.inputs == "the sample inputs"
    exact, quantized, tract = metrics.rows
    fields = ("cosine", "relative_error") if kind == "values" else ("kl", "top1_same")
    for field in fields:
        assert getattr(exact, field) is None
        assert getattr(quantized, field) is not None
        assert getattr(tract, field) == pytest.approx(getattr(quantized, field), rel=1e-3)
    assert (quantized.kl or quantized.relative_error) > 1e-6
    assert quantized.perplexity is None


def test_tokens_in_and_as_many_classes_as_embeddings_are_a_language_model(tmp_path):
    model, ids = Tokens().eval(), torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(1))
    report = report_of(model, ids, tmp_path, dynamic_axes={"ids": {0: "B", 1: "S"}})
    assert report.metrics.kind == "logits"
    with torch.no_grad():
        loss = functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report.metrics.rows[0].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert report.metrics.rows[1].perplexity != report.metrics.rows[0].perplexity
    text = str(report)
    assert "What it costs the model: next tokens, on the sample inputs" in text
    assert report.to_dict()["metrics"]["rows"][1]["kl"] > 0


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda x: x.sum().sigmoid(), "chances"),
        (lambda x: x.argmax(-1), "choices"),
        (lambda x: torch.fft.fft(x), "values"),  # pairs in the archive
    ],
)
def test_scalars_choices_and_complex_values_are_measured_too(tmp_path, end, kind):
    metrics = report_of(Head(end), torch.randn(8, 64), tmp_path).metrics
    assert metrics.kind == kind
    quantized, tract = metrics.rows[1:]
    value = {"chances": "kl", "choices": "top1_same", "values": "relative_error"}[kind]
    assert getattr(tract, value) == pytest.approx(getattr(quantized, value), rel=1e-2, abs=1e-9)
    if kind == "choices":
        assert quantized.relative_error is None


def test_classes_are_along_the_axis_of_the_softmax(tmp_path):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    by_axis = [
        report_of(Head(end), x, tmp_path, force=True).metrics.rows[1]
        for end in (lambda x: x[:, :, None].softmax(dim=1), lambda x: x.softmax(-1))
    ]
    assert by_axis[0].kl == pytest.approx(by_axis[1].kl, rel=1e-4)
    assert by_axis[0].kl > 1e-6
    assert by_axis[0].top1_same == by_axis[1].top1_same


def test_held_out_batches_are_what_it_is_measured_on(tmp_path):
    batches = [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    x = torch.randn(2, 64)

    def run(**options):
        return quantize_and_verify(
            Head(lambda x: x).eval(),
            x,
            tmp_path / "m.nnef.tgz",
            "q40_imatrix",
            calibration=batches,
            force=True,
            **options,
        ).metrics

    held_out = run(dynamic_axes={"x": {0: "B"}})
    assert held_out.inputs == "2 held-out batches"
    assert run().inputs == "the sample inputs"  # the graph takes two samples only
    assert run(dynamic_axes={"x": {0: "B"}}) == held_out


def test_numbers_are_those_of_their_definitions():
    logits, other = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    ids = torch.randint(7, (2, 3))
    forms = {"a": lambda _: logits, "b": lambda _: other}
    row = measure("logits", [[ids], [ids]], "", forms).rows[1]
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    assert row.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert row.top1_same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    row = measure("values", [[ids]], "", forms).rows[1]
    assert row.relative_error == pytest.approx(float((other - logits).square().sum() / logits.square().sum()), rel=1e-5)
    assert row.cosine == pytest.approx(float(functional.cosine_similarity(logits, other, dim=-1).mean()), rel=1e-5)
    a, b = logits.sigmoid(), other.sigmoid()
    row = measure("chances", [[ids]], "", {"a": lambda _: a, "b": lambda _: b}).rows[1]
    by_hand = a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
    assert row.kl == pytest.approx(float(by_hand.mean()), rel=1e-4)


def test_certain_outcomes_have_a_finite_divergence():
    sure = torch.tensor([[1.0, 0.0]])
    for kind in ("probabilities", "chances"):
        rows = measure(kind, [[sure]], "", {"a": lambda _: sure, "b": lambda _: sure}).rows
        assert rows[1].kl == pytest.approx(0.0, abs=1e-9)
    nearly = torch.tensor([[1.0, 1e-42]])  # which the other rounds to 0
    row = measure("probabilities", [[sure]], "", {"a": lambda _: nearly, "b": lambda _: sure}).rows[1]
    assert row.kl == pytest.approx(0.0, abs=1e-9)


def test_a_model_that_is_not_quantized_has_no_metrics(tmp_path):
    report = quantize_and_verify(Head(torch.sigmoid).eval(), torch.ones(1, 64), tmp_path / "m.nnef.tgz", None)
    assert report.metrics is None
    assert Metrics("values", "", ()).table()[1] == ("model",)
