"""What a power loss could undo, read from the calls of a process: `problems`; and those calls, as strace prints them: `calls`."""

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

Call = tuple[str, str, str]
"""Kind, path, and the other path of those that have two."""

_QUOTED = r'(?:AT_FDCWD<[^>]*>|\d+<(?P<dir{0}>[^>]*)>)?(?:, )?"(?P<path{0}>[^"]*)"'
_LINES = (
    ("create", re.compile(r"openat\(" + _QUOTED.format(1) + r", [A-Z_|]*O_CREAT")),
    ("write", re.compile(r"p?writev?(?:64)?\(\d+<(?P<path1>[^>]*)>(?!\(deleted)")),
    ("fsync", re.compile(r"f(?:data)?sync\(\d+<(?P<path1>[^>]*)>(?!\(deleted)")),
    ("mkdir", re.compile(r"mkdir(?:at)?\(" + _QUOTED.format(1))),
    ("remove", re.compile(r"(?:unlink(?:at)?|rmdir)\(" + _QUOTED.format(1))),
    ("link", re.compile(r"link(?:at)?\(" + _QUOTED.format(1) + ", " + _QUOTED.format(2))),
    ("rename", re.compile(r"rename(?:at2?)?\(" + _QUOTED.format(1) + ", " + _QUOTED.format(2))),
)


def calls(lines: Iterable[str], folder: str) -> Iterator[Call]:
    """Those that went well, on absolute paths in `folder`; `lines` of `strace -f -y`."""
    begun: dict[str, str] = {}
    for line in lines:
        process, _, text = line.strip().partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[process] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = begun.pop(process, "") + text[resumed.end() :]
        for kind, pattern in _LINES:
            found = pattern.match(text)
            if found and not re.search(r"\) += -1 ", text):
                parts = found.groupdict()
                paths = [_joined(parts.get(f"dir{i}"), parts.get(f"path{i}") or "") for i in (1, 2)]
                if paths[0].startswith(folder):
                    yield kind, *paths
                break


def _joined(folder: str | None, path: str) -> str:
    return f"{folder}/{path}" if folder and not path.startswith("/") else path


def problems(notes: Iterable[Call]) -> list[str]:
    """Where a name was given to what was not on disk, something was removed before its successor was there, or the end was not synced."""
    found: list[str] = []
    dirty: set[str] = set()  # files with content, and folders with names, that are not on disk
    for kind, path, to in notes:
        if kind in ("rename", "exchange", "link"):
            if kind != "link" and not _hidden(to):
                late = sorted(d for d in dirty if d == path or d.startswith(f"{path}/"))
                found += [f"{to} is put in place before {d} is synced" for d in late]
            dirty = {to + d[len(path) :] if d == path or d.startswith(f"{path}/") else d for d in dirty}
            dirty.add(_parent(to))
        elif kind == "fsync":
            dirty.discard(path)
        elif kind in ("create", "mkdir"):
            dirty |= {path} if kind == "create" else set()
            dirty |= set() if PurePosixPath(path).name.startswith(".t2n-") else {_parent(path)}
        elif kind == "write" and not path.endswith(" (deleted)"):  # else it has no name, and ends with the process
            dirty.add(path)
        elif kind == "remove":
            found += [f"{path} is removed before {d} is synced" for d in sorted(dirty) if not _hidden(d)]
            dirty = {d for d in dirty if d != path and not d.startswith(f"{path}/")}
    return found + [f"{d} is never synced" for d in sorted(dirty) if not _hidden(d)]


def _hidden(path: str) -> bool:
    """Whether it is, or is in, something unfinished."""
    return any(part.startswith(".t2n-") for part in PurePosixPath(path).parts)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)
