"""Whatever fails while an output is written, it is the complete old or the complete new one, and nothing else is left."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from durable import calls, problems

from torch_to_nnef import _native, files
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile, T2NErrorRuntime

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_shim = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="calls fail through a C library that is preloaded: Linux, cc"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", path, HERE / "shim.c", "-ldl"], check=True)
    return path


def injected(shim, folder, most, *before):
    """What inject.py prints."""
    paths = [*sys.path, str(HERE), str(HERE.parent / "llm")]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, HERE / "inject.py", shim, folder, str(most)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A folder where syncs cost nothing, if the system has one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=shared if os.access(shared, os.W_OK) else tmp_path_factory.mktemp("m")
    ) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def strace(tmp_path_factory):
    """The command before another, and the file it writes; none where processes may not be looked at."""
    trace = tmp_path_factory.mktemp("strace") / "trace"
    command = ["strace", "-f", "-y", "-s", "0", "--seccomp-bpf", "-o", trace, "-e"]
    traced = "trace=openat,write,pwrite64,writev,fsync,fdatasync,/^mkdir,/^rename,/^link,/^unlink,rmdir"
    try:
        works = subprocess.run([*command, traced, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        works = False
    return ([*command, traced], trace) if works else ([], None)


@pytest.fixture(scope="module")
def few(shim, memory, strace):
    return injected(shim, memory / "few", 1, *strace[0])


@needs_shim
def test_outputs_are_whole_whatever_fails(few):
    assert few["wrong"] == []
    assert sum(few["counts"].values()) >= 200


@needs_shim
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_outputs_are_whole_whichever_call_fails(shim, memory):
    every = injected(shim, memory / "every", 0)
    assert every["wrong"] == []
    assert sum(every["counts"].values()) >= 1000


@needs_shim
def test_no_power_loss_takes_what_was_whole(few):
    assert {name: problems(notes) for name, notes in few["traces"].items()} == {name: [] for name in few["traces"]}
    assert all(
        sum(note[0] == "fsync" for note in notes)
        for name, notes in few["traces"].items()
        if not name.startswith("scratch")
    )


@needs_shim
def test_the_system_gets_the_calls_in_that_order(few, memory, strace):
    if strace[1] is None:
        pytest.skip("no strace that may look at processes: it shows the calls the system gets")
    seen = list(calls(strace[1].read_text(errors="replace").splitlines(), str(memory / "few")))
    marks = [at for at, (kind, path, _) in enumerate(seen) if kind == "mkdir" and Path(path).name in ("begin", "end")]
    for (name, notes), begin, end in zip(few["traces"].items(), marks[::2], marks[1::2], strict=True):
        there = [call for call in seen[begin + 1 : end] if "/place" in call[1]]
        assert problems(there) == [], name
        assert [path for kind, path, _ in there if kind == "fsync"] == [n[1] for n in notes if n[0] == "fsync"], name


def test_a_check_of_orders_sees_what_is_wrong():
    good = [("create", "/d/.t2n-x", ""), ("write", "/d/.t2n-x", ""), ("fsync", "/d/.t2n-x", "")]
    placed = [("rename", "/d/.t2n-x", "/d/x"), ("fsync", "/d", "")]
    assert problems([*good, *placed]) == []
    assert problems([*good[:2], *placed]) == ["/d/x is put in place before /d/.t2n-x is synced", "/d/x is never synced"]
    assert problems([*good, placed[0]]) == ["/d is never synced"]
    assert problems([*good, placed[0], ("remove", "/d/.t2n-x/old", ""), placed[1]]) == [
        "/d/.t2n-x/old is removed before /d is synced"
    ]


# Two at a time


NAMES = ["m.nnef", "m.nnef.tar", "m.nnef.tgz", "w.dat", "report.md"]
EXPORTER = """
import sys
import numpy as np
from pathlib import Path
from torch_to_nnef import files
from torch_to_nnef._native import ArchiveWriter, write_dat, write_text
version, folder = int(sys.argv[1]), Path(sys.argv[2])
data = np.full(1 << 16, version, np.uint8)
for _ in range(25):
    for name, form in (("m.nnef", "folder"), ("m.nnef.tar", "tar"), ("m.nnef.tgz", "tgz")):
        with files.staged(folder / "deep" / name) as beside:
            writer = ArchiveWriter(beside, form)
            writer.add_text("graph.nnef", str(version))
            for label in ("a", "b/c"):
                writer.add_tensor(label, "u8", [len(data)], data)
            writer.finish()
    write_dat(folder / "w.dat", "u8", [len(data)], data)
    write_text(folder / "report.md", str(version) * 100_000)
"""


def parts(path):
    """Content of every entry by name, of one archive, whatever takes its place meanwhile."""
    if path.is_file():
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            return {entry.name: tar.extractfile(entry).read() for entry in tar}
    folder = os.open(path, os.O_RDONLY)
    try:
        found = {}
        for name in ("graph.nnef", "a.dat", "b/c.dat"):
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
                found[name] = file.read()
        return found
    finally:
        os.close(folder)


def versions(folder):
    """Of every part of every output that is there."""
    for name in ("m.nnef", "m.nnef.tar", "m.nnef.tgz"):
        with contextlib.suppress(FileNotFoundError):  # not yet; or a folder that is being removed
            found = parts(folder / "deep" / name)
            assert len(found) == 3
            yield (
                name,
                {content if key == "graph.nnef" else str(content[-1]).encode() for key, content in found.items()},
            )
    with contextlib.suppress(FileNotFoundError, T2NErrorNotFoundFile):
        yield "w.dat", {str(value).encode() for value in set(_native.read_dat(folder / "w.dat")[2].tolist())}
        yield "report.md", {bytes([byte]) for byte in (folder / "report.md").read_bytes()}


def test_of_two_exporters_the_last_complete_one_wins(tmp_path):
    running = [subprocess.Popen([sys.executable, "-c", EXPORTER, v, tmp_path]) for v in ("1", "2")]
    looks = 0
    try:
        while any(process.poll() is None for process in running):
            looks += 1
            assert [name for name, found in versions(tmp_path) if found not in ({b"1"}, {b"2"})] == []
    finally:
        codes = [process.wait() for process in running]
    assert codes == [0, 0]
    assert looks > 3
    assert [name for name, found in versions(tmp_path) if found in ({b"1"}, {b"2"})] == NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "report.md", "w.dat"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["m.nnef", "m.nnef.tar", "m.nnef.tgz"]


def test_the_one_that_ends_last_stays_though_it_began_first(tmp_path):
    for make in (Path.write_text, lambda path, text: (path.mkdir(), (path / text).touch())):
        path = tmp_path / make.__name__
        with files.staged(path) as first:
            with files.staged(path) as second:
                make(second, "second")
            make(first, "first")
        assert (path.read_text() if path.is_file() else path.glob("*").__next__().name) == "first"
        assert len(list(tmp_path.glob(".*"))) == 0


# What comes before and after


def test_only_files_are_replaced_by_files_and_folders_by_folders(tmp_path):
    """Not a device, a pipe, or a link to a folder: /dev/null is still one afterwards."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        with (
            pytest.raises(T2NErrorInvalidArgument, match="exists and is not a file"),
            files.staged(tmp_path / name) as x,
        ):
            x.write_text("")
    for name in ("link", "pipe"):
        with pytest.raises(T2NErrorInvalidArgument, match="is not a folder"), files.staged(tmp_path / name) as x:
            x.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def writers():
    import torch

    from torch_to_nnef import export_tensors_to_nnef
    from torch_to_nnef.tensor.quant import quantize_q40, save_safetensors

    packed = quantize_q40(torch.ones(2, 32))
    tensors = {"w": torch.ones(3), "q": packed}

    def staged(path):
        with files.staged(path) as beside, files.writing(beside):
            beside.write_text("")

    return {
        "staged": staged,
        "text": lambda path: _native.write_text(path, ""),
        "archive": lambda path: _native.ArchiveWriter(path, "tar").finish(),
        "folder": lambda path: _native.ArchiveWriter(path, "folder").finish(),
        "safetensors": lambda path: save_safetensors(tensors, path),
        "tensors": lambda path: export_tensors_to_nnef(tensors, path),
        "tensor": lambda path: packed.write_in_file(path, "x"),
    }


@pytest.mark.parametrize("place", ["x" * 256, "file/x", "a\0b"], ids=["too long", "in a file", "no name"])
def test_errors_name_what_the_user_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    for name, write in writers().items():
        with pytest.raises(T2NErrorRuntime) as caught:
            write(tmp_path / place)
        assert str(tmp_path / place.partition("/")[0]).partition("\0")[0] in str(caught.value), name
        assert ".t2n-" not in str(caught.value), name
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_the_dead_left_goes_and_what_is_alive_stays(tmp_path):
    dead = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import os
from torch_to_nnef._native import ArchiveWriter, Staging
writer = ArchiveWriter({str(tmp_path / "m.nnef.tar")!r}, "tar")
with Staging({str(tmp_path)!r}):
    print("ready", flush=True)
    os.read(0, 1)
""",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert dead.stdout.readline() == b"ready\n"
    assert len(list(tmp_path.iterdir())) == 2
    _native.write_text(tmp_path / "x", "")
    assert len(list(tmp_path.iterdir())) == 3
    dead.kill()
    dead.communicate()
    assert len(list(tmp_path.iterdir())) == 3
    _native.write_text(tmp_path / "x", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_end_of_a_fork_takes_nothing_from_its_parent(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from torch_to_nnef import files
with files.staged(Path({str(tmp_path / "out")!r})) as beside:
    beside.write_text("whole")
    if os.fork() == 0:
        sys.exit()
    assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_too_little_space_is_said_before_the_first_byte(tmp_path, monkeypatch):
    import torch

    from torch_to_nnef import export_tensors_to_nnef
    from torch_to_nnef.export import export_model_to_nnef
    from torch_to_nnef.inference_target import TractNNEF
    from torch_to_nnef.tensor.quant import save_safetensors

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    tensors = {"w": torch.ones(501)}
    writes = {
        "w.safetensors": lambda path: save_safetensors(tensors, path),
        "tensors": lambda path: export_tensors_to_nnef(tensors, path),
        "m.nnef.tar": lambda path: export_model_to_nnef(
            torch.nn.Linear(32, 16), torch.ones(1, 32), path, TractNNEF.latest()
        ),
    }
    for name, write in writes.items():
        with pytest.raises(T2NErrorRuntime, match=f"{name}.*takes 2,[01][0-9]+ bytes, and 2,000 are free"):
            write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_space_is_that_of_the_folder_itself(tmp_path, monkeypatch):
    """Which may be a mount point."""
    usage, seen = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or usage)
    (tmp_path / "old").write_text("")
    for name in (".", "old", "new/deep"):
        files.require_space(tmp_path / name, 1)
    assert seen == [tmp_path] * 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_command_that_is_told_to_end_leaves_nothing(tmp_path, name):
    code = f"""
import os, signal, sys, time
from pathlib import Path
from torch_to_nnef import files
from torch_to_nnef.cli.outcome import outcome
signal.signal(signal.SIGINT, signal.default_int_handler)
with outcome(verbose=False), files.staged(Path({str(tmp_path / "a/b/out")!r})) as beside:
    beside.mkdir()
    (beside / "file").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    assert len(list(tmp_path.rglob("file"))) == 1
    number = getattr(signal, name)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert said in (b"terminated\n", b"interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_a_run_are_written_beside_their_place(tmp_path, monkeypatch):
    from torch_to_nnef import isolated
    from torch_to_nnef.cli.archives import run

    def save(path, arrays):
        assert path.parent.name.startswith(".t2n-unfinished-")  # which a later run sweeps
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(isolated, "run", lambda *_, **__: {})
    monkeypatch.setattr(isolated, "save_arrays", save)
    (tmp_path / "y.npz").write_text("old")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "m.nnef.tar", tmp_path / "x.npz", tmp_path / "y.npz", force=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_the_command_for_language_models_leaves_nothing_when_it_is_ended(tmp_path, name):
    paths = os.pathsep.join([*sys.path, str(HERE.parent / "llm")])
    make = "import sys; from pathlib import Path; from tiny import tiny_llama; tiny_llama(Path(sys.argv[1]))"
    command = """
import signal, sys
from torch_to_nnef.cli import t2n_export_llm_to_tract
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
sys.exit(t2n_export_llm_to_tract())
"""
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", make, tmp_path / "tiny"], env=environment, check=True)
    command = [sys.executable, "-c", command, "-d", tmp_path / "tiny", "-e", tmp_path / "new/out", "-c", "min_max_q4_0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 600
    while not list(tmp_path.glob("new/.t2n-*/out/model/*")):  # the archive has begun
        assert process.poll() is None
        assert time.monotonic() < until
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if name == "SIGKILL" else 128 + getattr(signal, name)), said
    if name == "SIGKILL":
        assert len(list((tmp_path / "new").iterdir())) == 1
        subprocess.run(command, env=environment, check=True, capture_output=True)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
