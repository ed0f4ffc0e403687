"""Values that lie in files: byte ranges, read when asked for and never mapped, so that memory does not grow with what was read."""

from __future__ import annotations

import io
import json
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorNotFoundFile, T2NErrorRuntime

# As many bytes of JSON as safetensors itself accepts.
_MAX_HEADER = 100_000_000
_LARGE = 1 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What torch and numpy hold.
_MAX_RANK, _MAX_BYTES = 64, (1 << 63) - 1


class ByteFile:
    """An open file, read at any place by any thread. Held open, it keeps its content if the name is deleted or replaced."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self._file, self._lock = name, file, threading.Lock()
        weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: Path) -> ByteFile:
        """The file at `path`; raises `T2NErrorNotFoundFile`."""
        try:
            return cls(str(path), path.open("rb", buffering=0))
        except OSError as error:
            raise T2NErrorNotFoundFile(f"cannot read {path}: {error}") from error

    @property
    def size(self) -> int:
        """Bytes in the file."""
        with self._lock:
            return self._file.seek(0, io.SEEK_END)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on; raises `T2NErrorInconsistentTensor` if the file ends before."""
        filled = 0
        while filled < len(into):
            got = self._read(offset + filled, into[filled:])
            if not got:
                raise T2NErrorInconsistentTensor(f"{self.name} ends {len(into) - filled} bytes before its last tensor")
            filled += got

    def _read(self, offset: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):  # where the last read ended is shared with forked processes
            return os.preadv(self._file.fileno(), [into], offset)
        with self._lock:
            self._file.seek(offset)
            return cast("io.RawIOBase", self._file).readinto(into) or 0


class Scratch(ByteFile):
    """A file without a name in `folder`, that grows; its space is free again when nothing refers to it, however the process ends."""

    def __init__(self, folder: Path) -> None:
        name = f"scratch file in {folder}"
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed with its last reader)
        except OSError as error:
            raise T2NErrorRuntime(f"cannot make a {name}: {error}") from error
        super().__init__(name, cast("BinaryIO", file))
        self._process = os.getpid()

    def append(self, content: memoryview) -> Extent:
        """Where `content` now lies; raises `T2NErrorRuntime` where the system cannot take it, as on a full disk."""
        if self._process != os.getpid():
            raise T2NErrorRuntime(f"the {self.name} belongs to the process that forked this one, which may write too")
        try:
            with self._lock:
                offset, written = self._file.seek(0, io.SEEK_END), 0
                while written < len(content):
                    written += self._file.write(content[written:])
        except OSError as error:
            raise T2NErrorRuntime(f"cannot write {len(content)} bytes to a {self.name}: {error}") from error
        return Extent(self, offset, len(content))


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes of `file` from `offset` on."""

    file: ByteFile
    offset: int
    nbytes: int


Extents = tuple[Extent, ...]


def cut(extents: Sequence[Extent], start: int, stop: int) -> Extents:
    """Bytes `[start, stop)` of the concatenated `extents`."""
    found = []
    for extent in extents:
        first, last = max(start, 0), min(stop, extent.nbytes)
        if first < last:
            found.append(replace(extent, offset=extent.offset + first, nbytes=last - first))
        start, stop = start - extent.nbytes, stop - extent.nbytes
    return tuple(found)


def raw_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; writes go through."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_into(extents: Sequence[Extent], tensor: torch.Tensor) -> None:
    """Fill `tensor` (contiguous, CPU) with the bytes of `extents`."""
    view, at = raw_memory(tensor), 0
    for extent in extents:
        extent.file.read_into(extent.offset, view[at : at + extent.nbytes])
        at += extent.nbytes


def own_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.empty`, but large ones not from malloc: megabytes that come and go leave holes there, and it grows.

    Raises `T2NErrorRuntime` where memory is short.
    """
    if (nbytes := prod(shape) * dtype.itemsize) < _LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        pages = mmap.mmap(-1, nbytes, access=mmap.ACCESS_COPY)
    except (OSError, OverflowError) as error:
        raise T2NErrorRuntime(f"no memory for a tensor of shape {list(shape)}, {nbytes} bytes: {error}") from error
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def safetensors_extents(path: Path) -> Iterator[tuple[str, Extent, torch.dtype, tuple[int, ...]]]:
    """`(name, extent, dtype, shape)` of each tensor of a safetensors file.

    Raises:
        T2NErrorNotFoundFile: It cannot be opened.
        T2NErrorInconsistentTensor: It is not of that format, or shorter than it says.

    """
    file = ByteFile.open(path)
    with _readable(path):
        header, data = _header(file)
        header.pop("__metadata__", None)
        for name, about in header.items():
            yield name, *_entry(file, data, name, about)


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a safetensors file. Raises as `safetensors_extents`."""
    file = ByteFile.open(path)
    with _readable(path):
        return dict(_header(file)[0].get("__metadata__", {}))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as damage:
        raise T2NErrorInconsistentTensor(f"{path} is no readable safetensors file: {damage}") from damage


def _entry(file: ByteFile, data: int, name: str, about: dict[str, Any]) -> tuple[Extent, torch.dtype, tuple[int, ...]]:
    """Where a tensor lies. Sizes are multiplied as Python's integers, which do not overflow; nothing is allocated."""
    (start, stop), shape = about["data_offsets"], about["shape"]
    if about["dtype"] not in _DTYPES:
        raise ValueError(f"`{name}` has dtype {about['dtype']}, not one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[about["dtype"]]
    if type(shape) is not list or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"`{name}`: sizes and places are integers from 0 on")
    nbytes = prod(shape) * dtype.itemsize
    # The product of the others too: torch computes strides of tensors without elements.
    if len(shape) > _MAX_RANK or prod(n or 1 for n in shape) * dtype.itemsize > _MAX_BYTES:
        raise ValueError(f"`{name}` of rank {len(shape)} is larger than a tensor can be")
    if not start <= stop <= file.size - data or stop - start != nbytes:
        raise ValueError(f"`{name}` of shape {shape} cannot lie in bytes {start} to {stop}")
    return Extent(file, data + start, nbytes), dtype, tuple(shape)


def _header(file: ByteFile) -> tuple[dict[str, Any], int]:
    """JSON of the header, and where the data begin."""
    length = bytearray(8)
    file.read_into(0, memoryview(length))
    size = int.from_bytes(length, "little")
    if size > min(_MAX_HEADER, file.size - 8):
        raise ValueError(f"a header of {size} bytes")
    text = bytearray(size)
    file.read_into(8, memoryview(text))
    return json.loads(text), 8 + size
