"""`Document` -> archive on disk, through the native writer: streamed, deterministic, in place in one rename."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from torch_to_nnef._native import ArchiveWriter, Staging
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.files import as_path, require_space, writing
from torch_to_nnef.nnef.document import Document
from torch_to_nnef.nnef.text import graph_text, quant_text
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.quantize.apply import Progress
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant import QTensor, QTensorTractScaleOnly, stored_nbytes


def target_path(path: str | Path, compression_level: int | None) -> tuple[Path, str]:
    """`(path, form)` by suffix and level: `.nnef` + None -> folder, + 0 -> `.nnef.tar`, + 1..9 -> `.nnef.tgz`; full suffixes as named.

    Raises `T2NErrorInvalidArgument` for a path without `.nnef` or a level outside 0..9.
    """
    path = as_path("the path of the archive", path)
    if compression_level is not None and not (isinstance(compression_level, int) and 0 <= compression_level <= 9):
        raise T2NErrorInvalidArgument(f"compression_level must be None or 0..9, not {compression_level!r}")
    if path.name.endswith(".nnef.tar"):
        return path, "tar"
    if path.name.endswith(".nnef.tgz"):
        return path, "tgz"
    if path.suffix != ".nnef":
        raise T2NErrorInvalidArgument(f"{path} must end in .nnef, .nnef.tar or .nnef.tgz")
    if compression_level is None:
        return path, "folder"
    form = "tgz" if compression_level else "tar"
    return path.with_name(f"{path.name}.{form}"), form


def check_replaceable(path: Path, form: str) -> None:
    """Raise `T2NErrorInvalidArgument` where an archive cannot take the place of what is at `path`, or files of others would go with it.

    A path the system does not take is a `T2NErrorRuntime`.
    """
    with writing(path):
        if form != "folder":
            if path.exists() and not path.is_file():
                raise T2NErrorInvalidArgument(f"{path} exists and is not a file")
            return
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise T2NErrorInvalidArgument(f"{path} exists and is not a folder")
        others = (
            p for p in path.rglob("*") if p.is_symlink() or not (p.is_dir() or p.suffix == ".dat" or p.name in _TEXTS)
        )
        if other := next(others, None):
            raise T2NErrorInvalidArgument(
                f"{path} is not replaced, it holds more than an archive ({other.relative_to(path)}): move it away, or name another folder"
            )


_TEXTS = ("graph.nnef", "graph.quant")


def write_archive(
    document: Document, path: Path, form: str, compression_level: int | None, progress: Progress | None = None
) -> int:
    """Write `document` at `path`; bytes on disk. On any error what was at `path` before is untouched.

    progress: called as `(done, total, label)` before each variable and once at the end; in bytes of `.dat` files.
    """
    done, total = 0, sum(stored_nbytes(variable.tensor) for variable in document.variables)
    # Weights hardly ever compress to less than half.
    require_space(path, total // 2 if form == "tgz" else total)
    writer = ArchiveWriter(path, form, compression_level or (1 if form == "tgz" else 0))  # type: ignore[arg-type]
    try:
        writer.add_text("graph.nnef", graph_text(document))
        if document.scales:
            writer.add_text("graph.quant", quant_text(document))
        for variable in document.variables:
            if progress:
                progress(done, total, variable.label)
            if isinstance(variable.tensor, QTensor):
                _add_packed(writer, variable.label, variable.tensor, path.parent)
            else:
                _add_plain(writer, variable.label, variable.tensor)
            done += stored_nbytes(variable.tensor)
        if progress:
            progress(total, total, "")
        return writer.finish()
    finally:
        writer.abort()


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The elements as little-endian bytes, 1-D, without a copy where the tensor is contiguous on CPU."""
    return loaded(tensor).detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()


def _add_plain(writer: ArchiveWriter, label: str, tensor: torch.Tensor) -> None:
    writer.add_tensor(label, tract_dtype(tensor.dtype, label), list(tensor.shape), raw_bytes(tensor))


def _add_packed(writer: ArchiveWriter, label: str, tensor: QTensor, scratch: Path) -> None:
    """A QTensor knows its own bytes: it writes its `.dat` in `scratch`, which is then taken into the archive.

    Q40 planes as they are go straight in, without that file.
    """
    if isinstance(tensor, QTensorTractScaleOnly) and not _has_own_file(type(tensor)):
        codes, scales = tensor.planes()
        writer.add_q40(label, list(tensor.shape), raw_bytes(codes), raw_bytes(scales))
        return
    with Staging(scratch) as folder:
        tensor.write_in_file(folder, label)
        writer.add_dat_file(label, Path(folder) / f"{label}.dat")


def _has_own_file(kind: type[QTensorTractScaleOnly]) -> bool:
    ours = QTensorTractScaleOnly
    return kind.write_in_file is not ours.write_in_file or kind.write_dat is not ours.write_dat
