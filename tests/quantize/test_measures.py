"""What a report shows of a weight beside its error."""

import pytest
import torch

from torch_to_nnef.quantize import weight_error
from torch_to_nnef.quantize.measures import measures_of
from torch_to_nnef.tensor.quant import quantize_q40


def test_counts_in_pieces_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("torch_to_nnef.quantize.measures._PIECE", 200)  # rows of 64: three at a time, and one left
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize_q40(rows)
    found = measures_of(rows, packed)
    size = rows.square().mean().sqrt()
    low, high = (-4 * size).item(), (4 * size).item()
    assert found.code_counts == tuple(packed.decompress_to_u8().flatten().bincount(minlength=16).tolist())
    assert found.weight_counts == tuple(torch.histc(rows.clamp(low, high), 32, low, high).int().tolist())
    assert found.min_max_snr_db == pytest.approx(weight_error(rows, quantize_q40(rows, "signed_extreme"))[0])


def test_weights_of_zero():
    found = measures_of(torch.zeros(2, 32), quantize_q40(torch.zeros(2, 32)))
    assert (found.code_counts[8], sum(found.weight_counts), found.min_max_snr_db) == (64, 64, float("inf"))
