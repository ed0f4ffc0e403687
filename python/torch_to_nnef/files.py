"""Outputs that are whole or not there: written beside their place, made durable, and renamed over what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch_to_nnef._native import Staging, put_in_place
from torch_to_nnef.exceptions import T2NError, T2NErrorRuntime, expect

# As TEMP_PREFIX in src/fsio.rs.
_UNFINISHED = ".t2n-unfinished-"


def as_path(what: str, given: object) -> Path:
    """The path that was given as `what`. Raises `T2NErrorInvalidArgument` for bytes, and for what is no path."""
    expect(what, given, (str, os.PathLike), "a text or a Path")
    return Path(given)  # type: ignore[arg-type]


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; put in place of `path` in one step if the block ends well, else removed.

    Folders above `path` are made, and go again if the block fails. What processes that were killed left beside `path` is removed.
    Raises `T2NErrorRuntime` when the system refuses, `T2NErrorInvalidArgument` where `path` is of another kind (a device, a pipe).
    """
    with Staging(path.parent) as folder:
        beside = Path(folder) / path.name
        yield beside
        put_in_place(beside, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what the system, or Python about a path, says in the block that `path` could not be written, as `T2NErrorRuntime`."""
    try:
        yield
    except T2NError:
        raise
    except (OSError, ValueError) as error:
        # Without the temporary path that `str(error)` has.
        why = getattr(error, "strerror", None) or error
        raise T2NErrorRuntime(f"cannot write {str(placed(path))!r}: {why}") from error


def placed(path: Path) -> Path:
    """`path` as it will be once what is unfinished is in place."""
    return Path(*(part for part in path.parts if not part.startswith(_UNFINISHED)))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block for `folder`; where there are no locks on folders, do not."""
    if os.name != "posix":
        yield
        return
    import fcntl

    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def require_space(path: Path, nbytes: int) -> None:
    """Raise `T2NErrorRuntime` unless the file system that `path` goes to has `nbytes` free. Quotas are not seen."""
    with writing(path):
        there = path.absolute()
        free = shutil.disk_usage(next(folder for folder in (there, *there.parents) if folder.is_dir())).free
    if nbytes > free:
        raise T2NErrorRuntime(
            f"cannot write {path.name!r}: it takes {nbytes:,} bytes, and {free:,} are free on its file system"
        )
