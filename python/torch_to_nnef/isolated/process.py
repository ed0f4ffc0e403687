"""The child process: how it is started, limited and ended, and what its end means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_to_nnef import exceptions
from torch_to_nnef._native import Staging
from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorInvalidArgument,
    T2NErrorRuntime,
    T2NErrorTractCrash,
    T2NErrorTractLimit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
_MOST_MIB = 1 << 40  # what `setrlimit` can tell, and more than any machine has
_ANSWER_BYTES = 64 * MIB
_STDERR_BYTES = 2000  # that are looked at
# It imports what this process would, from the same folders, but never from the current one.
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); from torch_to_nnef.isolated.child import main; main()"
)
_PACKAGE_FOLDER = str(Path(__file__).parents[2])
# Threads of numpy's libraries reserve address space for each core.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
# How running out of memory is told.
NO_MEMORY = ("memory allocation of", "failed to allocate", "Unable to allocate", "MemoryError", "cannot start a thread")


@dataclass(frozen=True)
class Limits:
    """What the child may use; systems without `setrlimit` (Windows) know only the limit of time.

    memory: MiB of address space, of a file it writes too; None: 4096, and four times the size of the archive.
    seconds: of wall time, from the start of the process.
    """

    memory: int | None = None
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if not (self.memory is None or 0 < self.memory < _MOST_MIB) or not 0 < self.seconds < 1e7:
            raise T2NErrorInvalidArgument(
                f"limits are above 0, of memory below {_MOST_MIB} MiB, of seconds below 1e7; not {self}"
            )

    def bytes_for(self, archive: Path) -> int:
        """Of address space."""
        if self.memory is not None:
            return self.memory * MIB
        files = archive.rglob("*") if archive.is_dir() else [archive]
        size = 4096 * MIB + 4 * sum(file.stat().st_size for file in files if file.is_file())
        return min(size, _MOST_MIB * MIB)  # a sparse file may claim more


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for what the child is given and what it gives; those of processes that were killed go.

    Raises `T2NErrorRuntime` if the system has no place for it, or for a child.
    """
    try:
        with Staging(Path(tempfile.gettempdir())) as folder:
            yield Path(folder)
    except OSError as error:
        raise T2NErrorRuntime(f"no process for tract: {error}") from error


def ask(job: str, folder: Path, archive: Path, limits: Limits, **details: Any) -> Any:
    """What the function `job` of `isolated.jobs` returns in a child process, as JSON.

    Raises the `T2NError` that it raised there; `T2NErrorTractLimit` and `T2NErrorTractCrash` if it did not come to an end of its own.
    """
    memory = limits.bytes_for(archive)
    request = {"job": job, "archive": str(archive), "memory": memory, "seconds": limits.seconds, "details": details}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    paths = [*(path for path in sys.path if path), _PACKAGE_FOLDER]
    command = [sys.executable, "-I", "-c", _START, json.dumps(paths), str(folder)]
    with (folder / "stderr").open("wb") as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the child
        )
        with child:
            try:
                code = child.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                raise T2NErrorTractLimit(
                    f"{archive}: {_stage(folder)} took more than {limits.seconds:g} seconds (--seconds)"
                ) from None
            finally:
                child.kill()
                child.wait()
    return _answer(folder, archive, code, memory)


def _answer(folder: Path, archive: Path, code: int, memory: int) -> Any:
    path = folder / "answer.json"
    if code or not path.is_file() or path.stat().st_size > _ANSWER_BYTES:
        raise _ended(folder, archive, code, memory)
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        error, message = answer.get("error"), str(answer.get("message"))
    except (ValueError, AttributeError, RecursionError) as why:
        raise T2NErrorTractCrash(f"{archive}: the process that ran tract gave no answer: {why}") from None
    if error is None:
        return answer["done"]
    kind = getattr(exceptions, str(error), None)
    raise (kind if isinstance(kind, type) and issubclass(kind, T2NError) else T2NErrorTractCrash)(message)


def _ended(folder: Path, archive: Path, code: int, memory: int) -> T2NError:
    """Of a child without an answer."""
    with (folder / "stderr").open("rb") as file:
        said = file.read(_STDERR_BYTES).decode(errors="replace")
    lines = said.strip().splitlines() or [""]
    told = lines[-1 if lines[0].startswith("Traceback") else 0]
    where = f"{archive}: {_stage(folder)}"
    if no_memory := next((line for line in lines if any(text in line for text in NO_MEMORY)), None):
        return T2NErrorTractLimit(f"{where}: {no_memory}; that is more than the {memory // MIB} MiB allowed (--memory)")
    if code == -getattr(signal, "SIGXCPU", 0):
        return T2NErrorTractLimit(f"{where} took more time than allowed (--seconds)")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return T2NErrorTractCrash(f"{where} ended its process with {how}{f': {told}' if told else ''}")


def _stage(folder: Path) -> str:
    """What the child was about, as it noted itself."""
    path = folder / "stage"
    return path.read_text(encoding="utf-8")[:100] if path.is_file() else "starting"
