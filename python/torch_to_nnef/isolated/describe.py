"""What an archive holds, by its headers and its text: tract is not run, weights are not read."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch_to_nnef import _native
from torch_to_nnef.tract_model import NUMPY_NAMES

_MAX_TEXT = 256 << 20
_NAME = r"""(?:i"[^"]*"|i'[^']*'|\w+)"""
_GRAPH = re.compile(rf"^\s*graph\s+({_NAME})\s*\(([^)]*)\)\s*->\s*\(([^)]*)\)", re.MULTILINE)
_EXTERNAL = re.compile(
    rf"^\s*({_NAME})\s*=\s*(?:tract_core_)?external\s*(?:<\s*(\w+)\s*>)?\s*\(([^;]*)\)\s*;", re.MULTILINE
)
_SHAPE = re.compile(r"\[([^\]]*)\]")
_DATUM_TYPE = re.compile(r'datum_type\s*=\s*"(\w+)"')
_PROPERTIES = re.compile(r"\bproperties\s*=\s*\[(.*?)\]\s*;", re.DOTALL)
_PROPERTY = re.compile(r'\(\s*"((?:[^"\\]|\\.)*)"\s*,\s*(?:"((?:[^"\\]|\\.)*)"|([-+.\w]+))\s*\)')
_GENERIC = {"scalar": "float32", "logical": "bool", "integer": "int64", None: "float32"}
# Bytes of a group of 32 elements.
_Q40_GROUP = 18


def describe(archive: Path) -> dict[str, Any]:
    """Entries, inputs, outputs, properties, and how many bits a weight takes.

    Raises what preflight raises for an archive that is not sound.
    """
    _native.preflight(archive)
    tensors = _native.archive_tensors(archive)
    text = _native.archive_read(archive, "graph.nnef", _MAX_TEXT).decode()
    files = [file for file in archive.rglob("*") if file.is_file()] if archive.is_dir() else [archive]
    entries = [_entry(*tensor) for tensor in tensors]
    return {
        "archive": str(archive),
        "bytes": sum(file.stat().st_size for file in files),
        "entries": entries,
        **_signature(text),
        "properties": _properties(text),
        "weights": _weights(entries),
    }


def _entry(name: str, size: int, dtype: str | None, shape: list[int] | None) -> dict[str, Any]:
    return {"name": name, "bytes": size, "dtype": dtype and NUMPY_NAMES.get(dtype, dtype), "shape": shape}


def _signature(text: str) -> dict[str, Any]:
    found = _GRAPH.search(text)
    if found is None:
        return {"graph": None, "inputs": [], "outputs": []}
    name, inputs, outputs = found.groups()
    declared = {match[1]: match for match in _EXTERNAL.finditer(text, found.end())}
    return {
        "graph": _plain(name),
        "inputs": [_input(name, declared.get(name)) for name in _names(inputs)],
        "outputs": [_plain(name) for name in _names(outputs)],
    }


def _input(name: str, declared: re.Match[str] | None) -> dict[str, Any]:
    if declared is None:
        return {"name": _plain(name), "dtype": None, "shape": None}
    datum_type, shape = _DATUM_TYPE.search(declared[3]), _SHAPE.search(declared[3])
    dtype = NUMPY_NAMES.get(datum_type[1], datum_type[1]) if datum_type else _GENERIC.get(declared[2])
    dims = [dim.strip() for dim in shape[1].split(",") if dim.strip()] if shape else None
    return {
        "name": _plain(name),
        "dtype": dtype,
        "shape": dims and [int(dim) if dim.isdecimal() else dim for dim in dims],
    }


def _names(text: str) -> list[str]:
    return re.findall(_NAME, text)


def _plain(name: str) -> str:
    return name[2:-1] if name.startswith(('i"', "i'")) else name


def _properties(text: str) -> dict[str, str]:
    block = _PROPERTIES.search(text)
    pairs = _PROPERTY.findall(block[1]) if block else []
    return {_unescape(name): number or _unescape(said) for name, said, number in pairs}


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _weights(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of two or more dimensions are weights; tables and biases count by dtype only."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    elements = bits = 0
    for entry in entries:
        if entry["shape"] is None:
            continue
        payload, number = entry["bytes"] - 128, math.prod(entry["shape"])
        count[entry["dtype"]] += 1
        size[entry["dtype"]] += payload
        if len(entry["shape"]) > 1:
            elements, bits = elements + number, bits + 8 * payload
    return {
        "elements": elements,
        "bits_per_weight": bits / elements if elements else None,
        "by_dtype": {dtype: {"tensors": count[dtype], "bytes": size[dtype]} for dtype in sorted(count)},
    }
