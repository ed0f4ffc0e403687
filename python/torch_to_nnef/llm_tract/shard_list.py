"""The work list of `t2n quantize-shards`, as a JSON file: which bytes of a checkpoint become which tensors of which file.

Who works on it needs neither the model nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from torch_to_nnef._native import Staging, put_in_place
from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
)
from torch_to_nnef.files import writing
from torch_to_nnef.quantize.targets import Use
from torch_to_nnef.tensor.extents import DTYPE_NAMES, ByteFile, Extent, safetensors_extents
from torch_to_nnef.tensor.offload import OffloadedTensor

MANIFEST, WORK = "quantize-shards.json", ".t2n-work"
OUTPUTS = "model-*-of-*.safetensors"
# What no checkpoint can call a file: tensors that transformers computed, in the work folder.
COMPUTED = "/computed.safetensors"
_VERSION = 1
_SAMPLES, _SAMPLE_BYTES = 64, 64
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of the model.

    extents: `(file, offset, bytes)` of its values; dtype as there. uses: what the graph does with it. method: key of the registry, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    extents: tuple[tuple[str, int, int], ...]
    uses: tuple[str, ...]
    method: str | None

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return sum(nbytes for _, _, nbytes in self.extents)


@dataclass(frozen=True)
class Output:
    """A safetensors file that is written as a whole."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Of the values it is made of."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class WorkList:
    """What is to be done, in order. The same checkpoint and options give the same list.

    options: registry, method and what else decides about weights. sources: `digest_of` each file.
    """

    options: Mapping[str, Any]
    sources: Mapping[str, str]
    outputs: tuple[Output, ...] = field(default=())

    def save(self, out: Path) -> None:
        """Write it to `out`, in one step."""
        put(out, MANIFEST, sealed({"version": _VERSION, **asdict(self)}))

    @classmethod
    def load(cls, out: Path) -> WorkList | None:
        """The list in `out`, None if there is none. Raises `T2NErrorInconsistentTensor` for a damaged one."""
        path = out / MANIFEST
        try:
            if not path.is_file():
                return None
            stored = json.loads(path.read_bytes())
            _check_version(stored["version"])
            _check_seal(stored)
            outputs = tuple(_output(output) for output in stored["outputs"])
            return cls(dict(stored["options"]), dict(stored["sources"]), outputs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as damage:
            raise T2NErrorInconsistentTensor(
                f"{path} is damaged: {type(damage).__name__}: {damage}; begin anew with --force"
            ) from damage

    def share(self, index: int, count: int) -> list[int]:
        """Which outputs are those of worker `index` of `count`, from 1 on."""
        return [number for number in range(len(self.outputs)) if number % count == index - 1]


@dataclass(frozen=True)
class Sources:
    """The files a work list reads; opened when they are needed, as few as are read at a time."""

    checkpoint: Path
    out: Path

    def tensor(self, entry: Entry) -> OffloadedTensor:
        """The values of `entry`, on disk. Raises `T2NErrorInconsistentTensor` where the file is shorter."""
        extents = []
        for name, offset, nbytes in entry.extents:
            file = self._files.get(name) or ByteFile.open(self._path(name))
            self._files[name] = file
            if offset + nbytes > file.size:
                raise T2NErrorInconsistentTensor(f"{file.name} ends before `{entry.name}` does")
            extents.append(Extent(file, offset, nbytes))
        return OffloadedTensor(tuple(extents), entry.shape, (_DTYPES[entry.dtype],))

    def check(self, work: WorkList) -> None:
        """Raise `T2NErrorInvalidArgument` if the checkpoint is not the one that `work` is about."""
        if changed := [name for name, digest in work.sources.items() if digest_of(self.checkpoint / name) != digest]:
            raise T2NErrorInvalidArgument(
                f"{self.out} was begun with another checkpoint: {', '.join(changed)} changed; begin anew with --force"
            )

    @cached_property
    def _files(self) -> dict[str, ByteFile]:
        return {}

    def _path(self, name: str) -> Path:
        return self.out / WORK / COMPUTED[1:] if name == COMPUTED else self.checkpoint / name


def put(out: Path, name: str, content: str | bytes) -> None:
    """Replace `out/name` in one step; what a kill leaves is in the work folder. Raises `T2NErrorRuntime` when the system refuses."""
    content = content.encode() if isinstance(content, str) else content
    try:
        with Staging(out / WORK) as folder, writing(out / name):
            beside = Path(folder) / name
            beside.write_bytes(content)
            put_in_place(beside, out / name)
    except T2NError:
        # Another worker may have put the same there, and then removed the work folder.
        if not ((out / name).is_file() and (out / name).read_bytes() == content):
            raise


def sealed(work: Mapping[str, Any]) -> str:
    """The JSON of a work list, with a digest by which changes are noticed."""
    return json.dumps({**work, "digest": _digest(work)}, indent=1, sort_keys=True) + "\n"


def _digest(work: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in work.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Of the size of a safetensors file, its header, and bytes from all over it, which training changes: neither its place nor its time.

    Raises `T2NErrorNotFoundFile`.
    """
    try:
        with path.open("rb") as file:
            size, length = path.stat().st_size, file.read(8)
            seen = hashlib.sha256(b"%d " % size + length)
            seen.update(file.read(min(int.from_bytes(length, "little"), 100_000_000)))
            start = file.tell()
            for place in range(start, size, max(1, (size - start) // _SAMPLES)):
                file.seek(place)
                seen.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise T2NErrorNotFoundFile(f"cannot read {path}: {error}") from error
    return seen.hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, and as long as its header says."""
    try:
        return all(True for _ in safetensors_extents(path))
    except (T2NErrorNotFoundFile, T2NErrorInconsistentTensor):
        return False


def divided(entries: list[Entry], files: int) -> Iterator[list[Entry]]:
    """`entries` in order, in at most about `files` runs of as many bytes."""
    most = max(1, -(-sum(entry.nbytes for entry in entries) // files))
    run: list[Entry] = []
    for entry in entries:
        if run and sum(one.nbytes for one in run) + entry.nbytes > most:
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def named(runs: list[list[Entry]]) -> tuple[Output, ...]:
    """Outputs with the names that transformers gives to shards."""
    return tuple(
        Output(f"model-{number:05d}-of-{len(runs):05d}.safetensors", tuple(run)) for number, run in enumerate(runs, 1)
    )


def _output(stored: Mapping[str, Any]) -> Output:
    entries = tuple(_entry(**entry) for entry in stored["entries"])
    _check_name(stored["name"])
    return Output(stored["name"], entries)


def _entry(name: str, shape: Any, dtype: str, extents: Any, uses: Any, method: str | None) -> Entry:
    if type(name) is not str:
        raise TypeError(f"{name!r} is no name of a tensor")
    extents = tuple((str(file), int(offset), int(nbytes)) for file, offset, nbytes in extents)
    for file, offset, nbytes in extents:
        if file != COMPUTED:
            _check_name(file)
        if min(offset, nbytes) < 0:
            raise ValueError(f"`{name}` lies at {offset}")
    if any(type(n) is not int or n < 0 for n in shape) or prod(shape) * _DTYPES[dtype].itemsize != sum(
        nbytes for _, _, nbytes in extents
    ):
        raise ValueError(f"`{name}` of shape {shape} has not as many bytes")
    return Entry(name, tuple(shape), dtype, extents, tuple(Use(use).value for use in uses), method)


def _check_version(version: object) -> None:
    if version != _VERSION:
        raise ValueError(f"version {version} is not {_VERSION}")


def _check_seal(stored: Mapping[str, Any]) -> None:
    if stored["digest"] != _digest(stored):
        raise ValueError("it was changed by hand")


def _check_name(file: str) -> None:
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise ValueError(f"{file!r} is no name of a safetensors file")


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors spell it."""
    return DTYPE_NAMES[dtype]
