"""Data that methods of the command learn from: asked for before anything is loaded, read as the model reads it."""

import numpy as np
import pytest
import torch
from small_families import VOCABULARY, config_of, model_of
from tiny import TEXT, tiny_llama

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.llm_tract.calibration import check_calibration
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.quantize import Selection, Use
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.tensor.quant import quantize_q40


def learns(model, calibration=None, calibration_cache=None, **kw):
    """Show what it was given."""
    kw["seen"] = calibration


def needs_none(model, selection=None):
    """Learn nothing."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def options(checkpoint, folder, **given):
    return LlmOptions(export_dirpath=folder, local_dir=checkpoint, **given)


@pytest.mark.parametrize("method", ["q40_gptq", "int8_smooth"])
def test_a_text_becomes_windows_and_weights_are_judged_by_what_they_give(method, checkpoint, text, tmp_path):
    given = {"compression_method": method, "calibration_text": text, "calibration_tokens": 96}
    report = export_llm(options(checkpoint, tmp_path / "out", **given))
    assert report.ok
    packed = [row for row in report.rows if row.quantized]
    assert len(packed) == len(report.rows) > 10
    assert all(row.output_snr_db > 0 for row in packed)  # in a random model, errors of early layers grow


def test_arrays_reach_the_model_without_a_cache(checkpoint, tmp_path, monkeypatch):
    seen = []

    def method(model, calibration=None, **_):
        seen.extend((*calibration.learn, *calibration.held_out))

    monkeypatch.setattr("torch_to_nnef.compress.DEFAULT_COMPRESSION", {"mine": method})
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(40, dtype=np.uint16).reshape(5, 8))
    given = {"compression_method": "mine", "calibration_npz": tmp_path / "ids.npz", "no_verify": True}
    export_llm(options(checkpoint, tmp_path / "out", **given))
    assert [tuple(batch.kwargs["input_ids"].shape) for batch in seen] == [(1, 8)] * 5
    assert all(batch.kwargs["use_cache"] is False for batch in seen)

    np.savez(tmp_path / "ids.npz", input_ids=np.array([[1, 2, 320]]))
    with pytest.raises(T2NErrorInvalidArgument, match=r"tokens must be in \[0, 320\)"):
        export_llm(options(checkpoint, tmp_path / "other", **given))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", ["q40_gptq", "q40_imatrix", "q40_best"])
def test_without_data_the_flags_are_named_before_anything_is_loaded(method, tmp_path):
    with pytest.raises(T2NErrorInvalidArgument, match=f"{method} learns from data: pass --calibration-text FILE or"):
        export_llm(LlmOptions(export_dirpath=tmp_path / "out", model_slug="no/such", compression_method=method))


def test_data_that_nothing_learns_from_is_refused(text, tmp_path):
    made = {"export_dirpath": tmp_path / "out", "model_slug": "no/such"}
    with pytest.raises(T2NErrorInvalidArgument, match="an export without compression learns from no calibration data"):
        check_calibration(LlmOptions(**made, calibration_text=text), ())
    with pytest.raises(T2NErrorInvalidArgument, match="simple learns from no"):
        check_calibration(LlmOptions(**made, calibration_text=text, compression_method="simple"), [needs_none])
    with pytest.raises(T2NErrorInvalidArgument, match="simple takes no --calibration-cache"):
        check_calibration(LlmOptions(**made, calibration_cache=tmp_path, compression_method="simple"), [needs_none])


def test_a_cache_that_is_there_stands_for_data(text, tmp_path):
    made = {"export_dirpath": tmp_path / "out", "model_slug": "no/such", "compression_method": "mine"}
    check_calibration(LlmOptions(**made, calibration_cache=text), [learns])
    with pytest.raises(T2NErrorInvalidArgument, match="mine learns from data"):
        check_calibration(LlmOptions(**made, calibration_cache=tmp_path / "none"), [learns])


def test_what_was_learned_is_used_again_without_data(checkpoint, text, tmp_path):
    given = {"compression_method": "q40_imatrix", "calibration_cache": tmp_path / "cache.npz", "no_verify": True}
    first = export_llm(options(checkpoint, tmp_path / "first", **given, calibration_text=text, calibration_tokens=96))
    again = export_llm(options(checkpoint, tmp_path / "again", **given))
    assert first.archive_path.read_bytes() == again.archive_path.read_bytes()
    assert [row.output_snr_db for row in first.rows] == [row.output_snr_db for row in again.rows]
    with pytest.raises(T2NErrorInvalidArgument, match=r"cache.npz' was made with other calibration data"):
        export_llm(options(checkpoint, tmp_path / "other", **given, calibration_text=text, calibration_tokens=95))
    assert not (tmp_path / "other").exists()


def test_options_of_calibration_are_checked(text, tmp_path):
    made = {"export_dirpath": tmp_path / "out", "model_slug": "no/such"}
    with pytest.raises(T2NErrorInvalidArgument, match="not both"):
        LlmOptions(**made, calibration_text=text, calibration_npz=text)
    with pytest.raises(T2NErrorInvalidArgument, match="calibration_tokens: 1 is not a number from 2 on"):
        LlmOptions(**made, calibration_tokens=1)
    with pytest.raises(T2NErrorNotFoundFile, match=r"calibration_npz: .*none\.npz does not exist"):
        LlmOptions(**made, calibration_npz=tmp_path / "none.npz")
    assert LlmOptions(**made, calibration_cache=tmp_path / "new").calibration_cache == tmp_path / "new"


def test_windows_are_no_longer_than_the_context(checkpoint, text, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from torch_to_nnef.llm_tract.calibration import calibration_of

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    given = options(checkpoint, tmp_path / "out", calibration_text=text, calibration_tokens=100)
    calibration = calibration_of(given, model, tokenizer, 32)
    assert [batch.kwargs["input_ids"].shape[1] for batch in (*calibration.learn, *calibration.held_out)] == [
        32,
        32,
        32,
        4,
    ]
    with torch.no_grad():
        calibration.learn[0](model)
    with pytest.raises(T2NErrorInvalidArgument, match="the model has none: pass --calibration-npz"):
        calibration_of(given, model, None, 32)


@pytest.mark.parametrize(
    "family", ["mixtral (experts)", "gpt2 (Conv1D)", "smollm (tied)", "gemma4, text (shared caches)"]
)
def test_block_by_block_is_the_whole_model(family, monkeypatch):
    """Inputs of every weight are the same whether blocks are skipped or everything runs each time."""
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr("torch_to_nnef.quantize.sequence._longest_chain", lambda model, targets: (model,))
        model = model_of(config_of(family))
        generator = torch.Generator().manual_seed(0)
        batches = [
            {"input_ids": torch.randint(VOCABULARY, (1, 12), generator=generator), "use_cache": False} for _ in range(2)
        ]
        uses = {name: use for name, p in model.named_parameters() if (use := use_of(model, name, p))}
        known = {}

        def encode(rows, name, statistics, known=known):
            known[name] = statistics
            return quantize_q40(rows, name=name)

        quantize_calibrated_(model, encode, as_calibration(batches), selection=Selection(uses=uses), method="q40")
        assert len(known) == len(uses)
        found.append(known)
    assert list(found[0]) == list(found[1])
    for name, statistics in found[0].items():
        for field in ("hessian", "drift_square", "frequency"):
            one, other = getattr(statistics.learn, field), getattr(found[1][name].learn, field)
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max())), name


def use_of(model, name, parameter):
    """As the captured graph would say."""
    module = model.get_submodule(name.rpartition(".")[0])
    if parameter.dim() == 3:
        return frozenset({Use.EXPERTS})
    if parameter.dim() != 2:
        return None
    if isinstance(module, torch.nn.Embedding):
        return frozenset({Use.EMBEDDING})
    return frozenset({Use.MATMUL if type(module).__name__ == "Conv1D" else Use.LINEAR})
