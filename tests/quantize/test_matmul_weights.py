"""Weights that a model multiplies by as [K, N]: packed as their transposes, wherever the graph sees the transposition."""

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorConsistency
from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.quantize import Use
from torch_to_nnef.quantize.targets import q40_reason
from torch_to_nnef.tensor.quant import QTensorTractScaleOnly, QTensorTractTransposed, quantize_q40

K, N = 64, 48
CALLS = {
    "@": lambda x, w, b: x @ w,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w),
    "vector": lambda x, w, b: x[0, 0] @ w,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w),
    "addmm of a matrix": lambda x, w, b: torch.addmm(b.expand(10, N), x.flatten(0, 1), w),
    "scaled addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, beta=0.5, alpha=2),
    "linear of .t()": lambda x, w, b: nn.functional.linear(x, w.t(), b),
    "linear of .mT": lambda x, w, b: nn.functional.linear(x, w.mT, b),
    "linear of .permute": lambda x, w, b: nn.functional.linear(x, w.permute(1, 0), b),
    "joined in front": lambda x, w, b: torch.cat([x[..., :32], x[..., 32:] * 2], -1) @ w,
}


class Net(nn.Module):
    def __init__(self, call, shape=(K, N)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / 8)
        self.bias = nn.Parameter(torch.randn(shape[1], generator=generator))
        self.call = call

    def forward(self, x):
        return self.call(x, self.weight, self.bias)


def sample():
    return (torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)),)


def uses(model):
    return weight_uses(captured_graph(model, prepare(model, sample(), None, {}))[1])["weight"]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_operands(call, tmp_path):
    model = Net(call).eval()
    expected = quantize_q40(model.weight.detach().mT.contiguous(), "min_max")
    report = quantize_and_verify(model, sample(), tmp_path / "m.nnef", "min_max_q4_0", inplace=True)
    assert report.ok, report
    assert [(row.fqn, row.shape, row.storage) for row in report.rows] == [("weight", (K, N), "q40")]
    assert type(model.weight) is QTensorTractTransposed
    written = (tmp_path / "m.nnef" / "weight.dat").read_bytes()
    assert written == expected.write_in_file(tmp_path, "expected").read_bytes()


def test_sizes_that_change(tmp_path):
    axes = {"x": {0: "B", 1: "S"}}
    assert quantize_and_verify(Net(CALLS["@"]).eval(), sample(), tmp_path / "m.nnef", dynamic_axes=axes).ok


def test_half_precision(tmp_path):
    model = Net(CALLS["addmm"]).eval().half()
    assert quantize_and_verify(model, (sample()[0].half(),), tmp_path / "m.nnef").ok


def test_transposed_back_it_is_a_linear(tmp_path):
    model = Net(lambda x, w, b: x @ w.T, (N, K)).eval()
    assert uses(model) == {Use.LINEAR}
    assert quantize_and_verify(model, sample(), tmp_path / "m.nnef", inplace=True).ok
    assert type(model.weight) is QTensorTractScaleOnly


def test_a_tied_embedding(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(40, 64)

        def forward(self, ids):
            return self.embedding(ids) @ self.embedding.weight.transpose(0, 1)

    report = quantize_and_verify(Tied().eval(), (torch.tensor([[1, 2, 3]]),), tmp_path / "m.nnef")
    assert report.ok
    assert [(row.fqn, row.storage) for row in report.rows] == [("embedding.weight", "q40")]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x, w, b: nn.functional.linear(x @ w, w), "linear, matmul: Q40 groups run along one axis"),
        (lambda x, w, b: x @ w + w.sum(), "used by other operators"),
        (lambda x, w, b: w @ x.mT, "used by other operators"),
        (lambda x, w, b: x @ w.permute(0, 1).relu(), "used by other operators"),
        (lambda x, w, b: x[..., :40] @ w[:40], "used by other operators"),
    ],
)
def test_what_stays_in_float(call, reason, tmp_path):
    report = quantize_and_verify(Net(call, (K, K)).eval(), sample(), tmp_path / "m.nnef")
    assert report.ok
    assert reason in report.rows[0].reason


def test_the_summed_axis_must_divide():
    matmul = frozenset({Use.MATMUL})
    assert q40_reason(torch.ones(64, 33), matmul) is None
    assert "= 33 elements a row" in q40_reason(torch.ones(33, 64), matmul)
    assert "must be a matrix" in q40_reason(torch.ones(2, 64, 64), matmul)
    assert "at least 2 dimensions" in q40_reason(torch.ones(64), matmul)


@pytest.mark.parametrize(
    ("call", "packed"),
    [
        (CALLS["@"], quantize_q40(torch.ones(64, 64))),
        (lambda x, w, b: nn.functional.linear(x, w), quantize_q40(torch.ones(64, 64)).transposed()),
        (lambda x, w, b: w @ x.mT, quantize_q40(torch.ones(64, 64)).transposed()),
        (lambda x, w, b: w + x[0, 0], quantize_q40(torch.ones(64, 64)).transposed()),
    ],
    ids=["rows in x @ w", "columns in linear", "columns on the left", "columns in a sum"],
)
def test_groups_along_the_wrong_axis_are_refused(call, packed, tmp_path):
    model = Net(call, (64, 64)).eval()
    model.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(T2NErrorConsistency, match=r"weight in module .*(other axis|no kernel)"):
        quantize_and_verify(model, sample(), tmp_path / "m.nnef", None)
    assert not list(tmp_path.iterdir())
