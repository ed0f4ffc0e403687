"""In-place calls become functional without a second trace where nothing else can see them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_to_nnef.graph.capture import capture
from torch_to_nnef.graph.inputs import prepare


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x):
        return self.function(self.conv(x), x)


def seen_before(y, x):
    doubled = y * 2
    y.relu_()
    return doubled + y


def chained(y, x):
    y += y.abs()
    y.relu_()
    return y.mul_(2), y


def through_view(y, x):
    flat = y.view(-1)
    y.relu_()
    return flat + 1


def on_view(y, x):
    y[:, 1].relu_()
    return y


def on_input(y, x):
    x.relu_()
    return x.sum()


ALONE = [
    lambda y, x: F.relu(y, inplace=True),
    lambda y, x: F.dropout(y, inplace=True, training=False),
    seen_before,
    chained,
]
SHARED = [through_view, on_view, on_input, lambda y, x: y.add_(torch.ones((), dtype=torch.float64))]


def captured(function, x):
    torch.manual_seed(0)
    model = Net(function).eval()
    return model, capture(model, prepare(model, x, None, None))


@pytest.mark.parametrize("function", ALONE)
def test_alone(function):
    x = torch.randn(2, 3, 6, 6)
    model, capture = captured(function, x)
    assert not capture.writes_in_place()
    outputs = capture.program.graph_signature.user_outputs
    got = capture.values(outputs, [x.clone()])
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(x))
    assert all(torch.equal(got[name], value) for name, value in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("function", SHARED)
def test_seen_by_others(function):
    assert captured(function, torch.randn(2, 3, 6, 6))[1].writes_in_place()
