"""Half precision: an operator is computed in f32 and rounded once, as torch does it on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from rows import Call, ids, x
from torch import nn

from torch_to_nnef import TractModel, export_model_to_nnef, quantize_and_verify
from torch_to_nnef.inference_target import TractNNEF

BIG = 300 * x(4, 64)  # its squares are beyond f16
WIDE = x(2, 96, 9, 9)

ROWS = {
    "conv2d": (lambda t, w: F.conv2d(t, w, padding=1), WIDE, x(32, 96, 3, 3)),
    "conv_transpose2d": (F.conv_transpose2d, WIDE, x(96, 8, 3, 3)),
    "matmul": (torch.matmul, x(5, 400), x(400, 6)),
    "linear": (lambda t, w, b: F.linear(t, w, b), x(5, 400), x(6, 400), 3 * x(6)),
    "attention": (F.scaled_dot_product_attention, x(2, 3, 70, 16), x(2, 3, 70, 16), x(2, 3, 70, 16)),
    "mean": (lambda t: t.mean(1), 100 + x(2, 3000)),
    "sum": (lambda t: t.sum(1), x(2, 3000)),
    "norm": (lambda t: torch.linalg.vector_norm(t, dim=1), BIG),
    "var": (lambda t: t.var(1), BIG / 10),
    "layer_norm": (lambda t: F.layer_norm(t, (64,)), BIG),
    "group_norm": (lambda t: F.group_norm(t, 4), WIDE),
    "avg_pool2d": (lambda t: F.avg_pool2d(t, 3), WIDE + 50),
    "adaptive_avg_pool2d": (lambda t: F.adaptive_avg_pool2d(t, 1), WIDE + 50),
    "softmax": (lambda t: t.softmax(1), x(2, 100)),
    "gelu": (F.gelu, 3 * x(500)),
    "silu": (F.silu, 3 * x(500)),
    "mish": (F.mish, 3 * x(500)),
    "log1p": (torch.log1p, x(500).abs() / 100),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_rounding(name, tmp_path):
    """Within an ulp: where sums in another order fall on the other side of a middle."""
    function, *inputs = ROWS[name]
    inputs = tuple(t.half() for t in inputs)
    target = TractNNEF.latest(check_io_tolerance="very")
    path = export_model_to_nnef(Call(function), inputs, tmp_path / "op.nnef", target, compression_level=None)
    (actual,) = (torch.from_numpy(result).double() for result in TractModel.load(path).run(*inputs).values())
    exact = function(*(t.double() for t in inputs))
    error = (actual - exact).abs() / (exact.abs() + exact.square().mean().sqrt() / 100)
    assert error.max() <= 2**-10


def test_packed_rows_are_half_too(tmp_path):
    """tract unpacks rows of a packed embedding in f32 only."""
    report = quantize_and_verify(nn.Embedding(50, 64).half(), ids(2, 7), tmp_path / "rows.nnef")
    assert report.ok
    assert report.archive[0].outputs[0].dtype == "float16"
