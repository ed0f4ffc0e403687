"""Run as a program: kill workers at every STEP-th call to the system, let another go on, compare. Prints how many were killed.

`CHECKPOINT PACKED FOLDER FILES STEP`; PACKED is what one run makes that nobody disturbs.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from torch_to_nnef.llm_tract import shard_work
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.shards import quantize_shards

CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "shutil.rmtree", "os.truncate"}
# The threads of native code do not survive a fork: this process never starts any, its children do.


def work(checkpoint, out, files, log, kill_at=0):
    """In a child; `log` gets a byte for each weight that is packed. The exit status: the number of calls is in `log.calls`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, packed = 0, shard_work._packed

    def watch(event, arguments):
        nonlocal count
        if event in CALLS:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(*arguments):
        made = packed(*arguments)
        with log.open("ab", buffering=0) as file:
            file.write(b".")
        return made

    shard_work._packed = counted
    sys.addaudithook(watch)
    code = 1
    try:
        options = LlmOptions(local_dir=checkpoint, export_dirpath=out, compression_method="q40")
        assert quantize_shards(options, files=files).complete
        code = 0
    finally:
        log.with_suffix(".calls").write_text(str(count))
        os._exit(code)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(checkpoint, packed, folder, files, step):
    wanted, out, log = content(packed), folder / "out", folder / "log"

    def begin():
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)
        out.mkdir()
        shutil.copy(packed / "quantize-shards.json", out)

    begin()
    assert work(checkpoint, out, files, log) == 0
    assert content(out) == wanted
    calls, tensors = int(log.with_suffix(".calls").read_text()), log.stat().st_size
    points = range(1, calls, step)
    for point in points:
        begin()
        assert work(checkpoint, out, files, log, point) == -signal.SIGKILL
        assert work(checkpoint, out, files, log) == 0
        assert content(out) == wanted, f"killed at {point} of {calls}"
        # The one that was being written when the kill came.
        assert log.stat().st_size <= tensors + 1, (
            f"killed at {point}: {log.stat().st_size} weights packed, not {tensors}"
        )
    print(len(points))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
