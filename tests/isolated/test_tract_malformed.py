"""Archives that are broken or hostile: each gives a `T2NError` in this process, soon, and leaves it working."""

import gzip
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from malformed import fragment, graph, tar, text

from torch_to_nnef import TractModel, _native
from torch_to_nnef.exceptions import T2NError, T2NErrorInconsistentTensor, T2NErrorTract

W = 'w = variable<scalar>(shape = [4, 32], label = "w");\n'


def dat(shape=(4, 32), payload=None, *, magic=b"\x4e\xef\x01\x00", size=None, rank=None, bits=32, item=0, vendor=0):
    payload = bytes(int(np.prod(shape)) * 4) if payload is None else payload
    dims = [*shape, *[0] * 8][:8]
    declared = len(payload) if size is None else size
    head = magic + struct.pack("<II8IIHH", declared, len(shape) if rank is None else rank, *dims, bits, item, vendor)
    return head.ljust(128, b"\0") + payload


Q40 = {"bits": 0xFFFFFFFF, "item": 0x3040, "vendor": 0x5452}


def weight(content, body="y = matmul(x, w, transposeB = true);"):
    return tar([("graph.nnef", graph(W + body)), ("w.dat", content)])


def quant(content):
    return tar([("graph.nnef", graph('y = tract_core_cast(x, to = "i8");')), ("graph.quant", content)])


SOUND = weight(dat())
SELF = fragment("f", "f(a)")
PACKED = dat((4, 32), bytes(4 * 18), **Q40)

CONTAINERS = {
    "nothing": b"",
    "one byte": b"\x1f",
    "noise": bytes(range(256)) * 8,
    "zeros": bytes(10240),
    "a truncated tar": SOUND[:700],
    "a tar cut in a weight": SOUND[: SOUND.index(b"\x4e\xef") + 200],
    "a truncated gzip": gzip.compress(SOUND)[:-20],
    "a gzip with a wrong checksum": gzip.compress(SOUND)[:-8] + bytes(8),
    "a gzip of noise": gzip.compress(bytes(range(256)) * 8),
    "a gzip bomb in the graph": gzip.compress(tar([("graph.nnef", b" " * (257 << 20))]), 1),
    "two graphs": tar([("graph.nnef", graph("y = x;"))] * 2),
    "the same weight twice": tar([("graph.nnef", graph(W + "y = x + w;")), *[("w.dat", dat())] * 2]),
    "a symbolic link": tar([("graph.nnef", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": tar([("graph.nnef", b"")], type=tarfile.LNKTYPE, linkname="x"),
    "a device": tar([("graph.nnef", b"")], type=tarfile.CHRTYPE),
    "an absolute name": tar([("graph.nnef", graph("y = x;")), ("/w.dat", dat())]),
    "a name that climbs": tar([("graph.nnef", graph("y = x;")), ("../w.dat", dat())]),
    "no graph": tar([("w.dat", dat())]),
    "a graph in a folder": tar([("a/graph.nnef", graph("y = x;"))]),
    "a model in a model": tar([("graph.nnef", graph("y = x;")), ("a.nnef.tar", SOUND)]),
}

WEIGHTS = {
    "an empty weight": weight(b""),
    "half a header": weight(dat()[:64]),
    "wrong magic": weight(dat(magic=b"\x4e\xee\x01\x00")),
    "version 9": weight(dat(magic=b"\x4e\xef\x09\x09")),
    "rank 9": weight(dat(rank=9)),
    "rank 4 billion": weight(dat(rank=0xFFFFFFFF)),
    "an unknown type": weight(dat(item=77)),
    "an unknown vendor": weight(dat(vendor=77)),
    "0 bits": weight(dat(bits=0)),
    "a payload that is missing": weight(dat(payload=b"", size=512)),
    "a payload of 4 GB declared": weight(dat((32768, 32767), b"", size=4294836224)),
    "a payload smaller than the shape": weight(dat(payload=bytes(256))),
    "a payload larger than the shape": weight(dat(payload=bytes(1024))),
    "bytes after the payload": weight(dat() + b"more"),
    "sizes whose product overflows": weight(dat((0xFFFFFFFF,) * 8, b"")),
    "Q40 rows of 31": weight(dat((4, 31), bytes(72), **Q40)),
    "Q40 of rank 1": weight(dat((32,), bytes(18), **Q40)),
    "Q40 without its last block": weight(dat((4, 32), bytes(54), **Q40)),
    "Q40 of 2 GB declared": weight(dat((65536, 65504), b"", size=2414739456, **Q40)),
    "another shape than the graph's": weight(dat((32, 4))),
    "a packed weight smaller than the graph says": weight(dat((2, 32), bytes(36), **Q40)),
    "a packed weight in a sum": weight(PACKED, "y = x + w;"),
    "a packed weight transposed": weight(PACKED, "y = transpose(w, axes = [1, 0]) + 1.0;"),
}

GRAPHS = {
    "an empty text": tar([("graph.nnef", b"")]),
    "not UTF-8": tar([("graph.nnef", graph("y = x;") + b"# \xff")]),
    "no version": text("y = x;", head=""),
    "no extensions but a quote": text("y = x;", head='version 1.0;\nextension "'),
    "an unknown registry": text("y = x;", head="version 1.0;\nextension tract_registry nope;\n"),
    "a syntax error": text("y = = x;"),
    "an unclosed bracket": text("y = relu(x;"),
    "an unopened bracket": text("y = relu(x));"),
    "an unclosed string": text('y = f(x, "a);'),
    "a result without assignment": text("z = x;"),
    "an unknown operator": text("y = nope(x);"),
    "an unknown variable": text("y = relu(nope);"),
    "a variable without data": text(W + "y = x + w;"),
    "a missing argument": text("y = exp();"),
    "half the arguments": text("y = add(x);"),
    "a string input": tar([("graph.nnef", graph("y = x;").replace(b"scalar", b"string"))]),
    "a fragment without its result": text("y = f(x);", "fragment f(a: scalar) -> (b: scalar) { c = a; }\n"),
    "an axis out of range": text("y = transpose(x, axes = [5, 0]);"),
    "an axis twice": text("y = transpose(x, axes = [0, 0]);"),
    "a slice that ends before it begins": text("y = slice(x, axes = [0], begin = [3], end = [2]);"),
    "a concatenation on axis 9": text("y = concat([x, x], axis = 9);"),
    "a padding of a billion rows": text("y = pad(x, padding = [(0, 1000000000), (0, 0)]);"),
    "tiles by the billion": text("y = tile(x, repeats = [1000000000, 1000000000]);"),
    "20 000 brackets": text(f"y = {'(' * 20_000}x{')' * 20_000};"),
    "20 000 calls": text(f"y = {'relu(' * 20_000}x{')' * 20_000};"),
    "30 calls, a doubling each": text(f"y = {'relu(' * 30}x{')' * 30};"),
    "100 000 signs": text(f"y = {'-' * 100_000}x;"),
    "100 000 sums": text(f"y = x{' + x' * 100_000};"),
    "20 000 brackets on the left": text(f"{'[' * 20_000}y{']' * 20_000} = x;"),
    "20 000 brackets in a type": text("y = x;", fragment("f", "a", f"a: {'(' * 20_000}scalar{')' * 20_000}")),
    "a fragment that applies itself": text("y = f(x);", SELF),
    "one nobody applies": text("y = x;", SELF),
    "two that apply each other": text("y = f(x);", fragment("f", "g(a)") + fragment("g", "f(a)")),
    "one that is its own loop body": text("y = f(x);", fragment("f", 'tract_core_scan(body = "f")')),
    "one that redefines +": text("y = x + x;", fragment("add", "a + a", "a: scalar, c: scalar")),
    "one under tract's relu": text("y = relu(x);", fragment("max", "relu(a)", "a: scalar, c: scalar")),
    "fragments that double 40 times": text(
        "y = f0(x);", "".join(fragment(f"f{i}", f"f{i + 1}(a) + f{i + 1}(a)") for i in range(40))
    ),
    "1000 fragments deep": text("y = f0(x);", "".join(fragment(f"f{i}", f"f{i + 1}(a)") for i in range(1000))),
    "4 bits": quant(b'"y": zero_point_linear_quantize(zero_point=0, scale=0.1, bits=4, signed=true, symmetric=false);'),
    "a quantization that is noise": quant(b"((((("),
    "a quantization that is not UTF-8": quant(b"\xff\xfe"),
}


@pytest.mark.parametrize(
    ("content", "error"),
    [pytest.param(content, T2NError, id=name) for name, content in CONTAINERS.items()]
    + [pytest.param(content, (T2NErrorInconsistentTensor, T2NErrorTract), id=name) for name, content in WEIGHTS.items()]
    + [pytest.param(content, T2NErrorTract, id=name) for name, content in GRAPHS.items()],
)
def test_a_broken_archive_is_an_error_and_nothing_worse(tmp_path, capfd, content, error):
    path = tmp_path / "archive.nnef"
    path.write_bytes(content)
    start = time.monotonic()
    for load, source in ((TractModel.load, path), (TractModel.load_bytes, content)):
        with pytest.raises(error) as raised:
            load(source)
        message = str(raised.value)
        assert ("archive.nnef" if source is path else "archive in memory") in message
        assert 20 < len(message) < 5000
    assert time.monotonic() - start < 10
    assert capfd.readouterr().err == ""


def test_what_they_were_made_from_loads():
    x = np.ones((4, 32), np.float32)
    np.testing.assert_array_equal(TractModel.load_bytes(SOUND).run(x)["y"], np.zeros((4, 4)))
    np.testing.assert_array_equal(TractModel.load_bytes(weight(PACKED)).run(x)["y"], np.zeros((4, 4)))
    np.testing.assert_array_equal(TractModel.load_bytes(text("y = f(x);", fragment("f", "a + a"))).run(x)["y"], x + x)


def test_preflight_alone_says_the_same(tmp_path):
    path = tmp_path / "m.tar"
    path.write_bytes(SOUND)
    assert _native.preflight(path) is None
    path.write_bytes(GRAPHS["a fragment that applies itself"])
    with pytest.raises(T2NErrorTract, match=r"m\.tar: graph\.nnef: fragment f applies itself"):
        _native.preflight(path)
    path.write_bytes(WEIGHTS["half a header"])
    with pytest.raises(T2NErrorInconsistentTensor, match=r"m\.tar: w\.dat: 64 bytes"):
        _native.preflight(path)


LARGE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from malformed import text
from torch_to_nnef import TractModel
model = TractModel.load_bytes(text("y = tile(x, repeats = [1228800, 1]);"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (900 << 20),) * 2)
try:
    model.run(np.ones((4, 32), np.float32))
except MemoryError:
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory it has from /proc")
def test_outputs_for_which_there_is_no_memory():
    """600 MiB that tract has, and numpy has not."""
    command = [sys.executable, "-c", LARGE, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr[-500:]
