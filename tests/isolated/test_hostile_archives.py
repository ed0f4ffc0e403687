"""Tables of hostile archives: each is a `T2NError` in this process, before tract can crash it. The tables are in malformed.py."""

import gzip
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import malformed
import malformed_operands
import numpy as np
import pytest

from torch_to_nnef import TractModel
from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument, T2NErrorTract

TABLES = {
    "headers": malformed.headers,
    "truncations": lambda: malformed.truncations(29),
    "names": malformed.names,
    "members": lambda: malformed.members(8),
    "graphs": lambda: malformed.graphs(3),
    "operands": malformed_operands.operands,
    "misuses": malformed.misuses,
}
SLOW = {
    "truncations": lambda: malformed.truncations(2),
    "members": lambda: malformed.members(1),
    "graphs": lambda: malformed.graphs(4),
}


def accepted(cases):
    return [what for what, content in cases if not refused(content)]


def refused(content):
    try:
        TractModel.load_bytes(content)
    except T2NError as error:
        return 20 < len(str(error)) < 5000
    return False


@pytest.mark.parametrize("table", TABLES)
def test_each_is_refused(table):
    assert accepted(TABLES[table]()) == []


def test_the_tables_are_large_and_nothing_is_twice_in_them():
    contents = [content for table in TABLES.values() for _, content in table()]
    assert len(contents) >= 2050
    assert len(set(contents)) >= 0.95 * len(contents)


def test_what_they_were_made_from_loads():
    for kind in ("f32", "q40"):
        content = malformed.with_weight(malformed.DATS[kind])
        np.testing.assert_array_equal(
            TractModel.load_bytes(content).run(np.zeros((4, 32), np.float32))["y"], np.zeros((4, 4))
        )


@pytest.mark.parametrize("use", [
    "matmul(x, w, transposeB = true)", 'tract_core_einsum([x, w], expr = "ab,cb->ac", acc = "f32")', "linear(x, w, 0.0)",
    'tract_core_einsum([w, x], expr = "cb,ab->ac", acc = "f32")',
    'tract_core_gather(w, tract_core_cast(x, to = "i64"), axis = 0, datum_type = "f32")',
    "squeeze(matmul(unsqueeze(x, axes = [0]), unsqueeze(w, axes = [0]), transposeB = true), axes = [0])",
    "matmul(x, w, transposeB = copy(true))",
    "conv(unsqueeze(x, axes = [2]), unsqueeze(w, axes = [2]), 0.0, padding = [(0, 0)], stride = [1], dilation = [1], groups = 1)",
])  # fmt: skip
def test_uses_of_packed_weights_that_are_right_load_and_run(use):
    x = np.ones((4, 32), np.float32)
    for content in (
        malformed.with_weight(malformed.packed(64, 32), f"y = {use};", "64, 32"),
        malformed.with_weight(
            malformed.packed(64, 32), "y = f(x, w);", "64, 32",
            malformed.fragment("f", use, "x: tensor<scalar>, w: tensor<scalar>"),
        ),
    ):  # fmt: skip
        assert not TractModel.load_bytes(content).run(x)["y"].any()  # all codes are 8, which is zero


@pytest.mark.parametrize("padded", [
    "pad(i, padding = [(0, 0), (0, 0), (256, 256), (256, 256)])",
    "avg_pool(i, size = [1, 1, 3, 3], padding = [(0, 0), (0, 0), (257, 257), (257, 257)])",
    "conv(i, w, padding = [(256, 256), (256, 256)])",
])  # fmt: skip
def test_padding_is_large_by_what_it_adds(padded):
    weight = malformed.dat((1, 1, 1, 1), 0, 32, 0, bytes(4))
    content = malformed.with_weight(weight, f"i = unsqueeze(x, axes = [0, 1]);\ny = {padded};", "1, 1, 1, 1")
    assert TractModel.load_bytes(content).run(np.ones((4, 32), np.float32))["y"].shape == (1, 1, 516, 544)


@pytest.mark.parametrize("weight", ["f32", "q40"])
def test_a_product_does_not_read_behind_its_operands(weight):
    """tract compares no sizes: it would return what lies in memory there, or crash."""
    product = 'y = tract_core_einsum([x, w], expr = "ab,cb->ac", acc = "f32");'
    content = malformed.with_weight(malformed.DATS[weight], product)
    with pytest.raises(T2NErrorTract, match="must be equal"):
        TractModel.load_bytes(_of_width(content, b"64"))
    model = TractModel.load_bytes(_of_width(content, b"SS"))
    assert model.run(np.ones((4, 32), np.float32))["y"].shape == (4, 4)
    for width in (16, 33, 64, 4096):
        with pytest.raises(T2NErrorInvalidArgument, match="must be equal"):
            model.run(np.ones((4, width), np.float32))


def test_a_refusal_begins_with_its_reason():
    """Not behind the way to it, which may be cut off."""
    body, nested = "y = f0(x, w);", ""
    for i in range(30):
        inner = f"f{i + 1}(x, w)" if i < 29 else "matmul(x, w)"
        nested += malformed.fragment(f"f{i}", inner, "x: tensor<scalar>, w: tensor<scalar>")
    for content in (
        malformed.with_weight(malformed.DATS["q40"], "y = matmul(x, w);"),
        malformed.with_weight(malformed.DATS["q40"], body, fragments=nested),
    ):
        with pytest.raises(T2NErrorTract, match=r"^archive in memory: matmul of a packed side needs transposeB = true"):
            TractModel.load_bytes(content)


def _of_width(content, width):
    return content.replace(b"external<scalar>(shape = [4, 32])", b"external<scalar>(shape = [4, " + width + b"])")


def test_a_bomb_is_refused_before_it_is_inflated():
    """A weight of 2 GiB, of which only the first MiB is there: it is not looked for."""
    info = tarfile.TarInfo("w.dat")
    info.size = 128 + (2 << 30)
    sound = malformed.tar([("graph.nnef", malformed.graph("y = x;"))])[:1024]
    header = malformed.dat((1 << 14, 1 << 15), 0, 32, 0, b"")
    content = gzip.compress(
        sound + info.tobuf() + header[:4] + struct.pack("<I", 2 << 30) + header[8:] + bytes(1 << 20)
    )
    with pytest.raises(T2NErrorTract, match="200 times"):
        TractModel.load_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("table", SLOW)
def test_each_of_the_large_tables_is_refused(table):
    assert accepted(SLOW[table]()) == []


@pytest.mark.slow
def test_the_large_tables_are_larger():
    assert sum(1 for table in SLOW.values() for _ in table()) >= 3200


MUTATED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import malformed
import numpy as np
from torch_to_nnef import TractModel
from torch_to_nnef.exceptions import T2NError
loaded = 0
for what, content in malformed.mutations(1500, int(sys.argv[2])):
    print(what, file=sys.stderr, flush=True)
    try:
        model = TractModel.load_bytes(content)
        loaded += 1
        if [fact.shape for fact in model.inputs] == [(4, 32)]:
            model.run(np.zeros((4, 32), np.float32))
    except T2NError:
        pass
print(loaded)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_3000_mutations_load_and_run_or_are_errors(seed):
    command = [sys.executable, "-c", MUTATED, str(Path(__file__).parent), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-500:]
    assert 10 < int(done.stdout) < 2500
