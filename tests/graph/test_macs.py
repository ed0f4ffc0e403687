"""Multiply-accumulates counted by hand, and where products run; what rounding may move."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_to_nnef import TractNNEF
from torch_to_nnef.export import Naming, Steps, plan_export
from torch_to_nnef.graph.macs import arithmetic
from torch_to_nnef.graph.rounding import rounds, slack, steps
from torch_to_nnef.tensor.quant import QParams, quantize_int8

Q = QParams.of_range(-3, 3, torch.int8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        y = self.fc(self.up(self.conv(x)).flatten(2).transpose(1, 2))
        return F.scaled_dot_product_attention(y, y, y) @ y.mT


def packed(model, *names):
    torch.manual_seed(0)
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(quantize_int8(module.weight, input_qparams=Q), requires_grad=False)
    return model.eval()


def plan_of(model, x):
    return plan_export(model, x, TractNNEF(dynamic_axes={"x": {0: "B"}}), Naming(["x"]), (), Steps())


def test_products_are_counted_and_say_where_they_run():
    plan = plan_of(packed(Net(), "conv"), torch.randn(2, 3, 9, 9))
    found = arithmetic(plan.graph, {"B": 5})
    pixels = 8 * 8
    assert [(p.module_path, p.operator, p.macs // 5, p.reason) for p in found.products] == [
        ("conv", "integer_conv", 4 * 4 * 8 * 27, ""),
        ("up", "conv_transpose2d", 4 * 4 * 8 * 4 * 4, "its weight is in float"),
        ("fc", "linear", pixels * 24, "its weight is in float"),
        ("", "scaled_dot_product_attention", pixels * pixels * 12, "both factors are computed"),
        ("", "matmul", pixels * pixels * 6, "both factors are computed"),
    ]
    assert found.integer_share == pytest.approx(4 * 4 * 8 * 27 / (found.macs / 5))


def test_what_is_not_rounded_has_no_slack():
    plan = plan_of(Net().eval(), torch.randn(2, 3, 9, 9))
    assert not rounds(plan.graph)
    assert plan.arithmetic() is None
    assert steps(plan.graph) == (0.0,)


def test_slack_is_what_a_hundredth_of_the_codes_moves():
    model = packed(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), "0", "2")
    x = torch.randn(16, 64)
    plan = plan_export(model, x, TractNNEF(), Naming(["x"]), (), Steps())
    (allowed,) = slack(plan.captured, plan.graph, (x,))
    weights = model.get_submodule("2").weight.decompress().abs().max().item()
    # Some codes of the last input are one off, hardly ever more than a handful for one value.
    assert Q.scale * weights / 2 < allowed < 20 * Q.scale * weights
    assert slack(plan.captured, plan.graph, (x,)) == (allowed,)
    # And no random state of torch is touched.
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    slack(plan.captured, plan.graph, (x,))
    assert torch.equal(before, torch.random.get_rng_state())
