"""Checkpoints whose weights stay on disk: transformers builds the model and maps names, nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.llm_tract import hub
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tensor.offload import OffloadedTensor, offload, offloaded_safetensors
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Smaller weights that transformers computed while loading stay in memory.
_LARGE = 1 << 20


def load_offloaded(
    folder: str | Path, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode, its parameters `OffloadedTensor`s of the safetensors files there.

    Weights that transformers renames, splits or joins stay on disk too; what it computes from them is put into a scratch file. Buffers
    and ties are as in any model.

    config: default: `folder/config.json`; dtype: default: what the configuration says; values are cast when they are read.
    options: for `AutoModelForCausalLM.from_pretrained`, such as `attn_implementation` or `trust_remote_code`.

    Raises:
        T2NErrorNotFoundFile: No safetensors checkpoint in `folder`, or not all of it.
        T2NErrorInconsistentTensor: A file is damaged; or weights of the model are missing, or have another shape.
        T2NErrorInvalidArgument: A checkpoint that is quantized already.

    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder = Path(folder)
    config = config or AutoConfig.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code", False))
    if method := getattr(config, "quantization_config", None):
        raise T2NErrorInvalidArgument(
            f"{folder} is quantized already ({_method(method)}); a checkpoint that stays on disk must hold floats: give one that does, "
            "or leave out --device-map"
        )
    weights = checkpoint_tensors(folder)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):  # an auto class takes no weights: the class is asked of an empty model
        kind = type(auto.from_config(config, **options))
    options |= {"dtype": dtype or config.dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = kind.from_pretrained(None, config=config, state_dict=weights, **options)
    except RuntimeError as error:  # of a conversion, after a report in the log
        raise T2NErrorInconsistentTensor(f"{folder} does not hold this model: {error}") from error
    _refuse_differences(folder, found)
    # What transformers takes from a folder beside the weights.
    model.config.name_or_path = str(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    places = ModTensorUpdater(model)
    for _, tensor in list(places.tensors()):
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor, OffloadedTensor):
            places.update_by_ref(tensor, offload(tensor) if tensor.nbytes > _LARGE else tensor)
    loaded: PreTrainedModel = model.requires_grad_(False)
    return loaded


def checkpoint_tensors(folder: Path) -> dict[str, OffloadedTensor]:
    """Every tensor of `model.safetensors`, or of the files its index names, left on disk.

    Raises:
        T2NErrorNotFoundFile: Neither is there, or a file that the index names is not.
        T2NErrorInconsistentTensor: A file is damaged, or lacks what the index says it has.

    """
    index, single = folder / _INDEX, folder / _SINGLE
    if single.is_file():
        return offloaded_safetensors(single)
    if not index.is_file():
        raise T2NErrorNotFoundFile(
            f"neither {_SINGLE} nor {_INDEX} is in {folder}: only safetensors can stay on disk; leave out --device-map, or save the "
            "model with save_pretrained first"
        )
    weight_map = hub.weight_map(index)
    shards = {name: offloaded_safetensors(folder / name) for name in dict.fromkeys(weight_map.values())}
    if absent := [key for key, shard in weight_map.items() if key not in shards[shard]]:
        raise T2NErrorInconsistentTensor(f"{index} names tensors its files do not hold: {hub.few(absent)}")
    return {key: shards[shard][key] for key, shard in weight_map.items()}


def _refuse_differences(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise for weights that the model would lack; say which of the files it does not use."""
    wrong = {
        "are missing": found.get("missing_keys"),
        "have another shape than the configuration says": found.get("mismatched_keys"),
    }
    lines = [f"{len(keys)} weights {what}: {hub.few(sorted(map(str, keys)))}" for what, keys in wrong.items() if keys]
    if lines:
        raise T2NErrorInconsistentTensor(f"{folder} does not hold this model: {'; '.join(lines)}")
    if unused := sorted(found.get("unexpected_keys") or ()):
        LOGGER.warning("%d tensors of %s are not part of the model: %s", len(unused), folder.name, hub.few(unused))


def _method(quantization: Any) -> object:
    return quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
