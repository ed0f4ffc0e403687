"""Checkpoints whose weights stay on disk: transformers builds the model and maps names, nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tensor.checkpoint import checkpoint_tensors, few, in_memory
from torch_to_nnef.tensor.offload import OffloadedTensor, offload
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Smaller weights that transformers computed while loading stay in memory.
_LARGE = 1 << 20


def load_offloaded(
    folder: str | Path, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode, its parameters `OffloadedTensor`s of the safetensors files there.

    Weights that transformers renames, splits or joins stay on disk too; what it computes from them is put into a scratch file. Buffers
    and ties are as in any model. Weights that `t2n quantize-shards` packed are QTensors, their planes on disk.

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
    take_mark(config)
    if method := getattr(config, "quantization_config", None):
        raise T2NErrorInvalidArgument(
            f"{folder} is quantized already ({_method(method)}); a checkpoint that stays on disk must hold floats: give one that does, "
            "or leave out --device-map"
        )
    weights = checkpoint_tensors(folder)
    packed = {name: tensor for name, tensor in weights.items() if isinstance(tensor, QTensor)}
    # transformers maps names and casts; it would unpack what is packed, so it gets tensors without bytes.
    weights |= {name: OffloadedTensor((), tensor.shape, (tensor.dtype,)) for name, tensor in packed.items()}
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
    for name in packed.keys() - set(found.get("unexpected_keys") or ()):
        places.update_by_name(name, packed[name].to(places.get(name).dtype))
    loaded: PreTrainedModel = model.requires_grad_(False)
    return loaded


def read_into_memory(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without a weight on disk, in place; packed ones stay packed."""
    places = ModTensorUpdater(model)
    for _, tensor in list(places.tensors()):
        places.update_by_ref(tensor, in_memory(tensor))
    return model


def mark(config: dict[str, Any], method: str) -> dict[str, Any]:
    """The JSON of a config whose weights are packed by `method`; transformers alone would find none of those, and warns of the mark."""
    return {**config, "quantization_config": {"quant_method": _OURS, "method": method}}


def take_mark(config: PreTrainedConfig) -> str | None:
    """The method that `config` is marked with, the mark taken off; None if it has none."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, Mapping) or _method(quantization) != _OURS:
        return None
    del config.quantization_config
    return str(quantization.get("method"))


_OURS = "torch_to_nnef"


def _refuse_differences(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise for weights that the model would lack; say which of the files it does not use."""
    wrong = {
        "are missing": found.get("missing_keys"),
        "have another shape than the configuration says": found.get("mismatched_keys"),
    }
    lines = [f"{len(keys)} weights {what}: {few(sorted(map(str, keys)))}" for what, keys in wrong.items() if keys]
    if lines:
        raise T2NErrorInconsistentTensor(f"{folder} does not hold this model: {'; '.join(lines)}")
    if unused := sorted(found.get("unexpected_keys") or ()):
        LOGGER.warning("%d tensors of %s are not part of the model: %s", len(unused), folder.name, few(unused))


def _method(quantization: Any) -> object:
    return quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
