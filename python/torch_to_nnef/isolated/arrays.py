"""Arrays in `.npz` files, under any name, never as pickles."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument, T2NErrorNotFoundFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file, by name.

    Raises `T2NErrorNotFoundFile`, and `T2NErrorInvalidArgument` if it is anything else: pickles are not read.
    """
    if not os.path.isfile(path):  # noqa: PTH113  # unlike Path.is_file, it has an answer for any name
        raise T2NErrorNotFoundFile(f"no arrays at {str(path)!r}")
    with opened_npz(path) as file:
        arrays = dict(file)
    if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise T2NErrorInvalidArgument(f"{str(path)!r} holds more than arrays: {', '.join(others)}")
    return arrays


@contextmanager
def opened_npz(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The arrays of an `.npz` file, read as they are asked for. Raises `T2NErrorInvalidArgument` if it has none, or other objects."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            yield file
    except T2NError:
        raise
    except (
        ValueError, OSError, EOFError, AttributeError, TypeError, KeyError, SyntaxError, NotImplementedError, RuntimeError,
        OverflowError, MemoryError, zipfile.BadZipFile, zlib.error, tokenize.TokenError,
    ) as error:  # fmt: skip
        raise T2NErrorInvalidArgument(f"{str(path)!r} is not an .npz file of plain arrays: {error}") from error


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an `.npz` file; unlike `numpy.savez`, which takes some names as its own arguments. The same arrays give the same bytes.

    Raises `T2NErrorInvalidArgument` for arrays of Python objects.
    """
    if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
        raise T2NErrorInvalidArgument(f"arrays of Python objects: {', '.join(objects)}")
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
