"""The `.dat` and archive functions of `_native`, as Python sees them; formats are proven in tests/dat_archive."""

import gzip
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_to_nnef import _native
from torch_to_nnef.exceptions import (
    T2NErrorImpossibleQuantization,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)

FORMS = ["folder", "tar", "tgz"]
DTYPES = ["f16", "f32", "f64", "u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "bool"]


def raw(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dat_round_trip(tmp_path, dtype):
    item = 1 if dtype == "bool" else int(dtype[1:]) // 8
    data = noise(6 * item) % 2 if dtype == "bool" else noise(6 * item)
    _native.write_dat(tmp_path / "w.dat", dtype, [2, 3], data)
    name, shape, back = _native.read_dat(str(tmp_path / "w.dat"))
    assert (name, shape) == (dtype, [2, 3])
    assert back.dtype == np.uint8
    assert back.flags.writeable
    np.testing.assert_array_equal(back, data)


@settings(deadline=None)  # a sync of the disk takes what it takes
@given(rows=st.integers(0, 5), groups=st.integers(1, 4), data=st.data())
def test_q40_planes_are_interleaved(tmp_path_factory, rows, groups, data):
    n = rows * groups
    codes, scales = (noise(size * n, data.draw(st.integers(0, 9))) for size in (16, 2))
    path = tmp_path_factory.mktemp("q40") / "w.dat"
    _native.write_dat_q40(path, [rows, 32 * groups], codes, scales)
    dtype, shape, blocks = _native.read_dat(path)
    assert (dtype, shape) == ("q40", [rows, 32 * groups])
    np.testing.assert_array_equal(blocks.reshape(n, 18)[:, :2], scales.reshape(n, 2))
    np.testing.assert_array_equal(blocks.reshape(n, 18)[:, 2:], codes.reshape(n, 16))
    _native.write_dat(path, "q40", shape, blocks)
    np.testing.assert_array_equal(_native.read_dat(path)[2], blocks)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "error"),
    [
        ("bf16", [2], 4, T2NErrorInvalidArgument),
        ("f32", [2], 7, T2NErrorInvalidArgument),
        ("f32", [1] * 9, 4, T2NErrorInvalidArgument),
        ("u8", [2**32], 0, T2NErrorInvalidArgument),
        ("u8", [2**31, 2], 0, T2NErrorInvalidArgument),
        ("q40", [32], 18, T2NErrorImpossibleQuantization),
        ("q40", [2, 16], 18, T2NErrorImpossibleQuantization),
    ],
)
def test_what_a_dat_cannot_hold_is_refused_before_the_first_byte(tmp_path, dtype, shape, nbytes, error):
    with pytest.raises(error):
        _native.write_dat(tmp_path / "w.dat", dtype, shape, np.zeros(nbytes, np.uint8))
    assert not list(tmp_path.iterdir())


def test_planes_must_fit_the_shape_and_each_other(tmp_path):
    for codes, scales in [(16, 4), (32, 2), (31, 4), (16, 2)]:
        with pytest.raises(T2NErrorInvalidArgument):
            _native.write_dat_q40(tmp_path / "w", [2, 32], np.zeros(codes, np.uint8), np.zeros(scales, np.uint8))
    with pytest.raises(T2NErrorInvalidArgument, match="contiguous"):
        _native.write_dat(tmp_path / "w", "u8", [4], np.zeros(8, np.uint8)[::2])
    assert not list(tmp_path.iterdir())


def test_unreadable_dats(tmp_path):
    path = tmp_path / "w.dat"
    with pytest.raises(T2NErrorNotFoundFile):
        _native.read_dat(path)
    path.write_bytes(b"NNEF")
    with pytest.raises(T2NErrorInconsistentTensor, match=r"w\.dat"):
        _native.read_dat(path)


def write(path, form, level=0):
    writer = _native.ArchiveWriter(path, form, level)
    writer.add_text("graph.nnef", "version 1.0;\n")
    writer.add_tensor("layer/weight", "f32", [2], raw(np.array([1, 2], np.float32)))
    writer.add_q40("layer/q", [1, 32], noise(16), noise(2))
    return writer.finish()


@pytest.mark.parametrize("form", FORMS)
def test_archive_round_trip(tmp_path, form):
    path = tmp_path / "m"
    nbytes = write(path, form)
    files = [f for f in path.rglob("*") if f.is_file()] if form == "folder" else [path]
    assert nbytes == sum(f.stat().st_size for f in files)
    entries = [("graph.nnef", 13), ("layer/weight.dat", 136), ("layer/q.dat", 146)]
    assert sorted(_native.archive_entries(path)) == sorted(entries)
    if form != "folder":
        assert _native.archive_entries(path) == entries
    assert _native.archive_read(path, "graph.nnef", 13) == b"version 1.0;\n"
    with pytest.raises(T2NErrorInconsistentTensor):
        _native.archive_read(path, "graph.nnef", 12)
    with pytest.raises(T2NErrorNotFoundFile):
        _native.archive_read(path, "graph.quant", 12)


def test_tarfile_agrees_and_finds_nothing_of_this_host(tmp_path):
    write(tmp_path / "m.tar", "tar")
    write(tmp_path / "m.tgz", "tgz", 9)
    assert gzip.decompress((tmp_path / "m.tgz").read_bytes()) == (tmp_path / "m.tar").read_bytes()
    with tarfile.open(tmp_path / "m.tgz") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == ["graph.nnef", "layer/weight.dat", "layer/q.dat"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in members} == {
            (0, 0, 0, "", "", 0o644, True)
        }
        assert tar.extractfile("layer/weight.dat").read()[128:] == raw(np.array([1, 2], np.float32)).tobytes()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others_are_read(tmp_path, tar_format):
    names = ["graph.nnef", "a" * 90 + "/" + "b" * 60 + ".dat"]
    with tarfile.open(tmp_path / "m.tar", "w", format=tar_format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert _native.archive_entries(tmp_path / "m.tar") == [(name, 3) for name in names]
    assert _native.archive_read(tmp_path / "m.tar", names[1], 3) == b"abc"


def test_an_inflating_tgz_costs_no_memory(tmp_path):
    script = """
import resource, sys
from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorInconsistentTensor
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert _native.archive_entries(sys.argv[1]) == [("graph.nnef", 256 << 20)]
try:
    _native.archive_read(sys.argv[1], "graph.nnef", 1 << 20)
except T2NErrorInconsistentTensor:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
else:
    sys.exit("no error")
"""
    info = tarfile.TarInfo("graph.nnef")
    info.size = 256 << 20
    with gzip.open(tmp_path / "bomb", "wb", 1) as out:
        out.write(info.tobuf())
        for _ in range(256):
            out.write(bytes(1 << 20))
        out.write(bytes(1024))
    subprocess.run([sys.executable, "-c", script, tmp_path / "bomb"], check=True, timeout=60)


@pytest.mark.parametrize("form", FORMS)
def test_labels_and_arguments_are_checked(tmp_path, form):
    writer = _native.ArchiveWriter(tmp_path / "m", form)
    data = np.zeros(1, np.uint8)
    for label in ["../evil", "/evil", "a/../../evil", ".hidden", "a\0b", ""]:
        with pytest.raises(T2NErrorInvalidArgument):
            writer.add_tensor(label, "u8", [1], data)
    writer.add_tensor("w", "u8", [1], data)
    with pytest.raises(T2NErrorInvalidArgument, match="collides"):
        writer.add_tensor("W", "u8", [1], data)
    with pytest.raises(T2NErrorInvalidArgument):
        writer.add_tensor("v", "u8", [2], data)
    writer.finish()
    with pytest.raises(T2NErrorInvalidArgument):
        writer.finish()
    writer.abort()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert _native.archive_entries(tmp_path / "m") == [("w.dat", 129)]


def test_unknown_forms_and_levels(tmp_path):
    for form, level in [("zip", 0), ("tgz", 10)]:
        with pytest.raises(T2NErrorInvalidArgument):
            _native.ArchiveWriter(tmp_path / "m", form, level)
    assert not list(tmp_path.iterdir())


def test_a_writer_dropped_or_aborted_leaves_nothing(tmp_path):
    writer = _native.ArchiveWriter(tmp_path / "m", "folder")
    writer.add_text("a/b/c", "text")
    assert list(tmp_path.iterdir())
    writer.abort()
    writer.abort()
    assert not list(tmp_path.iterdir())
    writer = _native.ArchiveWriter(tmp_path / "m", "tgz")
    del writer
    assert not list(tmp_path.iterdir())


FILL = """
import resource, sys
import numpy as np
from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorRuntime
path, form = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))  # Python ignores SIGXFSZ: writes fail with EFBIG
data = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8)
try:
    if form == "dat":
        _native.write_dat(path, "u8", [data.size], data)
    else:
        writer = _native.ArchiveWriter(path, form)
        writer.add_tensor("w", "u8", [data.size], data)
except T2NErrorRuntime as error:
    assert path in str(error), error
else:
    sys.exit("no error")
"""


@pytest.mark.parametrize("form", [*FORMS, "dat"])
def test_a_full_disk_keeps_the_old_archive_and_leaves_nothing(tmp_path, form):
    path = tmp_path / "m"
    if form == "dat":
        _native.write_dat(path, "u8", [1], np.zeros(1, np.uint8))
    else:
        write(path, form)

    def tree():
        return {str(f): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    before = tree()
    subprocess.run([sys.executable, "-c", FILL, path, form], check=True, timeout=60)
    assert tree() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(T2NErrorNotFoundFile, match="nowhere"):
        _native.ArchiveWriter(tmp_path / "nowhere" / "m", "tar")
    (tmp_path / "file").write_text("")
    with pytest.raises(T2NErrorRuntime):
        _native.ArchiveWriter(tmp_path / "file" / "m", "tar")


def test_ctrl_c_stops_a_write_and_leaves_nothing(tmp_path):
    writer = _native.ArchiveWriter(tmp_path / "m", "tgz", 9)
    data = noise(64 << 20)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            writer.add_tensor("w", "u8", [data.size], data)
    finally:
        timer.join()
    assert not list(tmp_path.iterdir())
    with pytest.raises(T2NErrorInvalidArgument):
        writer.finish()


def test_threads_take_turns(tmp_path):
    writer = _native.ArchiveWriter(tmp_path / "m", "tar")
    workers = [
        threading.Thread(target=writer.add_tensor, args=(f"w{i}", "u8", [1 << 16], np.full(1 << 16, i, np.uint8)))
        for i in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    writer.finish()
    for i in range(8):
        content = _native.archive_read(tmp_path / "m", f"w{i}.dat", 1 << 17)
        assert content[128:] == bytes([i]) * (1 << 16)


def test_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for form in FORMS:
        write(Path(form), form)
        write(form, form)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_put_in_place_replaces_its_kind_only(tmp_path, form):
    (tmp_path / "m").mkdir() if form == "folder" else (tmp_path / "m").write_text("")
    write(tmp_path / "new", form)
    _native.put_in_place(tmp_path / "new", tmp_path / "m")
    assert len(_native.archive_entries(tmp_path / "m")) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(T2NErrorNotFoundFile):
        _native.put_in_place(tmp_path / "new", tmp_path / "m")
    write(tmp_path / "other", "tar" if form == "folder" else "folder")
    with pytest.raises(T2NErrorInvalidArgument, match="exists and is not"):
        _native.put_in_place(tmp_path / "other", tmp_path / "m")
    assert len(_native.archive_entries(tmp_path / "m")) == 3
