"""`_native.q40_*` against gguf-py, and the checks of the binding."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument

ENCODERS = ["signed_extreme", "abs_max", "min_max", "scale_search"]
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def raw(x):
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def planes(n):
    return np.empty(n // 2, np.uint8), np.empty(n // 16, np.uint8)


def quantize(x, encoder, dtype="f32", percentile=1.0):
    codes, scales = planes(x.size)
    _native.q40_quantize(raw(x), dtype, encoder, percentile, "w", codes, scales)
    return codes, scales


def dequantize(codes, scales, dtype="f32", size=4):
    data = np.empty(codes.size * 2 * size, np.uint8)
    _native.q40_dequantize(codes, scales, dtype, data)
    return data


def joined(codes, scales):
    blocks = np.empty(codes.size // 16 * 18, np.uint8)
    _native.q40_join(codes, scales, blocks)
    return blocks


def weights(rows=64, columns=1024, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-4, 3, (rows, 1))).astype(np.float32)


def test_blocks_are_those_of_gguf():
    x = weights()
    blocks = joined(*quantize(x, "signed_extreme"))
    np.testing.assert_array_equal(blocks, gguf.quants.quantize(x, Q4_0).reshape(-1))


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (4, 64), elements=st.floats(-4096, 4096, width=32)))
def test_blocks_are_those_of_gguf_on_any_floats(x):
    x[np.abs(x) < 1e-30] = 0.0  # below, gguf-py divides by zero; -0.0 gives its scale another sign
    codes, scales = quantize(x, "signed_extreme")
    theirs = gguf.quants.quantize(x, Q4_0).reshape(-1, 18)
    ours = joined(codes, scales).reshape(-1, 18)
    vanished = theirs[:, :2].view(np.float16)[:, 0] == 0
    np.testing.assert_array_equal(ours[~vanished], theirs[~vanished])
    np.testing.assert_array_equal(ours[vanished, 2:], theirs[vanished, 2:])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_values_are_those_gguf_decodes(encoder):
    codes, scales = quantize(weights(seed=1), encoder, percentile=0.95)
    theirs = gguf.quants.dequantize(joined(codes, scales).reshape(1, -1), Q4_0)
    np.testing.assert_array_equal(dequantize(codes, scales).view(np.float32), theirs.reshape(-1))


def test_split_undoes_join():
    codes, scales = quantize(weights(), "scale_search")
    codes_back, scales_back = planes(codes.size * 2)
    _native.q40_split(joined(codes, scales), codes_back, scales_back)
    np.testing.assert_array_equal(codes_back, codes)
    np.testing.assert_array_equal(scales_back, scales)


def test_given_scales_give_the_codes_back():
    codes, scales = quantize(weights(), "scale_search")
    again = np.empty_like(codes)
    _native.q40_quantize_with_scales(dequantize(codes, scales), "f32", "w", scales, again)
    np.testing.assert_array_equal(again, codes)


def test_errors_rank_as_documented():
    x = weights(seed=2)

    def error(encoder, percentile=1.0):
        values = dequantize(*quantize(x, encoder, percentile=percentile)).view(np.float32)
        groups = x.reshape(-1, 32).astype(np.float64)
        return ((groups - values.reshape(-1, 32)) ** 2).sum(1) / (groups**2).sum(1)

    reference = error("signed_extreme")
    assert (error("scale_search") <= reference * (1 + 1e-6)).all()
    assert (error("min_max", 0.97) <= reference * (1 + 1e-6)).all()
    assert error("scale_search").mean() < 0.9 * reference.mean()
    assert error("abs_max").mean() > reference.mean()


@pytest.mark.parametrize(("dtype", "size"), [("f16", 2), ("bf16", 2)])
def test_half_types(dtype, size):
    x = np.random.default_rng(3).standard_normal(4096).astype(np.float32)
    x = x.astype(np.float16) if dtype == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)
    widened = x.astype(np.float32) if dtype == "f16" else (x.astype(np.uint32) << 16).view(np.float32)
    codes, scales = quantize(x, "scale_search", dtype)
    for ours, theirs in zip((codes, scales), quantize(widened, "scale_search"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    narrow, wide = dequantize(codes, scales, dtype, size), dequantize(codes, scales).view(np.float32)
    if dtype == "f16":
        np.testing.assert_array_equal(narrow.view(np.float16), wide.astype(np.float16))
    else:
        kept = (narrow.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert (np.abs(kept - wide) <= np.abs(wide) * 2.0**-8).all()


def test_unaligned_inputs_and_outputs():
    x = weights()
    expected = quantize(x, "scale_search")
    shifted = np.empty(x.nbytes + 1, np.uint8)[1:]
    shifted[:] = raw(x)
    codes, scales = np.empty(x.size // 2 + 1, np.uint8)[1:], np.empty(x.size // 16 + 1, np.uint8)[1:]
    _native.q40_quantize(shifted, "f32", "scale_search", 1.0, "w", codes, scales)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    _native.q40_dequantize(codes, scales, "f32", shifted)
    np.testing.assert_array_equal(shifted, dequantize(*expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 524033.0])
def test_refusals_name_the_tensor_and_the_place(bad):
    x = np.ones(4096, np.float32)
    x[[99, 3000]] = bad
    with pytest.raises(T2NErrorImpossibleQuantization, match=r'"w": 2 value\(s\).*flat index 99;'):
        quantize(x, "scale_search")


@pytest.mark.parametrize(
    "call",
    [
        lambda: quantize(np.ones(31, np.float32), "abs_max"),
        lambda: quantize(np.ones(32, np.float32), "nearest"),
        lambda: quantize(np.ones(32, np.float32), "abs_max", "f64"),
        lambda: quantize(np.ones(32, np.float32), "min_max", percentile=0.0),
        lambda: _native.q40_join(np.zeros(16, np.uint8), np.zeros(4, np.uint8), np.zeros(18, np.uint8)),
        lambda: _native.q40_split(np.zeros(36, np.uint8)[::2], *planes(32)),
        lambda: _native.q40_dequantize(*planes(32), "f32", np.frombuffer(bytes(128), np.uint8)),
    ],
    ids=["length", "encoder", "dtype", "percentile", "planes", "strided", "read-only"],
)
def test_arguments_are_checked(call):
    with pytest.raises(T2NErrorInvalidArgument):
        call()
