"""Mixtures of experts: with a router that tract has they are its own operator, with another every expert is computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorConsistency
from torch_to_nnef.quantize import Use
from torch_to_nnef.quantize.targets import q40_reason
from torch_to_nnef.tensor.quant import quantize_q40

EXPERTS, FEATURES, WIDTH, CHOSEN = 5, 64, 96, 2


def softmax_share(logits, k=CHOSEN):
    shares, chosen = F.softmax(logits.float(), -1).topk(k)
    shares /= shares.sum(-1, keepdim=True)
    return shares, chosen


def share_of_all(logits):
    return torch.topk(logits.softmax(1), CHOSEN, dim=-1)


def share_of_chosen(logits):
    values, chosen = logits.topk(CHOSEN, dim=1)
    return values.softmax(-1).type_as(logits), chosen


def raw(logits):
    return logits.topk(CHOSEN)


def sigmoid(logits):
    return logits.sigmoid().topk(CHOSEN)


def late_sigmoid(logits):
    values, chosen = logits.topk(CHOSEN)
    return values.sigmoid(), chosen


# Those that tract has not.


def scaled(logits):
    shares, chosen = share_of_all(logits)
    return 2.5 * shares, chosen


def shared_sigmoid(logits):
    shares, chosen = sigmoid(logits)
    return shares / shares.sum(-1, keepdim=True), chosen


def shared_by_column(logits):
    shares, chosen = share_of_all(logits)
    return shares / shares.sum(0, keepdim=True), chosen


def smallest(logits):
    return logits.softmax(-1).topk(CHOSEN, largest=False)


def over_tokens(logits):
    return logits.softmax(0).topk(CHOSEN)


def with_correction(logits):
    scores = logits.sigmoid()
    chosen = (scores + torch.linspace(-1, 1, EXPERTS)).topk(CHOSEN).indices
    return scores.gather(1, chosen), chosen


def chosen_by_others(logits):
    return share_of_all(logits).values, share_of_all(-logits).indices


KNOWN = {
    softmax_share: "softmax_topk",
    share_of_chosen: "softmax_topk",
    share_of_all: "softmax_all",
    raw: "raw",
    sigmoid: "sigmoid",
    late_sigmoid: "sigmoid",
}
OTHERS = [scaled, shared_sigmoid, shared_by_column, smallest, over_tokens, with_correction, chosen_by_others]


class Mixture(nn.Module):
    def __init__(self, route, activation="silu", width=WIDTH, bias=None, seen=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Parameter(torch.randn(EXPERTS, FEATURES) / 4)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * width, FEATURES) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, FEATURES, width) / 8)
        self.route, self.activation, self.bias, self.seen = route, activation, bias, seen

    def forward(self, x):
        tokens = x.view(-1, FEATURES)
        shares, chosen = self.route(F.linear(self.seen(tokens).reshape(-1, FEATURES), self.router, self.bias))
        y = torch.ops.t2n.experts(tokens, chosen, shares, self.gate_up, self.down, self.activation)
        return y.view(x.shape)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "torch_to_nnef"]


def convert(model, folder, method=None, dtype=torch.float32):
    x = torch.randn(2, 3, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)
    axes = {"x": {0: "B", 1: "S"}}
    report = quantize_and_verify(model.eval().to(dtype), (x,), folder / "m.nnef", method, dynamic_axes=axes)
    assert report.ok, report
    assert any(comparison.sizes["S"] == 1 for comparison in report.archive)
    return report, (folder / "m.nnef" / "graph.nnef").read_text()


def test_the_operator_is_the_sum_over_the_chosen():
    model = Mixture(softmax_share)
    x = torch.randn(7, FEATURES)
    shares, chosen = softmax_share(F.linear(x, model.router))
    for row in range(7):
        expected = torch.zeros(FEATURES)
        for share, expert in zip(shares[row], chosen[row], strict=True):
            gate, up = (model.gate_up[expert] @ x[row]).chunk(2)
            expected += share * (model.down[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(model(x)[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [None, "q40"])
@pytest.mark.parametrize(("route", "gate"), KNOWN.items())
def test_routers_of_tract(route, gate, method, tmp_path, caplog):
    report, text = convert(Mixture(route), tmp_path, method)
    assert f'gate = "{gate}"' in text
    assert "tract_core_topk" not in text
    assert not warnings_of(caplog)
    if method:
        reasons = {row.fqn: row.reason for row in report.rows}
        assert (reasons["gate_up"], reasons["down"]) == (None, None)
        assert "router of experts" in reasons.get("router", "router of experts")


@pytest.mark.parametrize("method", [None, "q40"])
@pytest.mark.parametrize("route", OTHERS)
def test_other_routers(route, method, tmp_path, caplog):
    report, text = convert(Mixture(route), tmp_path, method)
    assert "tract_moe_ffn" not in text
    assert ["computes every expert" in text for text in warnings_of(caplog)] == [True]
    if method:
        assert {row.fqn: row.storage for row in report.rows}["gate_up"] == "q40"


@pytest.mark.parametrize(
    "kwargs", [{"bias": torch.ones(EXPERTS)}, {"seen": lambda x: x.relu()}, {"seen": lambda x: x.flip(0)}]
)
def test_routers_that_see_something_else(kwargs, tmp_path):
    assert "tract_moe_ffn" not in convert(Mixture(share_of_all, **kwargs), tmp_path)[1]


@pytest.mark.parametrize("route", [softmax_share, with_correction])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("method", [None, "q40"])
def test_activations(route, activation, method, tmp_path):
    convert(Mixture(route, activation), tmp_path, method)


@pytest.mark.parametrize("route", [softmax_share, with_correction])
@pytest.mark.parametrize("method", [None, "q40"])
def test_half_precision(route, method, tmp_path):
    convert(Mixture(route), tmp_path, method, torch.float16)


def test_one_of_the_weights_may_be_packed_alone(tmp_path):
    report, text = convert(Mixture(softmax_share, width=80), tmp_path, "q40")
    storages = {row.fqn: row.storage for row in report.rows}
    assert (storages["gate_up"], storages["down"]) == ("q40", "f32")
    assert "tract_moe_ffn" in text


def test_halves_are_stored_apart(tmp_path):
    model = Mixture(softmax_share)
    convert(model, tmp_path, "q40")
    for name, half in (("gate", slice(WIDTH)), ("up", slice(WIDTH, None))):
        expected = quantize_q40(model.gate_up.detach()[:, half].contiguous()).write_in_file(tmp_path, "expected")
        assert (tmp_path / "m.nnef" / f"gate_up.{name}.dat").read_bytes() == expected.read_bytes()
    assert not (tmp_path / "m.nnef" / "gate_up.dat").exists()


def test_what_may_be_packed():
    use = frozenset({Use.EXPERTS})
    assert q40_reason(torch.ones(2, 5, 64), use) is None
    assert "stack of matrices" in q40_reason(torch.ones(2, 64, 16), use)
    assert "stack of matrices" in q40_reason(torch.ones(64, 64), use)
    assert "router of experts" in q40_reason(torch.ones(64, 64), frozenset({Use.ROUTER}))


@pytest.mark.parametrize(
    ("route", "name", "width", "packed", "fault"),
    [
        (softmax_share, "router", WIDTH, quantize_q40(torch.ones(EXPERTS, FEATURES)), "not their router"),
        *(
            (route, "down", width, packed, fault)
            for route in (softmax_share, with_correction)
            for width, packed, fault in (
                (80, quantize_q40(torch.ones(EXPERTS, FEATURES, 80)), "rows of 80 elements"),
                (64, quantize_q40(torch.ones(EXPERTS, FEATURES, 64)).transposed(), "the other axis"),
            )
        ),
    ],
)
def test_packed_weights_that_tract_cannot_take_are_refused(route, name, width, packed, fault, tmp_path):
    model = Mixture(route, width=width).eval()
    setattr(model, name, nn.Parameter(packed, requires_grad=False))
    with pytest.raises(T2NErrorConsistency, match=fault):
        quantize_and_verify(model, (torch.randn(2, 3, FEATURES),), tmp_path / "m.nnef", None)
