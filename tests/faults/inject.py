"""Run as a program, with shim.c preloaded: make calls fail while outputs are written, and print what was not whole as JSON.

`SHIM FOLDER MOST`: at most MOST places a kind of output and of fault; 0: all.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from written import KINDS, Kind

from torch_to_nnef.exceptions import T2NError

FAIL, SHORT, SIGNAL = 1, 2, 3


class Terminated(BaseException):
    """What SIGTERM raises here, as in the commands."""


@dataclass(frozen=True)
class Fault:
    """op: calls of this kind ("*": all). value: errno or signal. ever: all from the n-th on. harmless: the output is written."""

    op: str
    action: int
    value: int = 0
    ever: bool = False
    harmless: bool = False

    def __str__(self):
        what = {
            FAIL: lambda: errno.errorcode[self.value],
            SHORT: lambda: "half",
            SIGNAL: lambda: signal.Signals(self.value).name,
        }
        return f"{self.op} {what[self.action]()}{' for ever' if self.ever else ''}"


FAULTS = (
    Fault("write", FAIL, errno.ENOSPC, ever=True),
    Fault("write", FAIL, errno.EIO),
    Fault("write", FAIL, errno.EFBIG, ever=True),
    Fault("write", SHORT, harmless=True),
    Fault("write", SHORT, ever=True, harmless=True),
    Fault("write", FAIL, errno.EINTR, harmless=True),
    Fault("create", FAIL, errno.ENOSPC, ever=True),
    Fault("create", FAIL, errno.EMFILE),
    Fault("open", FAIL, errno.EIO),
    Fault("mkdir", FAIL, errno.ENOSPC, ever=True),
    Fault("fsync", FAIL, errno.EIO),
    Fault("fsync", FAIL, errno.ENOSPC, ever=True),
    Fault("rename", FAIL, errno.EIO),
    Fault("rename", FAIL, errno.EACCES, ever=True),
    Fault("exchange", FAIL, errno.EIO),
    Fault("exchange", FAIL, errno.ENOSYS, ever=True, harmless=True),
    Fault("lock", FAIL, errno.ENOLCK, ever=True, harmless=True),
    Fault("link", FAIL, errno.EPERM, ever=True, harmless=True),
    Fault("remove", FAIL, errno.EIO),
    Fault("remove", FAIL, errno.EACCES, ever=True),
    *(Fault("*", SIGNAL, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
)


class Shim:
    """The preloaded library."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.t2n_notes.restype = ctypes.c_char_p

    def arm(self, folder: Path, fault: Fault | None = None, nth: int = 0) -> None:
        fault = fault or Fault("*", 0)
        self._library.t2n_arm(str(folder).encode(), fault.op.encode(), nth, fault.action, int(fault.value), fault.ever)

    def disarm(self) -> None:
        self._library.t2n_arm(b"", b"", 0, 0, 0, 0)

    def notes(self) -> list[list[str]]:
        return [line.split("\t") for line in self._library.t2n_notes().decode().splitlines()]


Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Content by name; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")
    }


def unfinished(found: Tree) -> list[str]:
    """Names that a writer gives until it ends, the outermost ones."""
    return [name for name in found if f"/{name}".count("/.t2n-") == 1 and name.split("/")[-1].startswith(".t2n-")]


def whole(found: Tree, old: Tree, new: Tree, together: bool) -> bool:
    """Whether all is old or all is new, or each file is."""
    if together:
        return found in (old, new)
    names = {*found, *old, *new}
    return all(found.get(name, "none") in (old.get(name, "none"), new.get(name, "none")) for name in names)


class Case:
    """One kind of output, over an older one or not."""

    def __init__(self, shim: Shim, name: str, kind: Kind, over: bool, base: Path) -> None:
        self.shim, self.kind, self.base = shim, kind, base
        self.name = f"{name} over an older one" if over else name
        self.place, self.start = base / "place", base / "start"
        self.start.mkdir(parents=True)
        if over:
            kind.write(self.start, 0)
            (self.start / "out").is_dir() and (self.start / "out" / "mine.txt").write_text("the user's")
        self.reset()
        self.old = tree(self.place)
        (base / "begin").mkdir()  # marks for strace
        shim.arm(self.place)
        kind.write(self.place, 1)
        (base / "end").mkdir()
        self.notes = shim.notes()
        shim.disarm()
        self.new = tree(self.place)

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.start, self.place)

    def places(self, op: str, most: int, turn: int) -> list[int]:
        """Calls to hit, counted from 1; others at each turn."""
        count = sum(op in ("*", note[0]) for note in self.notes)
        step = max(1, -(-count // most)) if most else 1
        return list(range(1 + turn * 7 % step, count + 1, step))

    def inject(self, fault: Fault, nth: int) -> str | None:
        """What is wrong after it."""
        self.reset()
        error = (
            self._killed(fault, nth)
            if fault.value == signal.SIGKILL and fault.action == SIGNAL
            else self._caught(fault, nth)
        )
        found = tree(self.place)
        if isinstance(error, str):
            return error
        left = unfinished(found)
        rest = {name: content for name, content in found.items() if "/.t2n-" not in f"/{name}"}
        if error is None and rest != self.new and not self.kind.quiet:
            return "it returned, and the output is not the new one"
        if fault.harmless and error is not None:
            return f"raised {error!r}"
        if error is not None and not isinstance(error, (T2NError, KeyboardInterrupt, Terminated)):
            return "".join(traceback.format_exception(error))
        if ".t2n-unfinished" in str(error):
            return f"a path that no user knows: {error}"
        killed = isinstance(error, Terminated) and fault.value == signal.SIGKILL
        # What is unfinished may itself fail to go, or to be opened for that.
        if len(left) > (1 if killed or fault.op in ("remove", "open") else 0):
            return f"left {left}"
        if not whole(rest, self.old, self.new, self.kind.together):
            return f"neither old nor new: {sorted(rest)}"
        if not self.kind.rewritten:
            (self.place / "cache.npz").unlink(missing_ok=True)
        self.kind.write(self.place, 1)
        if tree(self.place) != self.new:
            return f"the next run leaves {sorted(tree(self.place))}"
        return None

    def _caught(self, fault: Fault, nth: int) -> BaseException | None:
        try:
            try:
                self.shim.arm(self.place, fault, nth)
                self.kind.write(self.place, 1)
            finally:
                self.shim.disarm()
            for _ in range(100):
                pass  # a signal that was raised at the end is handled here
        except BaseException as error:
            return error.with_traceback(None) if isinstance(error, T2NError) else error
        return None

    def _killed(self, fault: Fault, nth: int) -> BaseException | str | None:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            self.shim.arm(self.place, fault, nth)
            self.kind.write(self.place, 1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, -signal.SIGKILL):
            return f"the child ended with {status}"
        return Terminated() if status else None


def main(shim: Shim, base: Path, most: int) -> dict[str, object]:
    def terminate(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    wrong, traces = [], {}
    for name, kind in KINDS.items():
        for over in (False, True) if kind.rewritten else (False,):
            case = Case(shim, name, kind, over, base / f"{name}{over}")
            traces[case.name] = case.notes
            for turn, fault in enumerate(FAULTS):
                for nth in case.places(fault.op, most, turn):
                    counts[case.name] += 1
                    if problem := case.inject(fault, nth):
                        wrong.append(f"{case.name}, {fault}, call {nth}: {problem}")
    return {"counts": counts, "wrong": wrong, "traces": traces}


if __name__ == "__main__":
    print(json.dumps(main(Shim(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
