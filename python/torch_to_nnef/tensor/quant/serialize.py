"""Dictionaries that hold `QTensor`s, as safetensors files: packed and bit-identical.

Each part of a QTensor `name` is the entry `name::part`; what the parts mean is JSON under one metadata key.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)
from torch_to_nnef.files import require_space, staged
from torch_to_nnef.tensor.offload import OffloadedTensor, loaded
from torch_to_nnef.tensor.quant.affine import Affine8
from torch_to_nnef.tensor.quant.base import QScalePerGroupF16, QScheme, QTensor
from torch_to_nnef.tensor.quant.compressors import BitPacking, Huffman, Lzma, NibblePacking
from torch_to_nnef.tensor.quant.half import F16, QTensorHalf
from torch_to_nnef.tensor.quant.int8 import QTensorInt8
from torch_to_nnef.tensor.quant.padded import QTensorTractPadded
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, QTensorTractTransposed

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY = "torch_to_nnef"
_CLASSES: dict[str, type[QTensor]] = {
    c.__name__: c
    for c in (QTensor, QTensorTractScaleOnly, QTensorTractTransposed, QTensorTractPadded, QTensorHalf, QTensorInt8)
}
_SCHEMES: dict[str, type[QScheme]] = {"QScalePerGroupF16": QScalePerGroupF16, "F16": F16, "Affine8": Affine8}
_COMPRESSORS = {c.__name__: c for c in (NibblePacking, BitPacking, Lzma, Huffman)}


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write `tensors` (plain ones and QTensors) to `path`, replacing it in one rename. Equal objects are stored once.

    Raises:
        T2NErrorInvalidArgument: A QTensor, scheme or codec class this file format does not know.
        T2NErrorRuntime: The system refuses to write, or has too little space.

    """
    entries: dict[str, torch.Tensor] = {}
    packed: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if first_name.setdefault(_identity(tensor), name) != name:
            aliases[name] = first_name[_identity(tensor)]
        elif isinstance(tensor, QTensor):
            packed[name] = _describe(name, tensor)
            entries[f"{name}::u8_blob"] = loaded(tensor.u8_blob).contiguous()
            scheme = tensor.qscheme
            entries |= {f"{name}::{n}": loaded(getattr(scheme, n)).contiguous() for n in scheme.tensor_names}
        else:
            entries[name] = loaded(tensor).detach().contiguous()
    path = Path(path)
    note = json.dumps({"packed": packed, "aliases": aliases}, sort_keys=True)
    with staged(path) as beside:
        require_space(path, sum(entry.nbytes for entry in entries.values()))
        try:
            save_file(entries, beside, metadata={_KEY: note})
        except (OSError, SafetensorError) as error:
            raise T2NErrorRuntime(f"cannot write {str(path)!r}: {error}") from error


def load_safetensors(path: str | Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read what `save_safetensors` wrote (or any safetensors file): QTensors come back bit-identical.

    Raises:
        T2NErrorNotFoundFile: No such file.
        T2NErrorInconsistentTensor: Damaged file, or parts that do not fit together.

    """
    if not Path(path).is_file():
        raise T2NErrorNotFoundFile(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            note = json.loads((file.metadata() or {}).get(_KEY, '{"packed": {}, "aliases": {}}'))
            parts = {f"{name}::" for name in note["packed"]}
            names = [n for n in file.keys() if f"{n.rpartition('::')[0]}::" not in parts]  # noqa: SIM118 (not a mapping)
            loaded: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in names}
            loaded |= {name: _restore(file, name, about) for name, about in note["packed"].items()}
            return loaded | {alias: loaded[name] for alias, name in note["aliases"].items()}
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as damage:
        raise T2NErrorInconsistentTensor(f"{path} is damaged: {type(damage).__name__}: {damage}") from damage


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    # `state_dict()` detaches: shared weights arrive as distinct objects over the same bytes.
    if isinstance(tensor, QTensor):
        return type(tensor), _identity(tensor.u8_blob), tensor.dtype, tuple(tensor.shape)
    if isinstance(tensor, OffloadedTensor):
        return "on disk", tensor.extents, tensor.dtypes, tuple(tensor.shape)
    if tensor.numel() == 0:
        return ("empty", id(tensor))
    return "plain", tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _describe(name: str, tensor: QTensor) -> dict[str, Any]:
    scheme = tensor.qscheme
    codecs = [type(c).__name__ for c in tensor.u8_compressors]
    known = {*_CLASSES, *_SCHEMES, *_COMPRESSORS}
    if unknown := sorted({type(tensor).__name__, type(scheme).__name__, *codecs} - known):
        raise T2NErrorInvalidArgument(f"`{name}`: {', '.join(unknown)} cannot be stored as safetensors: use torch.save")
    return {
        "class": type(tensor).__name__,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "nnef_name": tensor.nnef_name,
        "scheme": type(scheme).__name__,
        "scheme_state": scheme.as_plain(),
        "compressors": [[type(c).__name__, asdict(c)] for c in tensor.u8_compressors],  # type: ignore[call-overload]
    }


def _restore(file: Any, name: str, about: dict[str, Any]) -> QTensor:
    scheme_class = _SCHEMES[about["scheme"]]
    tensors = {n: file.get_tensor(f"{name}::{n}") for n in scheme_class.tensor_names}
    scheme = scheme_class.from_plain({**about["scheme_state"], **tensors})
    compressors = [_COMPRESSORS[codec](**state) for codec, state in about["compressors"]]
    return _CLASSES[about["class"]].from_packed(
        file.get_tensor(f"{name}::u8_blob"),
        about["shape"],
        scheme,
        getattr(torch, about["dtype"]),
        compressors,
        about["nnef_name"],
    )
