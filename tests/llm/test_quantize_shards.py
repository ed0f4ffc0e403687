"""`t2n quantize-shards`: the same bytes whoever does the work and however often it stops, and what `-d` makes of them."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_streaming import CONFIGS
from tiny import tiny_llama, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from torch_to_nnef.cli.main import app
from torch_to_nnef.exceptions import (
    T2NErrorImpossibleQuantization,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)
from torch_to_nnef.llm_tract import shard_work, shards
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.shard_list import put, sealed
from torch_to_nnef.llm_tract.shards import quantize_shards
from torch_to_nnef.llm_tract.streaming import load_offloaded
from torch_to_nnef.tensor.quant import QTensor, load_safetensors

CHILD = Path(__file__).with_name("killed_shards.py")
MANIFEST = "quantize-shards.json"
FILES = 6


def options(checkpoint, out, **changed):
    return LlmOptions(local_dir=checkpoint, export_dirpath=out, **{"compression_method": "q40", **changed})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "model"
    return tiny_llama(folder, tiny_model(dtype=torch.bfloat16), max_shard_size="100KB")


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    seen = []
    done = quantize_shards(options(checkpoint, folder), files=FILES, progress=lambda *step: seen.append(step))
    assert done.complete
    assert done.bytes_after == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert seen[-1][0] == seen[-1][1] == done.bytes_before
    return folder


@pytest.fixture
def begun(packed, tmp_path):
    """A folder with the work list alone: no model has to be captured again."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(packed / MANIFEST, folder)
    return folder


def archive(folder, export, **changed):
    export_llm(options(folder, export, no_verify=True, **changed))
    return (export / "model" / "model.nnef.tgz").read_bytes()


def test_the_archive_is_that_of_a_direct_export(checkpoint, packed, tmp_path):
    direct = archive(checkpoint, tmp_path / "direct")
    assert archive(packed, tmp_path / "on disk", compression_method=None, device_map="t2n_offload_disk") == direct
    assert {path.name for path in packed.iterdir()} >= {"config.json", "tokenizer.json", "generation_config.json"}
    assert not [path.name for path in packed.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tied", "gpt2", "experts", "neox"])
def test_families(family, tmp_path):
    """Weights that share, lie transposed, or are joined by transformers; in a folder of the same name, which the archive says."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family])
    tiny_llama(tmp_path / "a" / "model", model.eval(), max_shard_size="60KB")
    done = quantize_shards(options(tmp_path / "a" / "model", tmp_path / "b" / "model"), files=3)
    assert done.complete
    assert done.bytes_after < 0.4 * done.bytes_before
    direct = archive(tmp_path / "a" / "model", tmp_path / "direct")
    assert archive(tmp_path / "b" / "model", tmp_path / "packed", compression_method=None) == direct


def test_packed_weights_load_packed(checkpoint, packed):
    model, wanted = load_offloaded(packed), load_offloaded(checkpoint)
    names = {name for name, weight in model.named_parameters() if isinstance(weight, QTensor)}
    assert names == {name for name, weight in wanted.named_parameters() if weight.dim() == 2}
    assert "quantization_config" not in model.config.to_dict()
    for name, weight in model.named_parameters():
        if name not in names:
            assert torch.equal(weight, wanted.get_parameter(name))


def test_several_workers_write_what_one_writes(checkpoint, packed, begun):
    for number in (3, 1):
        assert not quantize_shards(options(checkpoint, begun), (number, 3), FILES).complete
    with pytest.raises(T2NErrorNotFoundFile, match=r"config\.json.* has not finished it"):
        export_llm(options(begun, begun / "export"))
    assert quantize_shards(options(checkpoint, begun), (2, 3), FILES).complete
    assert content(begun) == content(packed)


def test_what_is_done_is_not_done_again(checkpoint, packed, begun, monkeypatch):
    shutil.copytree(packed, begun, dirs_exist_ok=True)
    monkeypatch.setattr(shards, "_planned", None)
    monkeypatch.setattr("torch_to_nnef.llm_tract.shard_work._packed", None)
    assert quantize_shards(options(checkpoint, begun), files=FILES).complete
    assert content(begun) == content(packed)


@pytest.mark.parametrize("where", ["model-*", ".t2n-work/*", "config.json", "model.safetensors.index.json"])
def test_what_was_cut_or_deleted_is_made_again(checkpoint, packed, begun, monkeypatch, where):
    if where.startswith("."):
        monkeypatch.setattr(shard_work, "put_in_place", lambda *_: (_ for _ in ()).throw(T2NErrorRuntime("full")))
        with pytest.raises(T2NErrorRuntime):
            quantize_shards(options(checkpoint, begun), files=FILES)
        monkeypatch.undo()
    else:
        shutil.copytree(packed, begun, dirs_exist_ok=True)
    for path, keep in zip(sorted(begun.glob(where)), (0, 40, -1), strict=False):
        whole = path.read_bytes()
        path.write_bytes(whole[:keep]) if path.suffix == ".safetensors" else path.unlink()
    assert quantize_shards(options(checkpoint, begun), files=FILES).complete
    assert content(begun) == content(packed)


def killed(checkpoint, packed, folder, step):
    done = subprocess.run(
        [sys.executable, str(CHILD), str(checkpoint), str(packed), str(folder), str(FILES), str(step)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1])


def test_all_workers_may_complete_the_folder_at_once(tmp_path):
    text = "x" * 100_000

    def complete(_):
        put(tmp_path, "config.json", text)
        shutil.rmtree(tmp_path / ".t2n-work", ignore_errors=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(complete, range(200)))
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("step", ["_packed", "save_safetensors", "offloaded_tensors"])
def test_a_worker_that_is_overtaken_is_done_too(checkpoint, packed, begun, monkeypatch, step):
    def overtaken(*_, **__):
        shutil.copytree(packed, begun, dirs_exist_ok=True)
        raise T2NErrorRuntime("the work folder is gone")

    monkeypatch.setattr(shard_work, step, overtaken)
    assert quantize_shards(options(checkpoint, begun), files=FILES).complete
    assert content(begun) == content(packed)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_anywhere_it_goes_on(checkpoint, packed, tmp_path):
    assert killed(checkpoint, packed, tmp_path, step=29) >= 7


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_every_call_it_goes_on(checkpoint, packed, tmp_path):
    assert killed(checkpoint, packed, tmp_path, step=1) >= 150


@pytest.mark.parametrize(
    ("changed", "files", "match"),
    [
        ({"compression_method": "min_max_q4_0"}, FILES, "other options \\(method\\)"),
        ({"exclude": ("*head*",)}, FILES, "other options \\(exclude\\)"),
        ({}, 7, "other options \\(files\\)"),
    ],
)
def test_other_options_are_refused(checkpoint, begun, changed, files, match):
    with pytest.raises(T2NErrorInvalidArgument, match=match):
        quantize_shards(options(checkpoint, begun, **changed), files=files)


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("change", ["header", "values"])
def test_another_checkpoint_is_refused(checkpoint, packed, begun, tmp_path, complete, change):
    if complete:
        shutil.copytree(packed, begun, dirs_exist_ok=True)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    path = sorted(other.glob("*.safetensors"))[1]
    if change == "header":
        save_file(load_file(path), path, metadata={"format": "pt", "other": ""})
    else:  # as the next step of a training has them
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(T2NErrorInvalidArgument, match=f"another checkpoint: {path.name} changed"):
        quantize_shards(options(other, begun), files=FILES)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"compression_method": "q40_gptq"}, "learns from data"),
        ({"compression_method": "nothing"}, "no compression method 'nothing'"),
        ({"tensor_type": ("*=q40_awq",)}, "learns from data"),
    ],
)
def test_methods_that_cannot(checkpoint, tmp_path, changed, match):
    with pytest.raises(T2NErrorInvalidArgument, match=match):
        quantize_shards(options(checkpoint, tmp_path / "out", **changed))
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot(checkpoint, packed, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(T2NErrorInvalidArgument, match="something else"):
        quantize_shards(options(checkpoint, tmp_path))
    with pytest.raises(T2NErrorInvalidArgument, match="packed already"):
        quantize_shards(options(packed, tmp_path / "again"))
    for share in ((0, 1), (2, 1), (1, 0)):
        with pytest.raises(T2NErrorInvalidArgument, match="i/n"):
            quantize_shards(options(checkpoint, tmp_path / "out"), share)


def edited(edit, seal=sealed):
    def damage(text):
        stored = json.loads(text)
        edit(stored, stored["outputs"][0]["entries"][0])
        return seal(stored)

    return damage


DAMAGES = {
    "cut": lambda text: text[:-9],
    "by hand": edited(lambda work, entry: entry.update(method=None), json.dumps),
    "not sealed": edited(lambda work, entry: work.pop("digest"), json.dumps),
    "name": edited(lambda work, entry: entry.update(name=1)),
    "no object": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "version": edited(lambda work, entry: work.update(version=2)),
    "no outputs": edited(lambda work, entry: work.pop("outputs")),
    "output elsewhere": edited(lambda work, entry: work["outputs"][0].update(name="../x.safetensors")),
    "output of another kind": edited(lambda work, entry: work["outputs"][0].update(name="config.json")),
    "source elsewhere": edited(lambda work, entry: entry["extents"][0].__setitem__(0, "/etc/x.safetensors")),
    "negative": edited(lambda work, entry: entry["extents"][0].__setitem__(1, -1)),
    "too many bytes": edited(lambda work, entry: entry["extents"][0].__setitem__(2, 1 << 64)),
    "too large": edited(lambda work, entry: entry.update(shape=[1 << 63, 1 << 63])),
    "no size": edited(lambda work, entry: entry.update(shape=[-1])),
    "fraction": edited(lambda work, entry: entry.update(shape=[0.5])),
    "dtype": edited(lambda work, entry: entry.update(dtype="F4")),
    "use": edited(lambda work, entry: entry.update(uses=["anything"])),
    "more": edited(lambda work, entry: entry.update(more=1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_work_list_is_refused(checkpoint, begun, damage):
    path = begun / MANIFEST
    path.write_text(DAMAGES[damage](path.read_text()))
    with pytest.raises(T2NErrorInconsistentTensor, match="begin anew with --force"):
        quantize_shards(options(checkpoint, begun), files=FILES)


def test_force_is_not_for_one_of_several(checkpoint, packed, begun):
    shutil.copytree(packed, begun, dirs_exist_ok=True)
    with pytest.raises(T2NErrorInvalidArgument, match=r"--shard 2/3: each worker would remove what others did"):
        quantize_shards(options(checkpoint, begun, ignore_already_exist_dir=True), (2, 3), FILES)
    assert content(begun) == content(packed)


def test_force_begins_anew_after_a_damaged_work_list(checkpoint, packed, begun):
    (begun / MANIFEST).write_text("{")
    stale = next(packed.glob("model-*.safetensors")).name
    (begun / stale).write_bytes(b"of an earlier run")
    assert quantize_shards(options(checkpoint, begun, ignore_already_exist_dir=True), files=FILES).complete
    assert content(begun) == content(packed)


def test_force_spares_other_checkpoints(checkpoint, tmp_path):
    """Neither the source itself, nor one that happens to lie in the folder, whose files would pass for work that is done."""
    source, other = tmp_path / "source", tmp_path / "other"
    for folder in (source, other):
        shutil.copytree(checkpoint, folder)
        before = content(folder)
        with pytest.raises(T2NErrorInvalidArgument, match="another folder"):
            quantize_shards(options(source, folder, ignore_already_exist_dir=True), files=FILES)
        assert content(folder) == before


def test_force_loses_nothing_to_a_call_that_is_refused(checkpoint, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "model")
    for wrong in ({"local_dir": tmp_path / "none"}, {"compression_method": "unknown"}):
        with pytest.raises((T2NErrorInvalidArgument, T2NErrorNotFoundFile)):
            quantize_shards(replace(options(checkpoint, folder, ignore_already_exist_dir=True), **wrong), files=FILES)
        assert content(folder) == content(packed)


def test_sources_that_end_early_are_noticed(checkpoint, begun):
    path = begun / MANIFEST
    path.write_text(edited(lambda work, entry: entry["extents"][0].__setitem__(1, 1 << 62))(path.read_text()))
    with pytest.raises(T2NErrorInconsistentTensor, match="ends before"):
        quantize_shards(options(checkpoint, begun), files=FILES)


def test_a_weight_that_cannot_be_packed_is_named_and_the_rest_is_kept(checkpoint, packed, begun, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    work = json.loads((begun / MANIFEST).read_text())
    entry = next(e for e in work["outputs"][3]["entries"] if e["method"])
    file, offset, _ = entry["extents"][0]
    with (broken / file).open("r+b") as opened:
        opened.seek(offset)
        value = opened.read(2)
        opened.seek(offset)
        opened.write(b"\xc0\x7f")
    with pytest.raises(T2NErrorImpossibleQuantization, match=entry["name"]):
        quantize_shards(options(broken, begun), files=FILES)
    assert len(list(begun.glob("*.safetensors"))) == 3
    with (broken / file).open("r+b") as opened:
        opened.seek(offset)
        opened.write(value)
    assert quantize_shards(options(broken, begun), files=FILES).complete
    assert content(begun) == content(packed)


def test_the_command(checkpoint, packed, begun):
    run = CliRunner().invoke
    arguments = ["quantize-shards", str(checkpoint), str(begun), "--files", str(FILES), "--json"]
    for number in (1, 2):
        done = run(app, [*arguments, "--shard", f"{number}/2"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["complete"] is (number == 2)
    assert content(begun) == content(packed)
    for wrong in (["--shard", "3/2"], ["--shard", "x"], ["-c", "q40_gptq"], ["--tensor-type", "x"]):
        assert run(app, [*arguments, *wrong]).exit_code == 2


@pytest.mark.slow
def test_choices_of_weights(tmp_path):
    """As `t2n_export_llm_to_tract` takes them; and --force begins anew."""
    checkpoint = tiny_llama(tmp_path / "model", tiny_model(intermediate_size=80))
    chosen = {"tensor_type": ("*q_proj*=f16",), "exclude": ("lm_head",), "fallback": "pad"}
    done = quantize_shards(options(checkpoint, tmp_path / "out", **chosen), files=1)
    assert done.complete
    found = load_safetensors(tmp_path / "out" / "model-00001-of-00001.safetensors")
    kinds = {name.removeprefix("model.layers.0."): type(tensor).__name__ for name, tensor in found.items()}
    assert kinds["self_attn.q_proj.weight"] == "QTensorHalf"
    assert kinds["lm_head.weight"] == "Tensor"
    assert kinds["mlp.down_proj.weight"] == "QTensorTractPadded"
    assert kinds["self_attn.k_proj.weight"] == "QTensorTractScaleOnly"
    again = options(checkpoint, tmp_path / "out", ignore_already_exist_dir=True)
    done = quantize_shards(again, files=2)
    assert done.complete
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == done.files > 1
    assert tiny_tokenizer().get_vocab() == hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
