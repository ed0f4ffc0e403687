import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.verify.compare import Comparison, compare

EXACT, CLOSE, APPROXIMATE, SUPER = (
    TractCheckTolerance.EXACT,
    TractCheckTolerance.CLOSE,
    TractCheckTolerance.APPROXIMATE,
    TractCheckTolerance.SUPER,
)
inf, nan = math.inf, math.nan
finite = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_verdict_and_distances_are_the_formulas(data):
    shape = data.draw(array_shapes(max_dims=3, max_side=5))
    a = data.draw(arrays(np.float32, shape, elements=finite))
    b = data.draw(arrays(np.float32, shape, elements=finite))
    result = compare(torch.from_numpy(a), b, APPROXIMATE)
    error = np.abs(a.astype(np.float64) - b)
    outside = error > 1e-4 + 5e-4 * np.abs(a.astype(np.float64))
    assert result.ok == (not outside.any())
    assert result.outside == outside.sum()
    assert result.outside_share == outside.mean()
    assert result.max_abs == error.max()
    assert result.rmse == pytest.approx(math.sqrt((error**2).mean()))
    assert result.reference_at_worst == a[result.worst_index]
    assert result.actual_at_worst == b[result.worst_index]
    assert outside[result.worst_index] == outside.any()
    assert -1 <= result.cosine <= 1
    if result.relative_rmse not in (0, inf):
        assert result.snr_db == pytest.approx(-20 * math.log10(result.relative_rmse))


@settings(deadline=None)
@given(arrays(np.float32, array_shapes(), elements=st.floats(width=32)))
def test_anything_equals_itself_exactly(a):
    result = compare(torch.from_numpy(a), a.copy(), EXACT)
    assert result.ok
    assert (result.outside, result.max_abs, result.rmse, result.relative_rmse) == (0, 0, 0, 0)
    assert result.snr_db == inf
    assert result.cosine == pytest.approx(1)


@pytest.mark.parametrize(("a", "b"), [(nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1.0), (1.0, -inf), (nan, inf)])
@pytest.mark.parametrize("level", [EXACT, TractCheckTolerance.ULTRA])
def test_a_non_finite_value_only_equals_its_own_kind(a, b, level):
    result = compare(torch.tensor([0.0, a, 2.0]), np.array([0.0, b, 2.0], np.float32), level)
    assert not result.ok
    assert (result.outside, result.worst_index) == (1, (1,))
    assert result.max_abs == result.rmse == inf
    assert result.snr_db == -inf


def test_known_numbers():
    result = compare(torch.tensor([3.0, 4.0]), np.array([3.0, 4.5], np.float32), APPROXIMATE, name="y")
    assert result.max_abs == 0.5
    assert result.rmse == pytest.approx(math.sqrt(0.125))
    assert result.relative_rmse == pytest.approx(0.1)
    assert result.snr_db == pytest.approx(20)
    assert result.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25)))
    assert str(result) == "output 'y': 1 of 2 values (50.00%) outside, worst at [1]: reference 4.0, actual 4.5"


def test_outliers_are_tolerated_up_to_their_share():
    reference = torch.zeros(20_000)
    actual = np.zeros(20_000, np.float32)
    actual[:2] = 9.0
    assert compare(reference, actual, SUPER).ok
    actual[2] = 9.0
    assert not compare(reference, actual, SUPER).ok


def test_the_worst_value_is_the_one_furthest_beyond_its_own_bound():
    reference = torch.tensor([1e6, 1.0])
    actual = np.array([1e6 + 100, 2.0], np.float32)  # 100 is within rtol of a million, 1 is not within that of one
    result = compare(reference, actual, APPROXIMATE)
    assert (result.max_abs, result.outside, result.worst_index) == (100, 1, (1,))


def test_the_relative_bound_is_of_the_reference():
    assert not compare(torch.tensor([10.0]), np.array([11.25], np.float32), TractCheckTolerance.ULTRA).ok
    assert compare(torch.tensor([11.25]), np.array([10.0], np.float32), TractCheckTolerance.ULTRA).ok


@pytest.mark.parametrize("place", [(0, 3), (6, 9)])
def test_chunks_add_up(monkeypatch, place):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 11, generator=generator)
    actual = (reference + 0.1 * torch.randn(7, 11, generator=generator)).numpy()
    actual[place] = 50
    whole = compare(reference, actual, APPROXIMATE)
    monkeypatch.setattr(sys.modules[compare.__module__], "_CHUNK", 10)
    parts = compare(reference, actual, APPROXIMATE)
    assert parts.worst_index == whole.worst_index == place
    assert (parts.outside, parts.max_abs) == (whole.outside, whole.max_abs)
    assert parts.rmse == pytest.approx(whole.rmse, rel=1e-12)
    assert parts.cosine == pytest.approx(whole.cosine, rel=1e-12)


@pytest.mark.parametrize("reference", [torch.tensor([1, 2**62, 3]), torch.tensor([True, False, True])])
def test_integers_and_booleans_are_counted(reference):
    actual = reference.numpy().copy()
    assert compare(reference, actual, EXACT).ok
    actual[1] += 1  # 2**62 + 1 is 2**62 in f64
    result = compare(reference, actual, APPROXIMATE)
    assert not result.ok
    assert (result.outside, result.worst_index) == (1, (1,))
    assert result.reference_at_worst != result.actual_at_worst


@pytest.mark.parametrize(
    ("actual", "reason"),
    [
        (np.zeros((3, 2), np.float32), r"shape is [3, 2], torch's is [2, 3]"),
        (np.zeros((2, 3), np.float16), "dtype is float16, torch's is float32"),
    ],
)
def test_other_shapes_and_dtypes_are_not_compared(actual, reason):
    result = compare(torch.zeros(2, 3), actual, TractCheckTolerance.ULTRA)
    assert not result.ok
    assert result.reason == reason
    assert math.isnan(result.max_abs)
    assert reason in str(result)


def test_complex_values_are_compared_as_pairs():
    reference = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert compare(reference, np.array([[1, -2], [3, 4]], np.float32), EXACT).ok
    assert compare(reference, np.array([[1, 2], [3, 4]], np.float32), EXACT).worst_index == (0, 1)
    assert "shape is [2]" in str(compare(reference, reference.resolve_conj().numpy(), EXACT))


def test_half_precision_has_its_own_bounds():
    step = np.float16(1 + 4 / 1024)
    assert compare(torch.ones(1, dtype=torch.float16), np.array([step]), APPROXIMATE).ok
    assert not compare(torch.ones(1), np.array([step], np.float32), APPROXIMATE).ok


def test_bf16_is_compared_as_f32_within_the_bounds_of_half():
    result = compare(torch.ones(1, dtype=torch.bfloat16), np.array([1.004], np.float32), APPROXIMATE)
    assert result.ok
    assert result.dtype == "bfloat16"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_reference_allows_one_step():
    reference = torch.quantize_per_tensor(torch.linspace(-3, 3, 50), 0.05, 100, torch.quint8)
    codes = reference.int_repr().numpy()
    assert compare(reference, codes, EXACT).ok
    assert compare(reference, codes + np.uint8(1), APPROXIMATE).ok
    assert compare(reference, reference.dequantize().numpy(), EXACT).ok
    assert not compare(reference, codes + np.uint8(1), CLOSE).ok
    assert not compare(reference, codes + np.uint8(2), APPROXIMATE).ok


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_nothing_equals_nothing(shape):
    result = compare(torch.zeros(shape), np.zeros(shape, np.float32), EXACT)
    assert result.ok
    assert result.worst_index is None


def test_a_scalar_and_a_strided_view_are_compared():
    assert compare(torch.tensor(2.0), np.array(2.5, np.float32), EXACT).worst_index == ()
    reference = torch.arange(12.0).reshape(3, 4).t()
    actual = reference.numpy().copy()
    actual[3, 1] = 0
    assert compare(reference, actual, EXACT).worst_index == (3, 1)


def test_a_zero_reference_has_no_relative_error_to_speak_of():
    result = compare(torch.zeros(2), np.ones(2, np.float32), EXACT)
    assert (result.relative_rmse, result.snr_db, result.cosine) == (inf, -inf, 0)


def test_a_comparison_is_ok_when_its_outputs_are():
    good = compare(torch.ones(1), np.ones(1, np.float32), EXACT)
    bad = compare(torch.ones(1), np.zeros(1, np.float32), EXACT)
    assert Comparison("archive", {"B": 2}, False, (good,), EXACT).ok
    assert not Comparison("archive", {"B": 2}, False, (good, bad), EXACT).ok


def test_sizes_in_words():
    assert Comparison("archive", {}, True, (), EXACT).sizes_text == "as traced"
    assert Comparison("archive", {"B": 2, "S": 3}, True, (), EXACT).sizes_text == "B=2, S=3 (traced)"
    assert Comparison("archive", {"B": 2, "S": 3}, False, (), EXACT).sizes_text == "B=2, S=3"
