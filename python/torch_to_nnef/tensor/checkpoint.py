"""Checkpoints as folders, `model.safetensors` or shards with an index, and the way from there into a model without values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.quant.serialize import offloaded_tensors
from torch_to_nnef.tensor.updater import ModTensorUpdater

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ON_DISK, IN_MEMORY = "t2n_offload_disk", "cpu"
_SHOWN = 5  # names in a message
_COMPARED = 1 << 20  # elements that are read at a time


def few(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", "..") and name.isprintable() and len(name.encode()) < 256


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside `index`, the index of shards that says so.

    Raises `T2NErrorInconsistentTensor` if it is damaged, or names files elsewhere.
    """
    try:
        files: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        outside = [name for name in files.values() if not _is_file_name(name)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise T2NErrorInconsistentTensor(f"{index} is no index of shards: {type(error).__name__}: {error}") from error
    if outside:
        raise T2NErrorInconsistentTensor(f"{index} names files outside of its folder: {few(outside)!r}")
    return files


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors checkpoint, left on disk: packed ones as QTensors, others as `OffloadedTensor`s.

    path: a folder with `model.safetensors` or its index, or one of these files, or any safetensors file.

    Raises:
        T2NErrorNotFoundFile: Neither is there, or a file that the index names is not.
        T2NErrorInconsistentTensor: A file is damaged, or lacks what the index says it has.

    """
    files = [path] if path.is_file() else [path / SINGLE, path / INDEX]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise T2NErrorNotFoundFile(
            f"neither {SINGLE} nor {INDEX} is in {path}: only safetensors can stay on disk; leave out --device-map, or save the "
            "model with save_pretrained first"
        )
    if file.suffix != ".json":
        return offloaded_tensors(file)
    names = weight_map(file)
    shards = {name: offloaded_tensors(file.parent / name) for name in dict.fromkeys(names.values())}
    if absent := [key for key, shard in names.items() if key not in shards[shard]]:
        raise T2NErrorInconsistentTensor(f"{file} names tensors its files do not hold: {few(absent)}")
    return {key: shards[shard][key] for key, shard in names.items()}


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without a part on disk: packed ones stay packed."""
    return tensor.to_memory() if isinstance(tensor, QTensor) else loaded(tensor)


def t2n_load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: str | Mapping[str, str] = ON_DISK,
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> nn.Module:
    """Give `model`, built without values (`with torch.device("meta")`), those of a safetensors checkpoint; returns it.

    Parameters become `OffloadedTensor`s (QTensors with their planes on disk, where the checkpoint is packed): nothing is read until
    something computes with them, and then each is read alone. Buffers are read. Ties of the model hold.

    Args:
        model: Changed in place; exactly as before if an error is raised.
        checkpoint: A folder with `model.safetensors` or `model.safetensors.index.json`, or one such file.
        device_map: `t2n_offload_disk`, `cpu` (read now), or a mapping of module names to these; of several prefixes of a name the longest
            counts, `""` is all.
        dtype: To read floating point values as; default: as they are stored.
        strict: Refuse tensors of the checkpoint that the model has not, else they are logged; and a checkpoint without some that the
            model has values for, else they stay.

    Raises:
        T2NErrorNotFoundFile: No checkpoint there, or a file that its index names is not.
        T2NErrorInconsistentTensor: A damaged file; another shape than the model has; tensors of either that the other lacks; different
            values for a weight that the model shares.
        T2NErrorInvalidArgument: A device map that says something else; a dtype that is none of floating point.

    """
    places = _device_map(device_map)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise T2NErrorInvalidArgument(f"dtype: {dtype!r} is no dtype of floating point")
    tensors = checkpoint_tensors(Path(checkpoint))
    held = ModTensorUpdater(model)
    names = {place.fqn: tensor for _, tensor in held.tensors() for place in held.places(tensor)}
    found = [name for name in tensors if name in names]
    given = {id(names[name]) for name in found}
    kept = model.state_dict().keys()
    absent = [name for name, tensor in names.items() if id(tensor) not in given]
    if unset := [name for name in absent if name not in kept and names[name].is_meta]:
        raise T2NErrorInconsistentTensor(
            f"the model has no value for {few(unset)}, which is in no checkpoint: give it a value first"
        )
    if missing := [name for name in absent if name in kept and (strict or names[name].is_meta)]:
        raise T2NErrorInconsistentTensor(f"{checkpoint} lacks {len(missing)} tensors of the model: {few(missing)}")
    if unused := [name for name in tensors if name not in names]:
        said = f"{len(unused)} tensors of {checkpoint} are not part of the model: {few(unused)}"
        if strict:
            raise T2NErrorInconsistentTensor(f"{said}; strict=False leaves them out")
        LOGGER.warning("%s", said)
    if other := [name for name in found if names[name].shape != tensors[name].shape]:
        shapes = tuple(tensors[other[0]].shape), tuple(names[other[0]].shape)
        raise T2NErrorInconsistentTensor(
            f"{checkpoint}: {few(other)} have another shape than in the model, {shapes[0]} and not {shapes[1]}"
        )
    if other := [n for n in found if names[n].is_floating_point() != tensors[n].is_floating_point()]:
        dtypes = tensors[other[0]].dtype, names[other[0]].dtype
        raise T2NErrorInconsistentTensor(f"{checkpoint}: {few(other)} hold {dtypes[0]}, in the model {dtypes[1]}")
    first: dict[int, str] = {}
    for name in found:
        known = first.setdefault(id(names[name]), name)
        if known != name and not _same_values(tensors[known], tensors[name]):
            raise T2NErrorInconsistentTensor(
                f"{checkpoint} has other values in {name} than in {known}, which are one weight in the model"
            )
    new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in first.values():
        tensor = tensors[name]
        value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        on_disk = isinstance(names[name], nn.Parameter) and _place_of(name, places) == ON_DISK
        new[id(names[name])] = names[name], value if on_disk else in_memory(value)
    for old, value in new.values():
        held.update_by_ref(old, value)
    return model


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return a.is_identical(b)
    parts = (tensor.reshape(-1).split(_COMPARED) for tensor in (a, b))  # type: ignore[no-untyped-call]
    return a.dtype == b.dtype and all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def _device_map(device_map: str | Mapping[str, str]) -> Mapping[str, str]:
    places = device_map if isinstance(device_map, Mapping) else {"": device_map}
    if wrong := [place for place in places.values() if place not in (ON_DISK, IN_MEMORY)]:
        raise T2NErrorInvalidArgument(f"device_map: {wrong[0]!r} is neither {ON_DISK!r} nor {IN_MEMORY!r}")
    return places


def _place_of(name: str, places: Mapping[str, str]) -> str:
    prefixes = [prefix for prefix in places if not prefix or name == prefix or name.startswith(f"{prefix}.")]
    return places[max(prefixes, key=len)] if prefixes else ON_DISK
