"""Rows that are no multiple of 32, with zeros behind them: exact, told in the report, and only where what reads them allows it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization
from torch_to_nnef.tensor.quant import (
    QTensorTractPadded,
    load_safetensors,
    quantize_q40,
    save_safetensors,
)
from torch_to_nnef.tensor.quant.padded import padded

AXES = {"ids": {0: "B", 1: "S"}}
IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """30 features: read by lookups, linears with and without bias, a tied head, behind a concatenation, and by what takes no zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 30)
        self.attend = nn.MultiheadAttention(30, 2, batch_first=True)
        self.wide, self.narrow = nn.Linear(30, 50), nn.Linear(80, 30, bias=False)
        self.functional = nn.Parameter(torch.randn(30, 30) / 5)
        self.matrix = nn.Parameter(torch.randn(30, 40) / 5)
        self.back = nn.Linear(40, 30)
        self.conv = nn.Conv1d(30, 30, 3, padding=1)
        self.lstm = nn.LSTM(30, 30, batch_first=True)
        self.tiny = nn.Linear(3, 400)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.narrow(torch.cat([self.wide(x).relu(), x], -1))
        x = functional.linear(x, self.functional) + self.back(x @ self.matrix)
        x = self.lstm(x + self.conv(x.mT).mT)[0]
        return functional.linear(x, self.embed.weight), self.tiny(x[..., :3])


@st.composite
def weights(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 70).filter(lambda k: k % 32))
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_padded_is_the_first_columns_of_what_is_stored(weight, dtype):
    weight = weight.to(dtype)
    whole = quantize_q40(padded(weight))
    q = QTensorTractPadded.of(whole, weight.shape[1])
    assert (q.shape, q.dtype, q.stored_shape) == (weight.shape, dtype, whole.shape)
    assert q.stored.is_identical(whole)
    assert torch.equal(q.decompress(), whole.decompress()[:, : weight.shape[1]])
    assert not whole.decompress()[:, weight.shape[1] :].any()
    assert (whole.decompress_to_u8()[:, weight.shape[1] :] == 8).all()
    signal, noise = q.squared_error(weight)
    assert signal == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert noise == pytest.approx(float((q.decompress() - weight).double().square().sum()), rel=1e-2, abs=1e-12)
    assert torch.equal(
        q @ torch.ones(weight.shape[1], dtype=dtype), q.decompress() @ torch.ones(weight.shape[1], dtype=dtype)
    )


def test_it_stays_what_it_is(tmp_path):
    q = QTensorTractPadded.of(quantize_q40(padded(torch.randn(4, 30))), 30)
    save_safetensors({"a": q}, tmp_path / "a.safetensors")
    torch.save({"a": q}, tmp_path / "a.pt")
    same = [
        q.clone(), q.half().float(), copy.deepcopy(q), load_safetensors(tmp_path / "a.safetensors")["a"],
        torch.load(tmp_path / "a.pt")["a"], QTensorTractPadded(q.decompress(), q.qscheme),
    ]  # fmt: skip
    assert all(isinstance(other, QTensorTractPadded) and q.is_identical(other) for other in same)
    assert q.write_in_file(tmp_path, "x").read_bytes() == q.stored.write_in_file(tmp_path, "y").read_bytes()


def test_padding_must_be_zeros():
    with pytest.raises(T2NErrorImpossibleQuantization, match="not packed as zeros"):
        QTensorTractPadded.of(quantize_q40(torch.ones(2, 32), name="w"), 30)


@pytest.mark.parametrize("method", ["q40", "q40_awq"])
def test_whole_way_in_tract(tmp_path, method):
    model = Odd().eval()
    report = quantize_and_verify(
        model, IDS, tmp_path / "m.nnef.tgz", method, fallback="pad", dynamic_axes=AXES, calibration=[IDS, IDS.flip(1)]
    )
    assert report.ok
    rows = {row.fqn: row for row in report.rows}
    fits = {
        "embed.weight", "attend.in_proj_weight", "attend.out_proj.weight", "wide.weight", "narrow.weight", "functional", "back.weight",
    }  # fmt: skip
    assert {fqn for fqn, row in rows.items() if row.quantized} == fits
    for fqn in fits:
        width = rows[fqn].shape[1]
        assert f"rows padded {width} -> {width + -width % 32}" in rows[fqn].method
        assert rows[fqn].bits_per_weight == pytest.approx(4.5 * (width + -width % 32) / width)
    assert {"matrix", "conv.weight", "tiny.weight"} <= rows.keys()
    assert all("elements a row" in row.reason for row in rows.values() if not row.quantized)
    assert rows["embed.weight"].snr_db > 15


def test_as_before_without_it_and_f16_instead(tmp_path):
    model = Odd().eval()
    report = quantize_and_verify(model, IDS, tmp_path / "m.nnef.tgz")
    assert not any(row.quantized for row in report.rows)
    report = quantize_and_verify(model, IDS, tmp_path / "h.nnef.tgz", fallback="f16")
    assert report.ok
    assert "f16" in {row.storage for row in report.rows}


def test_a_budget_keeps_padded_weights_too(tmp_path):
    report = quantize_and_verify(Odd().eval(), IDS, tmp_path / "m.nnef.tgz", fallback="pad", target_bpw=9.0)
    assert report.ok
    assert {"f16", "q40"} <= {row.storage for row in report.rows}


def test_learned_scales_keep_the_padding(tmp_path):
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10)).eval()
    data = [torch.randn(8, 30, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    report = quantize_and_verify(model, data[0], tmp_path / "m.nnef.tgz", "q40_best", fallback="pad", calibration=data)
    assert report.ok
    assert all("rows padded" in row.method for row in report.rows)
