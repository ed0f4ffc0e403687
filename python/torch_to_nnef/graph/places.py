"""The user's own line: out of a traceback, out of the frames that are running, out of a graph of TorchScript."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import nn

from torch_to_nnef.graph.torchscript import interpreter

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OURS = f"{Path(__file__).parents[1]}{os.sep}"
# Where torch decides what a symbolic size is: not who asked for it.
_MACHINERY = tuple(_TORCH + part for part in ("fx" + os.sep, "__init__.py", "_export" + os.sep, "utils" + os.sep))


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the user's source. `module` is the path of the module it ran in."""

    file: str
    line: int
    function: str
    module: str
    text: str = ""

    @property
    def source(self) -> str:
        """The line itself, where it can be read."""
        return self.text or linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        function = f" in {self.function}" if self.function else ""
        module = f" (module `{self.module}`)" if self.module else ""
        return f"{self.file}:{self.line}{function}{module}" + (f"\n      {self.source}" if self.source else "")


def is_users(file: str) -> bool:
    """Whether `file` is source, neither torch's nor ours."""
    return not file.startswith((_TORCH, _OURS, "<"))


def module_names(model: nn.Module) -> dict[int, str]:
    """Id of each module -> its path."""
    return {id(module): name for name, module in model.named_modules()}


def running_place(modules: Mapping[int, str]) -> tuple[Place | None, bool]:
    """The user's innermost line, and whether a line of theirs, not one of torch's operators, asked what a size is."""
    here = sys._getframe(1)
    files = (frame.f_code.co_filename for frame, _ in _outward(here))
    asked = next((f for f in files if f == interpreter.__file__ or not f.startswith((*_MACHINERY, _OURS))), _TORCH)
    return _innermost(_outward(here), modules), not asked.startswith(_TORCH)


def raised(error: BaseException, modules: Mapping[int, str]) -> Place | None:
    """The user's innermost line that `error`, or what it came from, went through."""
    seen: BaseException | None = error
    while seen is not None:
        place = _innermost(list(_of_traceback(seen.__traceback__))[::-1], modules)
        if place is not None:
            return place
        seen = seen.__cause__ or seen.__context__
    return None


def _outward(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _of_traceback(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _innermost(frames: Iterable[tuple[FrameType, int]], modules: Mapping[int, str]) -> Place | None:
    """`frames` from the innermost outward, up to the forward of the model."""
    found: tuple[str, int, str, str] | None = None
    for frame, line in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if found is None and file == interpreter.__file__ and "node" in frame.f_locals:
            located = interpreter.location(frame.f_locals["node"])
            found = (*located[:2], "", located[2]) if located else None
        elif found is None and is_users(file):
            found = (file, line, name, "")
        path = modules.get(id(frame.f_locals.get("self")))
        if found is not None and path is not None:
            return Place(*found[:3], module=path, text=found[3])
    return None
