"""Half precision: an operator is computed in f32 and rounded once, as torch does it on a CPU; some only when told to."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rows import Call, ids, x
from torch import nn

from torch_to_nnef import TractModel, export_model_to_nnef, quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorIOPytorchTractNotISO
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.op.half import PARTS

BIG = 300 * x(4, 64)  # its squares are beyond f16
WIDE = x(2, 96, 9, 9)

ROWS = {
    "conv2d": (lambda t, w: F.conv2d(t, w, padding=1), WIDE, x(32, 96, 3, 3)),
    "conv_transpose2d": (F.conv_transpose2d, WIDE, x(96, 8, 3, 3)),
    "matmul": (torch.matmul, x(5, 400), x(400, 6)),
    "linear": (lambda t, w, b: F.linear(t, w, b), x(5, 400), x(6, 400), 3 * x(6)),
    "attention": (F.scaled_dot_product_attention, x(2, 3, 70, 16), x(2, 3, 70, 16), x(2, 3, 70, 16)),
    "attention_masked": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :1] > k[..., 0].unsqueeze(-2)),
        *(x(2, 3, 9, 16), x(2, 3, 70, 16), x(2, 3, 70, 24)),
    ),
    "attention_biased": (F.scaled_dot_product_attention, x(2, 3, 9, 16), x(2, 3, 70, 16), x(2, 3, 70, 24), x(9, 70)),
    "attention_shared": (F.scaled_dot_product_attention, x(2, 3, 9, 16), x(1, 3, 70, 16), x(1, 3, 70, 16)),
    "attention_grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        *(x(2, 4, 9, 16), x(2, 2, 70, 16), x(2, 2, 70, 16)),
    ),
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
    """Within an ulp: where sums in another order fall on the other side of a middle; parts with an option are told to be f32."""
    function, *inputs = ROWS[name]
    inputs = tuple(t.half() for t in inputs)
    target = TractNNEF.latest(check_io_tolerance="very", **dict.fromkeys(PARTS, True))
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


class Attention(nn.Module):
    def forward(self, heads):
        query, key, value = heads
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Block(nn.Module):
    """Attention between a layer norm and an RMS norm, with linear layers before and behind."""

    def __init__(self, spread=1.0):
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(32), nn.RMSNorm(32)
        self.linear_a, self.linear_b = nn.Linear(32, 96), nn.Linear(32, 32, bias=False)
        self.attention = Attention()
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(x(*parameter.shape, seed=index) / 5 + (parameter.dim() == 1))
            self.linear_a.weight[:64] *= spread  # of queries and keys

    def forward(self, t):
        heads = self.linear_a(self.norm_a(t)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        joined = self.attention(heads.unbind()).transpose(1, 2).flatten(2)
        return self.norm_b(self.linear_b(joined)).softmax(-1)


def written(model, folder, dtype=torch.float16, **options):
    """The lines of graph.nnef."""
    target = TractNNEF.latest(check_io_tolerance="very", **options)
    path = export_model_to_nnef(
        model.to(dtype).eval(), x(2, 5, 32).to(dtype), folder / "model.nnef", target, compression_level=None
    )
    return (path / "graph.nnef").read_text().splitlines()


def calls(lines, of):
    """Operators with their attributes, without the names of tensors, of the modules whose name begins with one of `of`."""
    made = [line.split(" = ", 1) for line in lines if re.match(r"    \w+ = (?!variable)\w+\(", line)]
    return [re.sub(r"\b[a-z]\w*(?=[,)\]] ?)", "", call) for name, call in made if name.strip().startswith(of)]


# Where the part is, and what only f16 and only f32 say there.
PLACES = {
    "force_attention_inner_in_f32": ("attention", "mul(", "tract_core_cast("),
    "force_linear_accumulation_in_f32": ("linear", 'acc = "f16"', "t2n_linear("),
    "force_norm_in_f32": ("norm", "sub(", "tract_core_cast("),
}


@pytest.mark.parametrize("option", PARTS)
def test_an_option_changes_its_part_and_nothing_else(option, tmp_path):
    here, half, single = PLACES[option]
    elsewhere = (*(place for place, *_ in PLACES.values() if place != here), "softmax", "cast", "transpose", "reshape")
    without, within = written(Block(), tmp_path), written(Block(), tmp_path, **{option: True})
    assert calls(without, elsewhere) == calls(within, elsewhere)
    assert half in "".join(calls(without, here))
    assert half not in "".join(calls(within, here))
    assert single in "".join(calls(within, here))
    assert single not in "".join(calls(without, here))


def test_single_precision_is_left_as_it_is(tmp_path):
    said = [written(Block(), tmp_path, torch.float32, **dict.fromkeys(options, True)) for options in ((), PARTS)]
    assert said[0] == said[1]


def test_what_overflows_names_the_option_that_rescues_it(tmp_path):
    """Scores around 1e5: torch keeps them in f32."""
    with pytest.raises(T2NErrorIOPytorchTractNotISO, match=r"f16.*force_attention_inner_in_f32=True"):
        written(Block(spread=700), tmp_path)
    written(Block(spread=700), tmp_path, force_attention_inner_in_f32=True)


def test_sums_beside_packed_weights(tmp_path):
    for options in ({}, {"force_linear_accumulation_in_f32": True}):
        target = TractNNEF.latest(check_io_tolerance="very", **options)
        model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32, bias=False)).half()
        report = quantize_and_verify(
            model,
            x(2, 3, 64).half(),
            tmp_path / "net.nnef.tar",
            dynamic_axes={"input": {0: "B"}},
            inference_target=target,
            force=True,
        )
        assert report.ok
        assert len([row for row in report.rows if row.quantized]) == 2


def test_rms_norm_of_small_halves(tmp_path):
    """The epsilon that is left out is that of f32, in which torch computes."""
    target = TractNNEF.latest(check_io_tolerance="approximate")
    for options in ({}, {"force_norm_in_f32": True}):
        export_model_to_nnef(
            nn.RMSNorm(8).half(), x(3, 8).half() / 1000, tmp_path / "n.nnef", replace(target, **options)
        )
