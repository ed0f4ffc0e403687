"""What runs in the child process. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from torch_to_nnef.exceptions import T2NError
from torch_to_nnef.isolated.jobs import JOBS
from torch_to_nnef.isolated.process import NO_MEMORY


def main() -> NoReturn:
    """Answer the request in the folder named on the command line, and end at once."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit(request["memory"], request["seconds"])
    text = json.dumps(_answer(folder, request), allow_nan=False)
    (folder / "answer.json").write_text(text, encoding="utf-8")
    os._exit(0)  # what tract left behind is not destroyed in order, which could crash


def _answer(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"done": JOBS[request["job"]](folder, Path(request["archive"]), **request["details"])}
    except MemoryError as error:
        kind, message = "T2NErrorTractLimit", f"{request['archive']}: {error}"
    except T2NError as error:
        kind, message = type(error).__name__, str(error)
    except Exception as error:
        kind, message = "T2NErrorTractCrash", f"{request['archive']}: {type(error).__name__}: {error}"
    if kind == "T2NErrorTractLimit" or any(text in message for text in NO_MEMORY):
        allowed = f"{request['memory'] >> 20} MiB allowed (--memory)"
        return {"error": "T2NErrorTractLimit", "message": f"{message}; that is more than the {allowed}"}
    return {"error": kind, "message": message}


def _end_with_parent() -> NoReturn:
    while os.read(0, 4096):  # not through sys.stdin, whose lock the end of the interpreter would want
        pass
    os._exit(1)


def _limit(memory: int, seconds: float) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: memory,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 2,  # a second line: the parent looks at the clock
    }
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))
