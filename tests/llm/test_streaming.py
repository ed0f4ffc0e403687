"""A checkpoint left on disk is the model that transformers loads into memory."""

import json
import re

import pytest
import torch
import transformers as hf

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.llm_tract.streaming import load_offloaded
from torch_to_nnef.tensor.offload import OffloadedTensor

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
CONFIGS = {
    "llama": hf.LlamaConfig(**SMALL, num_key_value_heads=2),
    "tied": hf.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "experts": hf.MixtralConfig(**SMALL, **EXPERTS),  # saved expert by expert, joined when loaded
    "neox": hf.GPTNeoXConfig(**SMALL),
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture
def llama(tmp_path):
    hf.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_what_transformers_loads(saved, dtype):
    wanted = hf.AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    found = load_offloaded(saved, dtype=dtype)
    assert type(found) is type(wanted)
    assert not found.training
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    state = wanted.state_dict()
    assert list(state) == list(found.state_dict())
    for name, parameter in found.named_parameters(remove_duplicate=False):
        assert isinstance(parameter, OffloadedTensor), name
        assert parameter.dtype == state[name].dtype
        assert torch.equal(parameter, state[name]), name
    for (name, mine), (_, theirs) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        assert not isinstance(mine, OffloadedTensor)
        assert torch.equal(mine, theirs), name
    ids = torch.arange(12)[None] % 96
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)
    tied = wanted.get_input_embeddings().weight is wanted.get_output_embeddings().weight
    assert (found.get_input_embeddings().weight is found.get_output_embeddings().weight) is tied


def test_the_dtype_is_that_of_the_configuration(saved):
    assert load_offloaded(saved).dtype == torch.bfloat16


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_weight_that_is_missing_is_named(llama):
    edit_index(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        T2NErrorInconsistentTensor, match=r"1 weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_offloaded(llama)


def test_weights_that_the_model_does_not_use_are_named(llama, caplog):
    config = hf.AutoConfig.from_pretrained(llama)
    config.num_hidden_layers = 1
    with caplog.at_level("WARNING", "torch_to_nnef"):
        load_offloaded(llama, config)
    assert re.search(r"9 tensors of .* model\.layers\.1\..* and 4 more", caplog.text)


def test_another_shape_is_named(llama):
    config = hf.AutoConfig.from_pretrained(llama)
    config.intermediate_size = 32
    with pytest.raises(T2NErrorInconsistentTensor, match="another shape"):
        load_offloaded(llama, config)


def test_a_file_that_is_missing_is_named(llama):
    next(llama.glob("model-00002-*")).unlink()
    with pytest.raises(T2NErrorNotFoundFile, match="model-00002"):
        load_offloaded(llama)


def test_an_index_that_leaves_the_folder_is_refused(llama):
    edit_index(llama, lambda weights: weights.update({"x": "../model.safetensors"}))
    with pytest.raises(T2NErrorInconsistentTensor, match="outside of its folder"):
        load_offloaded(llama)


def test_an_index_that_promises_too_much_is_refused(llama):
    edit_index(llama, lambda weights: weights.update({"x": next(iter(weights.values()))}))
    with pytest.raises(T2NErrorInconsistentTensor, match="do not hold: x"):
        load_offloaded(llama)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}'])
def test_a_damaged_index_is_refused(llama, text):
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(T2NErrorInconsistentTensor, match="damaged"):
        load_offloaded(llama)


def test_only_safetensors_can_stay_on_disk(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(T2NErrorNotFoundFile, match="only safetensors can stay on disk"):
        load_offloaded(tmp_path)


def test_a_quantized_checkpoint_is_refused(llama):
    config = hf.AutoConfig.from_pretrained(llama)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(T2NErrorInvalidArgument, match="quantized already \\(fp8\\)"):
        load_offloaded(llama, config)
