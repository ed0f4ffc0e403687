"""Dictionaries that hold `QTensor`s, as safetensors files: packed and bit-identical.

Each part of a QTensor `name` is the entry `name::part`; what the parts mean is JSON under one metadata key.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
)
from torch_to_nnef.files import require_space, staged, writing
from torch_to_nnef.tensor.chunks import flat_chunks
from torch_to_nnef.tensor.extents import DTYPE_NAMES, raw_memory, safetensors_metadata
from torch_to_nnef.tensor.offload import OffloadedTensor, offloaded_safetensors
from torch_to_nnef.tensor.quant.affine import Affine8
from torch_to_nnef.tensor.quant.base import QScalePerGroupF16, QScheme, QTensor
from torch_to_nnef.tensor.quant.compressors import BitPacking, Huffman, Lzma, NibblePacking
from torch_to_nnef.tensor.quant.half import F16, QTensorHalf
from torch_to_nnef.tensor.quant.int8 import QTensorInt8
from torch_to_nnef.tensor.quant.padded import QTensorTractPadded
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, QTensorTractTransposed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_KEY = "torch_to_nnef"
_CLASSES: dict[str, type[QTensor]] = {
    c.__name__: c
    for c in (QTensor, QTensorTractScaleOnly, QTensorTractTransposed, QTensorTractPadded, QTensorHalf, QTensorInt8)
}
_SCHEMES: dict[str, type[QScheme]] = {"QScalePerGroupF16": QScalePerGroupF16, "F16": F16, "Affine8": Affine8}
_COMPRESSORS = {c.__name__: c for c in (NibblePacking, BitPacking, Lzma, Huffman)}


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write `tensors` (plain ones and QTensors) to `path`, replacing it in one rename. Equal objects are stored once.

    Tensors are written in pieces, so that those on disk are never in memory as a whole. The same tensors give the same bytes.

    Raises:
        T2NErrorInvalidArgument: A QTensor, scheme or codec class, or a dtype, that this file format does not know; a name that it takes for
            something else (`__metadata__`, `x::part` beside a QTensor `x`).
        T2NErrorRuntime: The system refuses to write, or has too little space.

    """
    entries: dict[str, torch.Tensor] = {}
    packed: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if (first := first_name.setdefault(_identity(name, tensor), name)) != name:
            aliases[name] = first
        elif isinstance(tensor, QTensor):
            packed[name] = _describe(name, tensor)
            entries[f"{name}::u8_blob"] = tensor.u8_blob
            entries |= {f"{name}::{n}": getattr(tensor.qscheme, n) for n in tensor.qscheme.tensor_names}
        else:
            entries[name] = tensor.detach()
    if taken := [n for n in tensors if n == "__metadata__" or n.rpartition("::")[0] in packed]:
        raise T2NErrorInvalidArgument(f"`{taken[0]}`: a safetensors file has this name for something else; rename it")
    note = json.dumps({"packed": packed, "aliases": aliases}, sort_keys=True)
    path = Path(path)
    with staged(path) as beside, writing(path):
        require_space(path, sum(entry.numel() * entry.element_size() for entry in entries.values()))
        _write(beside, entries, {_KEY: note})


def _write(path: Path, entries: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Header and data; those of wide items first, so that every tensor is aligned to its items."""
    if unknown := [name for name, tensor in entries.items() if tensor.dtype not in DTYPE_NAMES]:
        raise T2NErrorInvalidArgument(f"`{unknown[0]}`: safetensors files hold no {entries[unknown[0]].dtype}")
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name in order:
        start, stop = stop, stop + entries[name].numel() * entries[name].element_size()
        about = {"dtype": DTYPE_NAMES[entries[name].dtype], "shape": list(entries[name].shape)}
        header[name] = {**about, "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for name in order:
            for _, piece in flat_chunks(entries[name]):
                _write_all(file, raw_memory(piece.cpu()))


def _write_all(file: Any, content: Any) -> None:
    """`file.write` of an unbuffered file may take a part."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


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
            return _assembled(list(file.keys()), file.get_tensor, file.metadata() or {})
    except _DAMAGE as damage:
        raise T2NErrorInconsistentTensor(f"{path} is damaged: {type(damage).__name__}: {damage}") from damage


def offloaded_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """As `load_safetensors`, but values, those of QTensors too, are left in the file; raises the same."""
    parts = offloaded_safetensors(path)
    try:
        return _assembled(list(parts), parts.__getitem__, safetensors_metadata(Path(path)))
    except _DAMAGE as damage:
        raise T2NErrorInconsistentTensor(f"{path} is damaged: {type(damage).__name__}: {damage}") from damage


_DAMAGE = (SafetensorError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, T2NError)


def _assembled(
    names: list[str], get: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The tensors whose parts `get` gives, by the note about them in `metadata`."""
    note = json.loads(metadata.get(_KEY, '{"packed": {}, "aliases": {}}'))
    parts = {f"{name}::" for name in note["packed"]}
    found: dict[str, torch.Tensor] = {n: get(n) for n in names if f"{n.rpartition('::')[0]}::" not in parts}
    found |= {name: _restore(get, name, about) for name, about in note["packed"].items()}
    return found | {alias: found[name] for alias, name in note["aliases"].items()}


def _identity(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    # `state_dict()` detaches: shared weights arrive as distinct objects over the same bytes.
    if isinstance(tensor, QTensor):
        about = {**_describe(name, tensor), "nnef_name": None}
        parts = (tensor.u8_blob, *(getattr(tensor.qscheme, part) for part in tensor.qscheme.tensor_names))
        return json.dumps(about), *(_identity(name, part) for part in parts)
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


def _restore(get: Callable[[str], torch.Tensor], name: str, about: dict[str, Any]) -> QTensor:
    if not isinstance(about["nnef_name"], (str, NoneType)):
        raise TypeError(f"`{name}`: its nnef_name is {about['nnef_name']!r}")
    scheme_class = _SCHEMES[about["scheme"]]
    tensors = {n: get(f"{name}::{n}") for n in scheme_class.tensor_names}
    scheme = scheme_class.from_plain({**about["scheme_state"], **tensors})
    compressors = [_COMPRESSORS[codec](**state) for codec, state in about["compressors"]]
    return _CLASSES[about["class"]].from_packed(
        get(f"{name}::u8_blob"),
        about["shape"],
        scheme,
        getattr(torch, about["dtype"]),
        compressors,
        about["nnef_name"],
    )
