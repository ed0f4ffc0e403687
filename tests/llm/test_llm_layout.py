"""The folder of an export: what lies where, what `modes.json` and the properties say, and how it takes its place."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorRuntime
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.llm_tract.causal import Signature, as_step
from torch_to_nnef.llm_tract.checkpoint import Checkpoint
from torch_to_nnef.llm_tract.layout import SCENARIOS, Layout, modes, properties, replaced_folder
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.scenarios import scenarios
from torch_to_nnef.quantize.rows import TensorRow

SIGNATURE = Signature(((2, 16, 16), (2, 16, 16)), 128)
MODES = {"name": "tiny", "model_type": "llama", "vocabulary": 320, "dtype": torch.float32, "eos_ids": (2,)}
DEEP = {
    *(
        "README.md",
        "modes.json",
        "report.html",
        "report.md",
        "report.json",
        "model/config.json",
        "model/model.nnef.tgz",
    ),
    *(f"tests/{scenario}_{side}.npz" for scenario in SCENARIOS for side in ("inputs", "outputs")),
    *(f"tokenizer/{name}" for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")),
}


class FakeReport:
    def to_json(self, path):
        path.write_text("{}")

    def to_html(self, path):
        path.write_text("<html>")

    def to_markdown(self, path):
        path.write_text("# Report")


def options(folder, **changes):
    return LlmOptions(export_dirpath=folder, model_slug="owner/name", **changes)


def fill(layout, tokenizer=None, runs=()):
    layout.archive.write_bytes(b"archive")
    layout.write_tests(runs)
    layout.write(FakeReport(), "# Card", modes(SIGNATURE, **MODES), tiny_config(), tokenizer)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def names(folder):
    return [path.name for path in folder.iterdir()]


def fail(how, error, meanwhile=lambda: None):
    """An export that writes all its files, and then fails."""
    with replaced_folder(how) as layout:
        fill(layout)
        meanwhile()
        if error:
            raise error


@pytest.fixture(scope="module")
def runs():
    step = as_step(tiny_model(), SIGNATURE)
    return scenarios(step, SIGNATURE, SIGNATURE.sample(320, torch.float32), list(range(6, 20)))


@pytest.mark.parametrize("struct", ["deep", "flat"])
def test_what_an_export_leaves(tmp_path, runs, struct):
    with replaced_folder(options(tmp_path / "out", export_dir_struct=struct)) as layout:
        assert not (tmp_path / "out").exists()
        fill(layout, tiny_tokenizer(), runs)
    assert names(tmp_path) == ["out"]
    assert files(tmp_path / "out") == (DEEP if struct == "deep" else {Path(name).name for name in DEEP})
    layout = Layout.of(tmp_path / "out")
    assert layout == Layout(tmp_path / "out", struct)
    from transformers import AutoConfig, AutoTokenizer

    assert AutoTokenizer.from_pretrained(layout.tokenizer)("The capital").input_ids == [302, 304]
    assert AutoConfig.from_pretrained(layout.config.parent).hidden_size == 64
    for run in runs:
        for side, arrays in zip(("inputs", "outputs"), run.arrays, strict=True):
            with np.load(layout.test(run.name, side)) as stored:
                assert list(stored) == list(arrays)
                assert all(np.array_equal(stored[name], array) for name, array in arrays.items())
    where = layout.read_modes()["files"]
    assert {kind: layout.folder / path for kind, path in where.items()} == {
        "archive": layout.archive,
        "config": layout.config,
        "tokenizer": layout.tokenizer,
    }


def test_the_same_export_leaves_the_same_bytes(tmp_path, runs):
    for name in ("a", "b"):
        with replaced_folder(options(tmp_path / name)) as layout:
            fill(layout, tiny_tokenizer(), runs)
    for name in files(tmp_path / "a"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes(), name
        assert str(tmp_path).encode() not in content, name


def test_without_a_tokenizer_there_is_none(tmp_path):
    with replaced_folder(options(tmp_path / "out")) as layout:
        fill(layout)
    assert not any("token" in name for name in files(tmp_path / "out"))
    assert Layout.of(tmp_path / "out").read_modes()["files"]["tokenizer"] is None


# Its place


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_an_export_that_fails(tmp_path, error):
    with pytest.raises(error):
        fail(options(tmp_path / "not" / "yet" / "out"), error)
    assert names(tmp_path) == []


def test_a_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    entered = False
    with pytest.raises(T2NErrorInvalidArgument, match="-iaed"), replaced_folder(options(tmp_path / "out")):
        entered = True
    assert not entered


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    def another():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "another.txt").write_text("mine")

    with pytest.raises(T2NErrorInvalidArgument, match="exists"):
        fail(options(tmp_path / "out"), None, another)
    assert files(tmp_path) == {"out/another.txt"}


@pytest.mark.parametrize("allowed", [True, False])
def test_a_file_is_never_replaced(tmp_path, allowed):
    (tmp_path / "out").write_text("mine")
    how = options(tmp_path / "out", ignore_already_exist_dir=allowed)
    with pytest.raises(T2NErrorInvalidArgument, match="is not a folder"), replaced_folder(how):
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def earlier(tmp_path, runs):
    """A deep export with a tokenizer, among files of the user."""
    folder = tmp_path / "out"
    with replaced_folder(options(folder)) as layout:
        fill(layout, tiny_tokenizer(), runs)
    (folder / "notes.txt").write_text("mine")
    (folder / "model" / "notes.txt").write_text("mine")
    (folder / "mine" / "deep").mkdir(parents=True)
    (folder / "mine" / "deep" / "README.md").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    return folder


MINE = {"notes.txt", "model/notes.txt", "mine/deep/README.md", "link"}


def test_replacing_an_export_keeps_what_is_of_others(earlier):
    with replaced_folder(options(earlier, export_dir_struct="flat", ignore_already_exist_dir=True)) as layout:
        fill(layout)
        before = files(earlier)
    assert before == DEEP | MINE
    # The tokenizer too is gone: it was that of another model.
    expected = {"README.md", "config.json", "model.nnef.tgz", "modes.json", "report.html", "report.md", "report.json"}
    assert files(earlier) == MINE | expected
    assert {(earlier / name).read_text() for name in MINE} == {"mine"}
    assert (earlier / "link").readlink() == Path("notes.txt")
    assert names(earlier.parent) == ["out"]


def test_an_export_that_fails_leaves_what_was_there(earlier):
    before = {name: (earlier / name).read_bytes() for name in files(earlier)}
    with pytest.raises(RuntimeError):
        fail(options(earlier, ignore_already_exist_dir=True), RuntimeError)
    assert {name: (earlier / name).read_bytes() for name in files(earlier)} == before
    assert names(earlier.parent) == ["out"]


def test_a_folder_that_cannot_be_looked_into_is_not_lost(earlier, monkeypatch):
    look = os.scandir

    def scandir(path):
        if Path(path).name == "mine":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    how = options(earlier, ignore_already_exist_dir=True)
    with pytest.raises(T2NErrorRuntime, match="cannot write"), replaced_folder(how) as layout:
        fill(layout)
    monkeypatch.undo()
    assert files(earlier) == DEEP | MINE


def test_a_link_to_a_folder_stays_one(earlier):
    link = earlier.parent / "link"
    link.symlink_to("out")
    with replaced_folder(options(link, ignore_already_exist_dir=True)) as layout:
        fill(layout)
    assert link.is_symlink()
    assert (earlier / "model" / "model.nnef.tgz").read_bytes() == b"archive"


# What it says


def test_modes_say_how_to_run_the_archive():
    said = modes(SIGNATURE, **MODES)
    assert said["model"] == {
        "name": "tiny",
        "type": "llama",
        "dtype": "f32",
        "vocabulary": 320,
        "context": 128,
        "eos_token_ids": [2],
    }
    assert tuple(said["inputs"]) == SIGNATURE.input_names
    assert tuple(said["outputs"]) == SIGNATURE.output_names
    assert said["inputs"]["input_ids"] == {"dtype": "i64", "shape": [1, "S"]}
    assert said["inputs"]["in_cache_value_1"] == {"dtype": "f32", "shape": [1, 2, "P", 16]}
    assert said["outputs"]["outputs"] == {"dtype": "f32", "shape": [1, 1, 320]}
    assert said["outputs"]["out_cache_key_0"] == {"dtype": "f32", "shape": [1, 2, "S+P", 16]}
    assert said["carried"] == SIGNATURE.carried
    assert set(said["symbols"]) == {"S", "P"}
    assert said["modes"] == {
        "prompt_processing": {"S": {"least": 1, "most": 128}, "P": {"least": 0, "most": 127}},
        "text_generation": {"S": {"least": 1, "most": 1}, "P": {"least": 1, "most": 127}},
    }


@pytest.mark.parametrize(
    ("logits", "rows", "least"),
    [(0, "S", 1), (1, 1, 1), (3, 3, 3), (None, "K", 1)],
    ids=["all", "one", "three", "asked"],
)
def test_modes_say_which_positions_have_logits(logits, rows, least):
    said = modes(Signature(SIGNATURE.layers, None, logits), **MODES | {"dtype": torch.float16})
    assert said["outputs"]["outputs"] == {"dtype": "f16", "shape": [1, rows, 320]}
    assert ("logits_to_keep" in said["inputs"]) is ("K" in said["symbols"]) is (logits is None)
    assert said["modes"]["prompt_processing"] == {"S": {"least": least, "most": None}, "P": {"least": 0, "most": None}}
    # An archive that gives three logits takes no single token.
    assert ("text_generation" in said["modes"]) is (least == 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}'])
def test_modes_that_cannot_be_read_are_refused(tmp_path, text):
    with replaced_folder(options(tmp_path / "out")) as layout:
        fill(layout)
    layout = Layout.of(tmp_path / "out")
    layout.modes.write_text(text)
    with pytest.raises(T2NErrorInvalidArgument, match=r"modes\.json"):
        layout.read_modes()


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(T2NErrorInvalidArgument, match="no folder of an exported language model"):
        Layout.of(tmp_path)


def row(quantized):
    storage = (
        ("q40", 4.5, "min_max_q4_0", 20.0, 0.1, True, None)
        if quantized
        else ("f32", 32.0, None, None, None, False, "x")
    )
    return TensorRow("w", "Linear", (32, 32), "float32", *storage, 4096, 576)


def test_properties_say_what_was_done(tmp_path):
    checkpoint = Checkpoint(name="owner/name", folder=tmp_path, config=tiny_config())
    plain = properties(checkpoint, SIGNATURE, TractNNEF.latest(), torch.float32, None, ())
    assert plain == {
        "model_name": "owner/name",
        "model_type": "llama",
        "dtype": "float32",
        "compression_method": "none",
        "num_logits_to_keep": "1",
        "context": "128",
    }
    target = TractNNEF.latest()
    # Not by the constructor: these options are refused as long as nothing serves them.
    object.__setattr__(target, "force_attention_inner_in_f32", True)
    object.__setattr__(target, "force_norm_in_f32", True)
    rows = [row(quantized=True), row(quantized=True), row(quantized=False)]
    signature = Signature(SIGNATURE.layers, None, None)
    said = properties(checkpoint, signature, target, torch.float16, "min_max_q4_0", rows)
    assert said == {
        "model_name": "owner/name",
        "model_type": "llama",
        "dtype": "float16",
        "compression_method": "min_max_q4_0",
        "compressed_tensors": "2 of 3",
        "computed_in_f32": "attention, normalization",
        "num_logits_to_keep": "dynamic",
    }
    assert str(tmp_path) not in json.dumps(said)
