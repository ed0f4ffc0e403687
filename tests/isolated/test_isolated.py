"""tract in a child process: what comes back whatever happens there, and what the commands make of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import malformed
import numpy as np
import pytest
from typer.testing import CliRunner

from torch_to_nnef import isolated
from torch_to_nnef.cli.main import app
from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
    T2NErrorTract,
    T2NErrorTractCrash,
    T2NErrorTractLimit,
)
from torch_to_nnef.isolated import process
from torch_to_nnef.isolated.process import ask, working_folder

X = np.ones((4, 32), np.float32)
SOUND = malformed.with_weight(malformed.DATS["f32"], "y = matmul(x, w, transposeB = true) + 1.0;")
# Runs for minutes in little memory: products of 2048 x 2048 that depend on the input.
LONG = malformed.text(
    "a0 = tile(x, repeats = [512, 64]);\n"
    + "".join(f"a{i + 1} = matmul(a{i}, a{i});\n" for i in range(400))
    + "y = a400;"
)


@pytest.fixture
def archive(tmp_path):
    """Writes an archive; without an argument, a sound one: y = x @ w.T + 1 with w = 0."""

    def write(content=SOUND):
        path = tmp_path / "m.nnef.tar"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    return run


def test_verify_says_what_goes_in_and_comes_out(archive):
    found = isolated.verify(archive())
    assert found["ok"]
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": [4, 32]}]
    assert found["outputs"] == [{"name": "y", "dtype": "float32", "shape": [4, 4], "non_finite": 0, "expected": None}]
    assert found["weight_bytes"] >= 512


def test_run_gives_what_this_process_would(archive, tmp_path):
    for inputs in ({"x": X}, tmp_path / "x.npz"):
        isolated.save_arrays(tmp_path / "x.npz", {"x": X})
        outputs = isolated.run(archive(), inputs)
        np.testing.assert_array_equal(outputs["y"], np.ones((4, 4)))
    with pytest.raises(T2NErrorInvalidArgument, match="neither input nor output: z"):
        isolated.run(archive(), {"x": X, "z": X})
    with pytest.raises(T2NErrorInvalidArgument, match="missing: x"):
        isolated.run(archive(), {})


def test_expected_outputs_are_compared(archive, tmp_path):
    isolated.save_arrays(tmp_path / "in.npz", {"x": X})
    nan, inf = np.full((4, 4), np.nan, np.float32), np.full((4, 4), np.inf, np.float32)
    right = np.ones((4, 4), np.float32)
    for expected, ok in (
        (right, True),
        (right + 0.001, False),
        (right[:2], False),
        (nan, False),
        (inf, False),
        (right.astype(int), False),
    ):
        isolated.save_arrays(tmp_path / "out.npz", {"y": expected})
        found = isolated.verify(archive(), [tmp_path / "in.npz", tmp_path / "out.npz"])
        assert found["ok"] is ok is found["outputs"][0]["expected"]["ok"]
        json.dumps(found, allow_nan=False)


def test_expected_integers_are_compared_exactly(archive, tmp_path):
    body = malformed.graph("y = copy(x);").replace(b"<scalar>", b"<integer>")
    path, large = archive(malformed.tar([("graph.nnef", body)])), np.full((4, 32), 2**60)
    for expected, ok in ((large, True), (large + 1, False)):
        isolated.save_arrays(tmp_path / "io.npz", {"x": large, "y": expected})
        assert isolated.verify(path, tmp_path / "io.npz")["ok"] is ok


@pytest.mark.parametrize("dims", ["B", "2*B+1", "(B+3)/2", "B, S", "B*S", "B-3"])
def test_symbols_have_sizes(archive, dims):
    content = malformed.tar([("graph.nnef", malformed.graph("y = x + 1.0;").replace(b"[4, 32]", f"[{dims}]".encode()))])
    shape = isolated.verify(archive(content), sizes={"B": 4})["inputs"][0]["shape"]
    assert shape == {"B": [4], "2*B+1": [9], "(B+3)/2": [3], "B, S": [4, 3], "B*S": [12], "B-3": [1]}[dims]


def test_the_child_has_no_torch_and_nothing_from_the_current_folder(archive, tmp_path, monkeypatch):
    for name in ("numpy", "json", "torch"):
        (tmp_path / f"{name}.py").write_text("import os; os.abort()")
    monkeypatch.chdir(tmp_path)
    assert isolated.verify(archive())["ok"]
    script = "import sys, torch_to_nnef.isolated.child; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd="/", env=os.environ | {"PYTHONPATH": process._PACKAGE_FOLDER}
    )


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGILL", "SIGBUS"])
def test_a_crash_is_an_error(archive, name, monkeypatch):
    _when_running(monkeypatch, lambda child: child.send_signal(getattr(signal, name)))
    with pytest.raises(T2NErrorTractCrash, match=rf"m\.nnef\.tar: running it ended its process with signal {name}"):
        isolated.verify(archive(LONG))


def _when_running(monkeypatch, act):
    """Call `act` with the child once it runs an archive."""
    popen = subprocess.Popen

    def start(command, **options):
        child = popen(command, **options)
        stage = Path(command[-1]) / "stage"

        def wait():
            while child.poll() is None and not (stage.is_file() and "running" in stage.read_text()):
                time.sleep(0.02)
            time.sleep(0.2)
            act(child)

        threading.Thread(target=wait, daemon=True).start()
        return child

    monkeypatch.setattr(process.subprocess, "Popen", start)


def test_limits_of_time_and_memory_are_errors(archive):
    with pytest.raises(T2NErrorTractLimit, match=r"took more than 2 seconds \(--seconds\)"):
        isolated.verify(archive(LONG), limits=isolated.Limits(seconds=2))
    large = malformed.graph("y = x;").replace(b"[4, 32]", b"[99999, 99999]")
    for content in (malformed.text("y = tile(x, repeats = [16000000, 1]);"), malformed.tar([("graph.nnef", large)])):
        with pytest.raises(T2NErrorTractLimit, match="1024 MiB allowed"):
            isolated.verify(archive(content), limits=isolated.Limits(memory=1024))
    with pytest.raises(T2NErrorTractLimit):
        isolated.verify(archive(), limits=isolated.Limits(memory=60))
    for wrong in (
        {"memory": 0},
        {"memory": -1},
        {"memory": 1 << 44},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
    ):
        with pytest.raises(T2NErrorInvalidArgument):
            isolated.Limits(**wrong)


def test_errors_in_the_child_keep_their_type(archive, tmp_path):
    with pytest.raises(T2NErrorInconsistentTensor, match=r"m\.nnef\.tar: w\.dat"):
        isolated.verify(archive(malformed.with_weight(b"")))
    with pytest.raises(T2NErrorNotFoundFile):
        isolated.verify(tmp_path / "nothing")
    with pytest.raises(T2NErrorNotFoundFile, match=r"nothing\.npz"):
        isolated.verify(archive(), [tmp_path / "nothing.npz"])
    for path in (Path("a" * 5000), Path("a\0")):
        with pytest.raises(T2NErrorNotFoundFile):
            isolated.verify(path)
        with pytest.raises(T2NErrorNotFoundFile):
            isolated.verify(archive(), [path])
    with working_folder() as folder, pytest.raises(T2NErrorTractCrash, match="KeyError"):
        ask("no such job", folder, archive(), isolated.Limits())


def test_what_fails_on_zeros_may_be_given_others(archive, tmp_path):
    """A division of whole numbers, which tract cannot do by zero."""
    body = 'i = tract_core_cast(x, to = "i64");\ny = 6 / i;'
    with pytest.raises(T2NErrorTract, match=r"Division by zero .*; x were zeros \(--npz gives others\)"):
        isolated.verify(archive(malformed.text(body)))
    isolated.save_arrays(tmp_path / "x.npz", {"x": X})
    assert isolated.verify(archive(malformed.text(body)), [tmp_path / "x.npz"])["ok"]


def test_a_system_without_room_for_a_child_is_an_error(archive, monkeypatch):
    def no_process(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process.subprocess, "Popen", no_process)
    with pytest.raises(T2NErrorRuntime, match=r"no process for tract: .*temporarily"):
        isolated.verify(archive())


def test_what_a_child_told_last_is_passed_on(tmp_path):
    for told, shown in [
        ("Traceback (most recent call last):\n  File x\nOSError: disk full\n", "exit code 1: OSError: disk full"),
        ("thread main has overflowed its stack\nmore\n", "exit code 1: thread main has overflowed its stack"),
    ]:
        (tmp_path / "stderr").write_text(told)
        with pytest.raises(T2NErrorTractCrash, match=f"{shown}$"):
            process._answer(tmp_path, tmp_path, 1, 1 << 30)


@pytest.mark.parametrize(
    "answer", ["", "[]", "{", "[" * 100_000, '{"error": "SystemExit"}', '{"error": "os", "message": 1}', "\0", "1"]
)
def test_an_answer_that_is_none_is_a_crash(archive, tmp_path, answer):
    (tmp_path / "answer.json").write_text(answer)
    (tmp_path / "stderr").write_text("")
    with pytest.raises(T2NErrorTractCrash):
        process._answer(tmp_path, archive(), 0, 1 << 30)


CHILD_OF = """
import sys
from torch_to_nnef import isolated
print("started", flush=True)
isolated.verify(sys.argv[1])
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_the_child_ends_with_its_parent(archive, name):
    path = archive(LONG)
    environment = os.environ | {"PYTHONPATH": process._PACKAGE_FOLDER}
    command = [sys.executable, "-c", CHILD_OF, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        parent.stdout.readline()
        children = _wait_for(lambda: Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        time.sleep(0.5)
        parent.send_signal(getattr(signal, name))
        parent.wait(10)
    _wait_for(lambda: not any(_is_alive(child) for child in children))


def _is_alive(child):
    try:
        return "torch_to_nnef" in Path(f"/proc/{child}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for(condition):
    end = time.monotonic() + 10
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_inspect_reads_headers_and_text(archive):
    properties = (
        "fragment tract_core_properties() -> (properties: (string, tensor<scalar>)[])\n"
        '{ properties = [("who", "a \\"quote\\""), ("n", 3)]; }\n'
    )
    text = malformed.graph(
        malformed.W.format("64, 32") + 'z = tract_core_external(shape = [B, S+P], datum_type = "i64");\ny = x;',
        properties,
    )
    text = text.replace(b"net(x) -> (y)", b'net(x, z, i"c.d") -> (y, i"a.b")')
    content = malformed.tar([
        ("graph.nnef", text), ("w.dat", malformed.packed(64, 32)), ("a/b.dat", malformed.DATS["i8"]),
        ("bias.dat", malformed.dat((8,), 0, 32, 0, bytes(32))), (".hidden.dat", b"noise"),
    ])  # fmt: skip
    found = isolated.inspect(archive(content))
    assert found["graph"] == "net"
    assert found["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": [4, 32]},
        {"name": "z", "dtype": "int64", "shape": ["B", "S+P"]},
        {"name": "c.d", "dtype": None, "shape": None},
    ]
    assert found["outputs"] == ["y", "a.b"]
    assert found["properties"] == {"who": 'a "quote"', "n": "3"}
    assert found["entries"][1] == {"name": "w.dat", "bytes": 128 + 64 * 18, "dtype": "q40", "shape": [64, 32]}
    weights = found["weights"]
    assert weights["by_dtype"]["q40"] == {"tensors": 1, "bytes": 64 * 18}
    assert weights["by_dtype"]["int8"] == {"tensors": 1, "bytes": 128}
    assert weights["elements"] == 2048 + 128
    assert weights["bits_per_weight"] == pytest.approx((2048 * 4.5 + 128 * 8) / 2176)


def test_commands_exit_with_the_codes_of_the_contract(archive, command, tmp_path):
    isolated.save_arrays(tmp_path / "x.npz", {"x": X})
    isolated.save_arrays(tmp_path / "wrong.npz", {"y": np.zeros((4, 4), np.float32)})
    sound, broken = archive(), tmp_path / "broken.tar"
    broken.write_bytes(b"noise" * 1000)
    for args, code in [
        (["verify", sound], 0), (["verify", sound, "--npz", "wrong.npz"], 1),
        (["verify", broken], 1), (["verify", "nothing"], 2), (["verify", sound, "--npz", "nothing"], 2),
        (["verify", sound, "--size", "B"], 2), (["verify", sound, "--size", f"B={'9' * 5000}"], 2), (["inspect", "a" * 5000], 2),
        (["verify", sound, "--seconds", 0], 2), (["verify", sound, "--memory", 50], 1), (["verify", sound, "--no-such"], 2),
        (["inspect", sound], 0), (["inspect", broken], 2),
        (["run", sound, "x.npz", "y.npz"], 0), (["run", sound, "x.npz", "y.npz"], 2), (["run", sound, "x.npz", "y.npz", "--force"], 0),
        (["run", sound, "wrong.npz", "z.npz"], 2), (["run", sound, "x.npz", "no/z.npz"], 2),
    ]:  # fmt: skip
        done = command(*args, "--json")
        assert done.exit_code == code, (args, done.output)
        if "--no-such" not in args and "--seconds" not in args:
            assert json.loads(done.stdout)["ok"] is (code == 0), args
    for args, code, told in [
        (["verify", sound], 0, "x: float32[4, 32], zeros"), (["verify", sound, "--npz", "wrong.npz"], 1, "16 values differ"),
        (["run", sound, "x.npz", "y.npz", "--force"], 0, "y: float32[4, 4]"), (["inspect", sound], 0, "w.dat: float32[4, 32], 640 bytes"),
    ]:  # fmt: skip
        done = command(*args)
        assert (done.exit_code, told in done.stdout) == (code, True), done.output
    np.testing.assert_array_equal(isolated.load_arrays(tmp_path / "y.npz")["y"], np.ones((4, 4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.tar",
        "m.nnef.tar",
        "wrong.npz",
        "x.npz",
        "y.npz",
    ]


def test_a_device_or_pipe_is_not_replaced_even_by_force(archive, command, tmp_path):
    isolated.save_arrays(tmp_path / "x.npz", {"x": X})
    os.mkfifo(tmp_path / "y.npz")  # as /dev/null, which root may replace
    done = command("run", archive(), "x.npz", "y.npz", "--force")
    assert done.exit_code == 2
    assert "is not a file" in done.stderr
    assert (tmp_path / "y.npz").is_fifo()


def test_an_interrupt_is_130_and_ends_the_child(archive, command, monkeypatch):
    ended = []
    _when_running(monkeypatch, lambda child: (ended.append(child), os.kill(os.getpid(), signal.SIGINT)))
    assert command("verify", archive(LONG)).exit_code == 130
    assert ended[0].poll() is not None


def test_names_do_not_speak_to_the_terminal(archive, command, tmp_path):
    text = malformed.graph("y = x;").replace(b"graph net(x)", b'graph i"\x1b[2Jnet"(x)')
    named = malformed.graph('i"\x1b[2Jy" = x + 1.0;').replace(b"(y)", b'(i"\x1b[2Jy")')
    unknown = malformed.graph("y = i'\x1b[2Jz'(x);")
    isolated.save_arrays(tmp_path / "x.npz", {"x": X})
    for args, content, code in [
        (["inspect"], text, 0), (["verify"], named, 0), (["run", "x.npz", "y.npz"], named, 0),
        (["verify"], unknown, 1), (["run", "x.npz", "z.npz"], unknown, 2), (["verify", "--json"], unknown, 1),
    ]:  # fmt: skip
        done = command(args[0], archive(malformed.tar([("graph.nnef", content)])), *args[1:])
        assert done.exit_code == code, done.output
        assert "\x1b" not in done.output
        assert "2J" in done.output


def test_help_is_quick():
    environment = os.environ | {"PYTHONPATH": process._PACKAGE_FOLDER}
    script = "import sys; from torch_to_nnef.cli import t2n; sys.argv[1:] = ['verify', '--help']\ntry: t2n()\n"
    script += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "in a child process with limits" in re.sub(r"\s+", " ", done.stdout)
