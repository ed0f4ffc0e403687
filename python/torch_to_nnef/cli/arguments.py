"""What several commands make of their arguments."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from typer import Option

from torch_to_nnef.exceptions import T2NErrorInvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Json = Annotated[bool, Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, Option("-v", "--verbose", help="Log more, and show tracebacks.")]
_DIGITS = 18  # of a size
_IN_LLM_FOLDERS = ("model/model.nnef.tgz", "model.nnef.tgz")


def archive_in(path: Path) -> Path:
    """The archive of a folder of t2n_export_llm_to_tract; any other path is one itself."""
    return inside(path, _IN_LLM_FOLDERS) or path


def inside(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in `folder`."""
    # Not Path.is_file, which raises for some names.
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)  # noqa: PTH113


def sizes(texts: Sequence[str]) -> dict[str, int]:
    """Of symbols, from `SYMBOL=N`. Raises `T2NErrorInvalidArgument`."""
    pairs = [text.partition("=")[::2] for text in texts]
    if wrong := [
        text
        for text, (name, count) in zip(texts, pairs, strict=True)
        if not name or not count.isdecimal() or len(count) > _DIGITS
    ]:
        raise T2NErrorInvalidArgument(f"--size {wrong[0]}: expected SYMBOL=N")
    return {name: int(count) for name, count in pairs}
