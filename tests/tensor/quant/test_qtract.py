"""Q40: what is stored, what is refused, what it costs."""

import math
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.inference_target import InferenceTarget
from torch_to_nnef.tensor.quant import (
    Lzma,
    NibblePacking,
    QScalePerGroupF16,
    QTensorTractScaleOnly,
    fp_to_tract_q4_0_with_min_max_calibration,
    q40_shape_reason,
    qscale_per_group_f16_min_max_calibration,
    qtract,
    quantize_q40,
)
from torch_to_nnef.tensor.quant import tract as alias


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(q, fp):
    return (q.decompress().double() - fp.double()).reshape(-1, 32).square().sum(1)


def test_planes_are_ggufs_blocks():
    fp = weight(16, 96)
    q = quantize_q40(fp, "signed_extreme")
    blocks = gguf.quants.quantize(fp.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    codes, scales = q.planes()
    assert np.array_equal(codes.numpy().reshape(-1, 16), blocks[:, 2:])
    assert np.array_equal(scales.view(torch.uint8).numpy().reshape(-1, 2), blocks[:, :2])
    expected = gguf.quants.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(q.decompress().numpy().reshape(-1), expected)


@pytest.mark.parametrize("codecs", [(), (Lzma(),), (NibblePacking(), Lzma())], ids=str)
def test_other_codecs_hold_the_same_codes(codecs):
    fp = weight(4, 64)
    q = quantize_q40(fp)
    other = QTensorTractScaleOnly(fp, q.qscheme, u8_compressors=codecs)
    same = QTensorTractScaleOnly(fp, q.qscheme)
    assert same.u8_compressors == (NibblePacking(),)
    assert torch.equal(other.decompress_to_u8(), same.decompress_to_u8())
    assert all(torch.equal(a, b) for a, b in zip(other.planes(), same.planes(), strict=True))
    assert torch.equal(other.decompress(), same.decompress())


@given(st.lists(st.floats(-3, 3, width=32), min_size=64, max_size=64), st.floats(2**-10, 2, width=16) | st.just(0.0))
@settings(deadline=None)
def test_native_and_torch_rounding_agree(values, scale):
    fp = torch.tensor(values).reshape(2, 32)
    scheme = QScalePerGroupF16(32, torch.full((2, 1), scale, dtype=torch.float16), 4)
    native = QTensorTractScaleOnly(fp, scheme).decompress_to_u8()
    assert torch.equal(native, scheme.quantize_as_u8(fp))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("encoder", ["signed_extreme", "min_max", "scale_search", "abs_max"])
def test_dtypes_and_layouts_give_the_same_codes(dtype, encoder, monkeypatch):
    fp = weight(64, 96).bfloat16().to(dtype)
    q = quantize_q40(fp, encoder)
    assert (q.dtype, q.shape) == (dtype, (64, 96))
    for other in (fp.float(), fp.t().contiguous().t(), fp.repeat(1, 2)[:, :96]):
        assert quantize_q40(other, encoder).is_identical(q)
    monkeypatch.setattr("torch_to_nnef.tensor.chunks.flat_chunks.__defaults__", (1, 1000))
    assert quantize_q40(fp.t().contiguous().t(), encoder).is_identical(q)


def test_scale_search_beats_the_extreme_and_min_max_is_never_worse():
    fp = weight(64, 128) ** 3
    extreme = squared_error(quantize_q40(fp, "signed_extreme"), fp)
    assert (squared_error(quantize_q40(fp), fp) <= extreme * (1 + 1e-6)).all()
    assert squared_error(quantize_q40(fp), fp).sum() < 0.95 * extreme.sum()
    for percentile in (0.99, 0.9, 0.5):
        clipped = squared_error(fp_to_tract_q4_0_with_min_max_calibration(fp, percentile), fp)
        assert (clipped <= extreme * (1 + 1e-6)).all()
    assert fp_to_tract_q4_0_with_min_max_calibration(fp).is_identical(quantize_q40(fp, "signed_extreme"))


@pytest.mark.parametrize(("n_bits", "group_size"), [(2, 16), (4, 32), (8, 8), (3, 5)])
def test_min_max_scales_have_the_extreme_exact(n_bits, group_size):
    fp = weight(group_size, 40).half().float()
    scheme = qscale_per_group_f16_min_max_calibration(fp, n_bits, group_size)
    codes = scheme.quantize_as_u8(fp).reshape(-1, group_size)
    extreme = fp.reshape(-1, group_size).abs().argmax(1, keepdim=True)
    assert (codes.gather(1, extreme) == 0).all()
    step = scheme.scale.float().abs() * (0.5 + 2**-9 * 2**n_bits)
    inside = codes < 2**n_bits - 1
    error = (scheme.quantize_as_torch(fp) - fp).reshape(-1, group_size).abs()
    assert (error <= step)[inside].all()


def test_percentile_scales_are_never_worse():
    fp = weight(50, 64)
    errors = [
        (qscale_per_group_f16_min_max_calibration(fp, 4, 64, p).quantize_as_torch(fp) - fp)
        .square()
        .reshape(-1, 64)
        .sum(1)
        for p in (1.0, 0.97)
    ]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((64,), "rank 1"),
        ((), "rank 0"),
        ((4, 33), "33 elements"),
        ((8, 3, 3, 3), "3 x 3 x 3 = 27"),
        ((0, 32), "positive"),
        ((4, 0), "positive"),
    ],
)
def test_shapes_q40_cannot_hold(shape, reason):
    assert reason in q40_shape_reason(shape)
    with pytest.raises(T2NErrorImpossibleQuantization, match=r"`enc\.w`"):
        quantize_q40(torch.zeros(shape), name="enc.w")


def test_shapes_q40_can_hold():
    for shape in [(1, 32), (8, 64), (8, 32, 3), (4, 2, 4, 4)]:
        assert q40_shape_reason(shape) is None
        assert quantize_q40(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_q40_cannot_hold(bad, transposed):
    fp = weight(64, 64)
    fp[3, 40] = bad
    with pytest.raises(T2NErrorImpossibleQuantization, match=r"enc\.w"):
        quantize_q40(fp.t() if transposed else fp, name="enc.w")
    with pytest.raises(T2NErrorImpossibleQuantization):
        qscale_per_group_f16_min_max_calibration(fp, 4, 32)


def test_integers_meta_and_bad_percentiles_are_refused():
    with pytest.raises(T2NErrorImpossibleQuantization, match="int32"):
        quantize_q40(torch.ones(2, 32, dtype=torch.int32))
    with pytest.raises(T2NErrorImpossibleQuantization, match="meta"):
        quantize_q40(torch.ones(2, 32, device="meta"))
    for percentile in (0.0, 1.5, math.nan):
        with pytest.raises(T2NErrorInvalidArgument):
            fp_to_tract_q4_0_with_min_max_calibration(torch.ones(2, 32), percentile)
        with pytest.raises(T2NErrorInvalidArgument):
            qscale_per_group_f16_min_max_calibration(torch.ones(2, 32), 4, 32, percentile)


def test_slices_read_the_same_values():
    q = quantize_q40(weight(8, 96))
    assert torch.equal(q.decompress_slice(32, 320), q.decompress().reshape(-1)[32:320])
    with pytest.raises(T2NErrorInvalidArgument):
        q.decompress_slice(1, 32)


def test_write_in_file(tmp_path):
    q = quantize_q40(weight(8, 2, 4, 4))
    path = q.write_in_file(tmp_path, "a/b.weight")
    assert path == tmp_path / "a" / "b.weight.dat"
    dtype, shape, payload = _native.read_dat(path)
    blocks = payload.reshape(-1, 18)
    assert (dtype, shape) == ("q40", [8, 2, 4, 4])
    assert np.array_equal(blocks[:, 2:].reshape(-1), q.u8_blob.numpy())
    assert blocks[:, :2].tobytes() == q.qscheme.scale.numpy().tobytes()


@pytest.mark.parametrize("label", ["../w", "/etc/w", "a/../../w", "", "w\0"])
def test_labels_stay_inside(tmp_path, label):
    with pytest.raises(T2NErrorInvalidArgument):
        quantize_q40(torch.ones(1, 32)).write_in_file(tmp_path, label)
    assert not list(tmp_path.iterdir())


def test_other_engines_are_refused(tmp_path):
    class Other(InferenceTarget):
        pass

    with pytest.raises(T2NErrorInvalidArgument, match="read by tract only"):
        quantize_q40(torch.ones(1, 32)).write_in_file(tmp_path, "w", Other())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codecs", [None, (Lzma(),)], ids=str)
@pytest.mark.parametrize("shape", [(6, 64), (3, 6, 32)])
def test_rows_are_cut_packed(shape, codecs):
    fp = weight(*shape)
    q = QTensorTractScaleOnly(fp, quantize_q40(fp).qscheme, torch.float16, codecs)
    rows = q.rows(1, 4)
    assert rows.is_identical(quantize_q40(fp[..., 1:4, :].contiguous()))
    assert rows.dtype == torch.float16
    assert q.offload().rows(1, 4).offload().is_identical(rows)
    with pytest.raises(T2NErrorInvalidArgument, match="groups of 32 cross its rows of 16"):
        quantize_q40(weight(4, 2, 16)).rows(0, 1)


def test_alias_module():
    assert alias.QTensorTractScaleOnly is qtract.QTensorTractScaleOnly


def test_operator_contract():
    q = quantize_q40(weight(8, 64))
    codes, scales = q.planes()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.library.opcheck(qtract.q40_dequantize, (codes, scales, [8, 64], dtype))


MEASURE = """
import resource, torch
from torch_to_nnef.tensor.quant import quantize_q40
quantize_q40(torch.ones(32, 1024))
fp = torch.randn(8192, 4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q = quantize_q40(fp{layout}, "signed_extreme")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / q.numel())
"""


@pytest.mark.parametrize(("layout", "limit"), [("", 0.6), (".t()", 0.6 + 2)])
def test_memory_while_quantizing(layout, limit):
    # 32 Mi weights: 128 MiB of float. Contiguous: the planes alone; transposed: also pieces of 4 Mi floats.
    code = MEASURE.format(layout=layout)
    extra = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert extra <= limit
