"""What stands beside packed weights: tract rewrites scales, concats and reshapes into them, which their blocks do not take."""

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify


class Scaled(nn.Module):
    """A convolution, then one factor a channel."""

    def __init__(self, kernel):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(32, 16, kernel), nn.Parameter(torch.linspace(0.5, 2, 16)[:, None, None])

    def forward(self, x):
        return self.conv(x) * self.scale


class Shuffled(nn.Module):
    """Channels exchanged between groups before a convolution of one element."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 16, 1)

    def forward(self, x):
        return self.conv(x.unflatten(1, (2, 16)).transpose(1, 2).flatten(1, 2))


class Joined(nn.Module):
    """Two halves joined, and moved about, in front of a layer."""

    def __init__(self, layer, move=lambda x: x):
        super().__init__()
        self.layer, self.move = layer, move

    def forward(self, x):
        return self.layer(self.move(torch.cat([x, 2 * x], 1)))


def normed(conv, norm):
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(conv, norm)


MODELS = {
    "conv2d, batch norm": lambda: normed(nn.Conv2d(32, 16, 3), nn.BatchNorm2d(16)),
    "conv1d, batch norm": lambda: normed(nn.Conv1d(32, 16, 3), nn.BatchNorm1d(16)),
    "strided 1x1, batch norm": lambda: normed(nn.Conv2d(32, 16, 1, 2), nn.BatchNorm2d(16)),
    "grouped, batch norm": lambda: normed(nn.Conv2d(64, 16, 4, groups=2), nn.BatchNorm2d(16)),
    "scaled": lambda: Scaled(3),
    "1x1, scaled": lambda: Scaled(1),
    "shuffled": Shuffled,
    "1x1 without bias, joined": lambda: Joined(nn.Conv2d(64, 16, 1, bias=False)),
    "3x3, joined": lambda: Joined(nn.Conv2d(64, 16, 3)),
    "linear, joined": lambda: Joined(nn.Linear(64, 16), lambda x: x.flatten(2).transpose(1, 2)),
    "flat linear, joined": lambda: Joined(nn.Linear(64 * 64, 16, bias=False), lambda x: x.flatten(1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_beside_packed_weights(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    size, axis = (2, 64 if name.startswith("grouped") else 32, 8, 8), "x" if name.endswith("ed") else "input"
    if "conv1d" in name:
        size = size[:3]
    report = quantize_and_verify(model, torch.randn(size), tmp_path / "net.nnef", dynamic_axes={axis: {0: "B"}})
    assert report.ok
    assert [row.fqn for row in report.rows if row.quantized]
