"""`quantize_and_verify(..., "int8", calibration=...)`: one call, and every kind of weight runs in integers in tract or says why not."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.api import sensitivity
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=0):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


class Transformer(nn.Module):
    """A table, attention of torch, a norm, a product that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Parameter(torch.randn(32, 40) / 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return (x + self.down(functional.gelu(self.up(x)))) @ self.head


class Tied(nn.Module):
    """A head that shares the weight of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(40, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.table(ids)).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(x)[0])


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0]


def images():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, padding="same"),
        nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


def sounds():
    return nn.Sequential(nn.Conv1d(8, 32, 5, dilation=2), nn.Tanh(), nn.ConvTranspose1d(32, 8, 4, stride=2))


INTEGERS = {"integer_conv", "integer_linear"}
# What makes the model, what makes inputs, which weights stay float and why.
CASES = {
    "images": (images, lambda seed: draw(2, 3, 16, 16, seed=seed), {}),
    "sounds": (sounds, lambda seed: draw(2, 8, 40, seed=seed), {"2.weight": "conv_transpose"}),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 16, 1)),
        lambda seed: draw(1, 2, 6, 6, 6, seed=seed),
        {},
    ),
    "transformer": (Transformer, lambda seed: tokens(2, 7, seed=seed), {}),
    "tied": (Tied, lambda seed: tokens(2, 7, seed=seed), {}),
    "recurrent": (
        Recurrent,
        lambda seed: draw(2, 6, 16, seed=seed),
        {"memory.weight_ih_l0": "recurrent", "memory.weight_hh_l0": "recurrent"},
    ),
    "cross attention": (Cross, lambda seed: draw(2, 5, 32, seed=seed), {"attention.in_proj_weight": "other operators"}),
}


def run(case, folder, method="int8", **options):
    make, inputs, _ = CASES[case]
    torch.manual_seed(0)
    data = [inputs(seed) for seed in range(6)]
    return quantize_and_verify(make().eval(), data[0], folder / "m.nnef.tar", method, calibration=data, **options)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_weight(case, tmp_path):
    report, left = run(case, tmp_path), CASES[case][2]
    assert report.ok
    assert {row.fqn for row in report.rows if not row.quantized} == set(left)
    assert all(words in row.reason for row in report.rows for fqn, words in left.items() if row.fqn == fqn)
    assert all(row.output_snr_db > 20 for row in report.rows if row.quantized)
    # 8 bits cost about 40 dB a layer.
    assert all(output.snr_db > 25 for comparison in report.quantization for output in comparison.outputs)
    if not left and case != "transformer":  # products of two activations stay float
        assert {p.operator for p in report.arithmetic.products if "exact in f32" not in p.reason} <= INTEGERS


@pytest.mark.parametrize("method", ["int8_per_tensor", "int8_min_max"])
def test_other_keys(method, tmp_path):
    report = run("images", tmp_path, method, dynamic_axes={"input": {0: "B"}})
    assert report.ok
    assert len(report.archive) > 1
    assert {row.method for row in report.rows} == {method}


def test_convolutions_in_integers_and_linears_in_q40(tmp_path):
    report = run("images", tmp_path, overrides={"9": "q40"})
    assert report.ok
    assert [row.storage for row in report.rows] == ["q40", "int8", "int8", "int8"]
    assert 0 < report.arithmetic.integer_share < 1


def test_rows_of_any_size_need_no_fallback(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Linear(40, 8).eval(), [draw(4, 40, seed=seed) for seed in range(5)]
    path = tmp_path / "m.nnef.tar"
    assert quantize_and_verify(model, data[0], path, "int8", calibration=data, fallback="error").ok
    with pytest.raises(T2NErrorImpossibleQuantization, match="40 elements a row"):
        quantize_and_verify(model, data[0], tmp_path / "q.nnef.tar", "q40", fallback="error")


def test_what_each_weight_costs_alone():
    torch.manual_seed(0)
    measure, costs = sensitivity(images().eval(), [draw(2, 3, 16, 16, seed=seed) for seed in range(6)], "int8")
    assert measure == "error"
    assert {cost.fqn for cost in costs} == {"0.weight", "3.weight", "6.weight", "9.weight"}
    assert all(0 < cost.cost < 1e-2 for cost in costs)
