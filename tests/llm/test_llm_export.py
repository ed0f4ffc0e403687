"""The command's whole way on a tiny model: what it leaves, what it says, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_model
from torch import nn

from torch_to_nnef import TractModel, export
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorIOPytorchTractNotISO
from torch_to_nnef.llm_tract import export as llm_export
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("checkpoints") / "tiny")


def run(checkpoint, folder, **options):
    return export_llm(LlmOptions(**{"export_dirpath": folder, "local_dir": checkpoint, **options}))


def properties(folder):
    return TractModel.load(folder / "model" / "model.nnef.tgz").properties


def test_what_a_compressed_export_leaves(checkpoint, tmp_path):
    options = {"compression_method": "min_max_q4_0_all", "dump_with_tokenizer_and_conf": True}
    report = run(checkpoint, tmp_path / "out", **options, test_display_token_gens=True)
    assert report.ok
    assert report.archive_path == tmp_path / "out" / "model" / "model.nnef.tgz"
    assert [c.name for c in report.archive] == ["export", "prompt", "prompt_with_past", "text_generation"]
    assert report.generation.ok
    assert len(report.generation.tokens) == 32
    float_torch, packed, archive = report.quality.rows
    assert float_torch.kl_mean is None
    assert packed.kl_mean > 0
    assert archive.kl_mean == pytest.approx(packed.kl_mean, rel=1e-3)
    assert all(row.quantized for row in report.rows)
    assert report.totals.ratio > 6
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = ("export", "prompt", "prompt_with_past", "text_generation")
    tests = {f"tests/{name}_{side}.npz" for name in names for side in ("inputs", "outputs")}
    assert left >= {
        *(
            "model/model.nnef.tgz",
            "model/config.json",
            "modes.json",
            "report.json",
            "report.html",
            "report.md",
            "README.md",
        ),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *tests,
    }
    said = properties(tmp_path / "out")
    assert said["compression_method"] == "min_max_q4_0_all"
    assert said["compressed_tensors"] == f"{len(report.rows)} of {len(report.rows)}"
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["quality"]["rows"][2]["kl_mean"] == archive.kl_mean
    assert data["generation"]["ok"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in_cache_key_*" in card
    assert "KL to float" in card
    assert "fn main() -> TractResult<()>" in card
    assert "Texts after" in str(report)


def test_the_tests_it_leaves_hold_in_tract(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out")
    archive = TractModel.load(tmp_path / "out" / "model" / "model.nnef.tgz")
    for inputs in sorted((tmp_path / "out" / "tests").glob("*_inputs.npz")):
        given, expected = (dict(np.load(path)) for path in (inputs, str(inputs).replace("inputs", "outputs")))
        found = archive.run(**given)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=5e-4)


def test_the_same_export_gives_the_same_archive(checkpoint, tmp_path):
    archives = []
    for name in ("a", "b"):
        run(checkpoint, tmp_path / name, compression_method="q40", no_verify=True)
        archives.append((tmp_path / name / "model" / "model.nnef.tgz").read_bytes())
    assert archives[0] == archives[1]


@pytest.mark.parametrize("logits", [0, 3, "dynamic"])
def test_positions_with_logits(checkpoint, tmp_path, logits):
    report = run(checkpoint, tmp_path / "out", num_logits_to_keep=logits, export_dir_struct="flat")
    assert report.ok
    assert (report.generation is None) == (logits == 3), "three tokens at a time are no generation"
    assert bool(report.notes) == (logits == 3)
    assert (tmp_path / "out" / "model.nnef.tgz").exists()


@pytest.mark.parametrize(
    ("options", "dtype", "cache"),
    [
        ({"force_module_dtype": "f16"}, "float16", "float16"),
        ({"force_module_dtype": "f16", "force_inputs_dtype": "f32"}, "float16", "float32"),
        ({"force_module_dtype": "f16", "force_f32_attention": True, "compression_method": "q40"}, "float16", "float16"),
        ({"force_module_dtype": "bf16"}, "float32", "float32"),
    ],
)
def test_number_types(checkpoint, tmp_path, options, dtype, cache):
    report = run(checkpoint, tmp_path / "out", tract_check_io_tolerance="very", **options)
    assert report.ok
    archive = TractModel.load(tmp_path / "out" / "model" / "model.nnef.tgz")
    assert {f.dtype for f in archive.inputs if f.name.startswith("in_cache")} == {cache}
    assert archive.properties["dtype"] == dtype
    assert json.loads((tmp_path / "out" / "modes.json").read_text())["model"]["dtype"] == f"f{cache[-2:]}"


def test_without_a_tokenizer_there_are_no_texts(tmp_path):
    tiny_model().save_pretrained(tmp_path / "bare")
    report = run(tmp_path / "bare", tmp_path / "out")
    assert report.ok
    assert report.generation.ok
    assert report.quality is None
    assert "tokenizer" in report.notes[0]


def test_a_method_of_ones_own(checkpoint, tmp_path, monkeypatch):
    """Found from the current folder; it gets what the contract says, and what it does to the modules is what is exported."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "seen = {}\n"
        "def halve(model, tokenizer, export_dirpath, local_dir):\n"
        "    seen.update(tokenizer=tokenizer, export_dirpath=export_dirpath, local_dir=local_dir)\n"
        "    for layer in model.model.layers:\n"
        "        layer.mlp = nn.Identity()\n"
        "REGISTRY = {'halve': halve}\n"
    )
    monkeypatch.chdir(tmp_path)
    report = run(checkpoint, tmp_path / "out", compression_registry="mine.REGISTRY", compression_method="halve")
    assert report.ok
    assert report.quality.rows[1].kl_mean > 0
    import mine

    assert mine.seen["tokenizer"].decode
    assert mine.seen["export_dirpath"].name == "out"
    assert mine.seen["local_dir"] == checkpoint
    assert report.totals.parameter_bytes_after < report.totals.parameter_bytes_before


def test_a_method_may_return_another_model(checkpoint, tmp_path, monkeypatch):
    other = tiny_model(seed=5)
    registry = {"other": lambda model, **_: other}
    monkeypatch.setattr(llm_export, "dynamic_load_registry", lambda _: registry)
    report = run(checkpoint, tmp_path / "out", compression_method="other")
    assert report.ok
    archive = TractModel.load(tmp_path / "out" / "model" / "model.nnef.tgz")
    ids = torch.tensor([[5, 6, 7]])
    empty = {f.name: np.zeros((1, 2, 0, 16), np.float32) for f in archive.inputs[1:]}
    with torch.no_grad():
        expected = other(ids).logits[:, -1:]
    np.testing.assert_allclose(archive.run(input_ids=ids, **empty)["outputs"], expected, atol=1e-4, rtol=5e-4)


def test_an_unknown_method_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "no-checkpoint").mkdir()
    with pytest.raises(T2NErrorInvalidArgument, match=r"nope.*registry has .*min_max_q4_0"):
        run(tmp_path / "no-checkpoint", tmp_path / "out", compression_method="nope")
    assert not (tmp_path / "out").exists()


def failing(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "step", ["weight_uses", "write_archive", "verify_scenarios", "compare_generation", "model_card"]
)
def test_nothing_is_left_of_an_export_that_ends_early(checkpoint, tmp_path, monkeypatch, step):
    monkeypatch.setattr(llm_export, step, failing)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out", compression_method="q40")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_archive_is_never_left(checkpoint, tmp_path, monkeypatch):
    """The weights of the archive are not those of the model it is compared with."""

    def spoiled(document, *args):
        for variable in document.variables:
            if variable.label.endswith("down_proj.weight"):
                object.__setattr__(variable, "tensor", nn.Parameter(variable.tensor * 1.5))
        return export.write_archive(document, *args)

    monkeypatch.setattr(llm_export, "write_archive", spoiled)
    with pytest.raises(T2NErrorIOPytorchTractNotISO, match="down_proj"):
        run(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
