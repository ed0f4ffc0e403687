"""Checkpoints in every form, found and loaded: the same model comes out; what is wrong is said before anything is computed."""

import json
import shutil
import socket
import warnings

import pytest
import torch
from tiny import tiny_gguf, tiny_llama, tiny_model, tiny_tokenizer

from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorNotImplemented,
    T2NErrorRuntime,
)
from torch_to_nnef.llm_tract.checkpoint import Checkpoint
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.tensor.offload import OffloadedTensor

IDS = torch.arange(5, 14)[None]


def find(**options):
    return Checkpoint.find(LlmOptions(export_dirpath="unused", **options))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def single(tmp_path_factory, model):
    return tiny_llama(tmp_path_factory.mktemp("single") / "tiny", model)


@pytest.fixture
def copied(single, tmp_path):
    return shutil.copytree(single, tmp_path / "copied")


@pytest.fixture
def sharded(tmp_path, model):
    return tiny_llama(tmp_path / "sharded", model, max_shard_size="100KB")


@pytest.fixture
def pickled(copied, model):
    (copied / "model.safetensors").unlink()
    torch.save(model.state_dict(), copied / "pytorch_model.bin")
    return copied


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, single):
    """A cache of the hub with `someone/tiny`, as a download leaves it; every connection is refused."""
    root = tmp_path / "cache" / "models--someone--tiny"
    snapshot = root / "snapshots" / ("a" * 40)
    shutil.copytree(single, snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)

    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return snapshot


@pytest.mark.parametrize("form", ["single", "sharded", "pickled"])
def test_a_folder_gives_the_model_that_was_saved(request, form, model):
    folder = request.getfixturevalue(form)
    checkpoint = find(local_dir=folder)
    assert checkpoint.name == folder.name
    assert checkpoint.config.model_type == "llama"
    assert checkpoint.dtype == torch.float32
    assert checkpoint.eos_ids == (2,)
    assert checkpoint.nbytes == sum(file.stat().st_size for file in checkpoint.files)
    assert checkpoint.bytes_in_memory(torch.float16) == 2 * sum(p.numel() for p in model.parameters())
    loaded = checkpoint.load()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded), logits(model))
    assert checkpoint.tokenizer()("The capital").input_ids == tiny_tokenizer()("The capital").input_ids


def test_nothing_but_the_config_is_read_to_find_a_checkpoint(copied):
    (copied / "model.safetensors").write_bytes(b"no weights")
    assert find(local_dir=copied).config.hidden_size == 64


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    checkpoint = find(local_dir=tiny_llama(tmp_path / "half", tiny_model(dtype=torch.bfloat16)))
    assert checkpoint.dtype == checkpoint.load().dtype == torch.bfloat16
    assert checkpoint.load(torch.float16).dtype == torch.float16


def test_a_config_without_dtype_leaves_it_to_the_weights(tmp_path):
    folder = tiny_llama(tmp_path / "half", tiny_model(dtype=torch.float16))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert find(local_dir=folder).dtype == torch.float16


def test_a_dtype_we_do_not_compute_in_has_to_be_converted(tmp_path):
    checkpoint = find(local_dir=tiny_llama(tmp_path / "double", tiny_model(dtype=torch.float64)))
    with pytest.raises(T2NErrorNotImplemented, match=r"float64.*-dt"):
        checkpoint.load()
    assert checkpoint.load(torch.float32).dtype == torch.float32


def test_the_ids_that_end_a_text_are_those_of_the_generation_config(copied):
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert find(local_dir=copied).eos_ids == (2, 5)


def test_a_pickle_with_code_is_refused(pickled, tmp_path):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (marker.write_text, ("code of the checkpoint ran",))

    torch.save({"model.embed_tokens.weight": Hostile()}, pickled / "pytorch_model.bin")
    with pytest.raises(T2NErrorRuntime, match="cannot load copied"):
        find(local_dir=pickled).load()
    assert not marker.exists()


def test_code_of_a_checkpoint_does_not_run_unless_asked_for(copied):
    config = json.loads((copied / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (copied / "config.json").write_text(json.dumps(config | own))
    (copied / "own.py").write_text("raise SystemExit('code of the checkpoint ran')")
    with pytest.raises(T2NErrorRuntime, match="trust_remote_code"):
        find(local_dir=copied)


def test_weights_that_lack_are_not_left_random(copied):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(T2NErrorRuntime, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        find(local_dir=copied).load()


def test_weights_of_another_shape_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(T2NErrorRuntime, match="up_proj"):
        find(local_dir=copied).load()


def test_a_shard_that_lacks_is_named(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(T2NErrorNotFoundFile, match="model-00002-of-00005"):
        find(local_dir=sharded).load()


def test_an_index_does_not_lead_out_of_its_folder(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(T2NErrorInconsistentTensor, match="outside"):
        find(local_dir=sharded).load()


def test_quantized_checkpoints_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(T2NErrorNotImplemented, match="gptq"):
        find(local_dir=copied)


@pytest.mark.parametrize(
    ("break_it", "error", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), T2NErrorNotFoundFile, r"no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), T2NErrorRuntime, "cannot read the config"),
        (lambda folder: (folder / "model.safetensors").unlink(), T2NErrorNotFoundFile, "has no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1"), T2NErrorRuntime, "cannot load copied"),
    ],
)
def test_what_lacks_or_is_broken_is_said(copied, break_it, error, match):
    break_it(copied)
    with pytest.raises(error, match=match) as caught:
        find(local_dir=copied).load()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_tokenizer_loads_all_the_same(copied):
    for file in copied.glob("*token*"):
        file.unlink()
    checkpoint = find(local_dir=copied)
    with pytest.raises(T2NErrorRuntime, match="cannot load the tokenizer of copied"):
        checkpoint.tokenizer()
    assert checkpoint.load() is not None


# GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, model):
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.mark.parametrize("named", [True, False], ids=["file", "folder"])
def test_a_gguf_gives_model_and_tokenizer(gguf, named, model):
    checkpoint = find(local_dir=gguf if named else gguf.parent)
    assert checkpoint.gguf == "tiny.gguf"
    assert checkpoint.eos_ids == (2,)
    assert checkpoint.dtype == torch.float32
    expected = tiny_model()
    expected.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})
    # eps went through f32.
    torch.testing.assert_close(logits(checkpoint.load()), logits(expected), atol=1e-5, rtol=1e-5)
    ours, theirs = checkpoint.tokenizer(), tiny_tokenizer()
    assert ours("The capital of").input_ids == theirs("The capital of").input_ids
    assert ours.chat_template == theirs.chat_template


def test_of_several_ggufs_one_has_to_be_named(gguf, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf, tmp_path / name)
    with pytest.raises(T2NErrorInvalidArgument, match=r"2 GGUF files.*a\.gguf, b\.gguf"):
        find(local_dir=tmp_path)
    assert find(local_dir=tmp_path / "b.gguf").name == "b"


def test_a_gguf_beside_safetensors_is_meant_only_if_named(gguf, copied):
    shutil.copy(gguf, copied / "tiny.gguf")
    assert find(local_dir=copied).gguf is None
    assert find(local_dir=copied / "tiny.gguf").gguf == "tiny.gguf"


# Adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, single):
    """(folder of the adapter, logits of the model it was merged into by peft)."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    base.name_or_path = str(single)
    how = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(1)
        adapter = get_peft_model(base, LoraConfig(init_lora_weights=False, **how))
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    adapter.save_pretrained(folder)
    return folder, logits(adapter.merge_and_unload())


def test_an_adapter_is_merged_into_the_base_it_names(adapted):
    folder, expected = adapted
    checkpoint = find(local_dir=folder, merge_peft=True)
    assert checkpoint.name == "adapter"
    loaded = checkpoint.load()
    assert torch.equal(logits(loaded), expected)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in loaded.named_modules())


def test_an_adapter_is_merged_into_the_model_that_is_named(adapted, single, model):
    folder, expected = adapted
    merged = logits(find(local_dir=single, merge_peft=str(folder)).load())
    assert torch.equal(merged, expected)
    assert not torch.allclose(merged, logits(model), atol=0.1)


def test_the_base_may_lie_beside_the_adapter(adapted, single, tmp_path):
    folder = shutil.copytree(adapted[0], tmp_path / "adapter")
    shutil.copytree(single, tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../base"}))
    assert find(local_dir=folder, merge_peft=True).folder.resolve() == tmp_path / "base"


def test_an_adapters_own_tokenizer_counts(adapted, single, tmp_path):
    folder = shutil.copytree(adapted[0], tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "the adapter's"
    tokenizer.save_pretrained(folder)
    assert find(local_dir=single, merge_peft=str(folder)).tokenizer().chat_template == "the adapter's"


def test_an_adapter_beside_weights_is_not_loaded_unasked(adapted, copied):
    for file in adapted[0].glob("adapter_*"):
        shutil.copy(file, copied / file.name)
    with pytest.raises(T2NErrorInvalidArgument, match="is a PEFT adapter: pass -mp"):
        find(local_dir=copied)
    with pytest.raises(T2NErrorInvalidArgument, match="is a PEFT adapter: merge that one first"):
        find(local_dir=copied, merge_peft=str(adapted[0]))


def test_adapters_are_not_mistaken(adapted, single, tmp_path):
    folder = shutil.copytree(adapted[0], tmp_path / "adapter")
    with pytest.raises(T2NErrorInvalidArgument, match="is a PEFT adapter: pass -mp"):
        find(local_dir=folder)
    with pytest.raises(T2NErrorInvalidArgument, match="is no PEFT adapter"):
        find(local_dir=single, merge_peft=True)
    with pytest.raises(T2NErrorInvalidArgument, match="is no PEFT adapter"):
        find(local_dir=folder, merge_peft=str(single))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(T2NErrorNotFoundFile, match="has no weights"):
        find(local_dir=folder, merge_peft=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(T2NErrorInvalidArgument, match="does not name its base"):
        find(local_dir=folder, merge_peft=True)


# Where weights are held


def test_weights_that_cannot_stay_on_disk_are_refused_there(adapted, pickled):
    with pytest.raises(T2NErrorNotImplemented, match=r"cannot stay on disk.*safetensors"):
        find(local_dir=pickled).load(device_map="t2n_offload_disk")
    with pytest.raises(T2NErrorNotImplemented, match=r"cannot stay on disk.*adapter"):
        find(local_dir=adapted[0], merge_peft=True).load(device_map="t2n_offload_disk")


def test_weights_stay_on_disk_if_asked_for(sharded, model):
    loaded = find(local_dir=sharded).load(device_map="t2n_offload_disk")
    assert isinstance(loaded.lm_head.weight, OffloadedTensor)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))


def test_auto_holds_in_memory_what_takes_half_of_it(single, monkeypatch):
    from types import SimpleNamespace

    checkpoint = find(local_dir=single)
    needed = checkpoint.bytes_in_memory(torch.float32)
    for free, offloads in ((2 * needed, False), (2 * needed - 1, True)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert checkpoint._offloads("t2n_auto", torch.float32) is offloads


def test_a_container_may_have_less_than_is_free(single, monkeypatch, tmp_path):
    checkpoint, limit = find(local_dir=single), tmp_path / "memory.max"
    monkeypatch.setattr("torch_to_nnef.llm_tract.checkpoint._CONTAINER_LIMIT", limit)
    for text, offloads in (("max\n", False), ("400000\n", True)):
        limit.write_text(text)
        assert checkpoint._offloads("t2n_auto", torch.float32) is offloads


# The hub


def test_a_slug_in_the_cache_needs_no_hub(hub_cache, model):
    checkpoint = find(model_slug="someone/tiny")
    assert checkpoint.name == "someone/tiny"
    assert checkpoint.folder == hub_cache
    assert torch.equal(logits(checkpoint.load()), logits(model))


def test_a_slug_that_is_not_in_the_cache_is_said_so(hub_cache):
    with pytest.raises(T2NErrorNotFoundFile, match="not in the cache of the hub, and the hub cannot be reached"):
        find(model_slug="someone/else")


def test_a_slug_whose_weights_are_not_in_the_cache_is_said_so(hub_cache):
    (hub_cache / "model.safetensors").unlink()
    checkpoint = find(model_slug="someone/tiny")
    with pytest.raises(T2NErrorNotFoundFile, match="someone/tiny"):
        checkpoint.load()


@pytest.mark.parametrize("slug", ["a//b", "a b", "../escape"])
def test_what_is_no_slug_is_refused(slug, hub_cache):
    with pytest.raises(T2NErrorNotFoundFile):
        find(model_slug=slug)


def test_a_gguf_of_a_repository_is_named_behind_it(hub_cache, gguf):
    shutil.copy(gguf, hub_cache / "tiny.gguf")
    assert find(model_slug="someone/tiny/tiny.gguf").gguf == "tiny.gguf"
    with pytest.raises(T2NErrorNotFoundFile, match=r"no GGUF file 'other\.gguf'"):
        find(model_slug="someone/tiny/other.gguf")
