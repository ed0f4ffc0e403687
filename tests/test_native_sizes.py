"""Numbers at the edges of 32 and 64 bits: an error of ours, before a byte is allocated, read or written."""

import re

import numpy as np
import pytest

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument

EDGES = (2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**200, -1, -(2**63), -(2**64))
BYTES = np.zeros(64, np.uint8)
FLOATS = np.zeros(64, np.float32)
CODES, SCALES = np.zeros(32, np.uint8), np.zeros(4, np.uint8)
CALLS = {
    "write_dat": lambda path, n: _native.write_dat(path, "u8", [n], BYTES),
    "write_dat of rank 8": lambda path, n: _native.write_dat(path, "f64", [1, n] * 4, BYTES),
    "write_dat without elements": lambda path, n: _native.write_dat(path, "f32", [0, n, 1, n], BYTES),
    "write_dat_q40": lambda path, n: _native.write_dat_q40(path, [n, 32], CODES, SCALES),
    "write_dat_q40 of width": lambda path, n: _native.write_dat_q40(path, [2, n], CODES, SCALES),
    "check_dats": lambda path, n: _native.check_dats([("w", "u8", [n, n])]),
    "compression level": lambda path, n: _native.ArchiveWriter(path, "tgz", n),
    "weighted": lambda path, n: _native.q40_quantize_weighted(FLOATS, n, FLOATS, "w", CODES, SCALES),
    "hessian": lambda path, n: _native.q40_quantize_hessian(
        FLOATS, n, FLOATS, 0.0, FLOATS, np.zeros(32, np.uint32), FLOATS, 1, "w", CODES, SCALES
    ),
    "threads": lambda path, n: _native.Model.load(path, None, n),
    "threads of bytes": lambda path, n: _native.Model.load_bytes(b"", None, n),
    "most bytes": lambda path, n: _native.archive_read(path, "graph.nnef", n),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_at_the_edges(name, tmp_path):
    for number in EDGES:
        with pytest.raises(T2NError) as raised:
            CALLS[name](tmp_path / "w", number)
        if not 0 <= number < 2**64:
            assert raised.type is T2NErrorInvalidArgument
            assert re.search(rf"{number}\b.* is out of range", str(raised.value))
        assert not list(tmp_path.iterdir())


def test_what_is_no_number_is_a_type_error(tmp_path):
    with pytest.raises(TypeError):
        _native.write_dat(tmp_path / "w", "u8", ["2"], BYTES)
