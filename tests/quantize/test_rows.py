"""Errors of weights, and who hears of them."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_to_nnef.quantize import TensorRow, record, recording, weight_error
from torch_to_nnef.tensor.quant import QTensor, qscale_per_group_f16_min_max_calibration, quantize_q40

ROW = TensorRow("w", "Linear", (1, 32), "float32", "q40", 4.5, "q40", 20.0, 0.1, True, None, 128, 18)


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_weight_error_is_the_definition(rows, groups, transposed, seed):
    fp = torch.randn(rows * 32, groups * 32, generator=torch.Generator().manual_seed(seed))
    fp = fp.t() if transposed else fp
    q = quantize_q40(fp)
    noise = float((q.decompress().double() - fp.double()).square().sum())
    signal = float(fp.double().square().sum())
    snr_db, relative_rmse = weight_error(fp, q)
    assert snr_db == pytest.approx(10 * math.log10(signal / noise))
    assert relative_rmse == pytest.approx(math.sqrt(noise / signal))


def test_weight_error_in_many_chunks(monkeypatch):
    fp = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    whole = weight_error(fp, quantize_q40(fp))
    monkeypatch.setattr("torch_to_nnef.tensor.chunks.flat_chunks.__defaults__", (1, 100))
    assert weight_error(fp, quantize_q40(fp)) == pytest.approx(whole)
    assert weight_error(fp.t(), quantize_q40(fp.t())) != pytest.approx(whole, rel=1e-9)


def test_weight_error_of_other_schemes_and_extremes():
    fp = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    eight = QTensor(fp, qscale_per_group_f16_min_max_calibration(fp, 8, 5))
    assert 35 < weight_error(fp, eight)[0] < 60
    zero = torch.zeros(2, 32)
    assert weight_error(zero, quantize_q40(zero)) == (math.inf, 0.0)
    assert weight_error(zero, quantize_q40(torch.ones(2, 32))) == (-math.inf, math.inf)


def test_recording_is_scoped():
    record(ROW)
    with recording() as outer:
        record(ROW)
        with recording() as inner:
            record(ROW)
        other = threading.Thread(target=record, args=(ROW,))
        other.start()
        other.join()
    record(ROW)
    assert (outer, inner) == ([ROW], [ROW])
