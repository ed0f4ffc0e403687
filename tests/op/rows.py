"""What the rows of the op table's tests are made of."""

from dataclasses import dataclass, field

import torch
from torch import nn

from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@dataclass(frozen=True)
class Row:
    name: str
    function: object
    inputs: tuple
    axes: dict = field(default_factory=dict)


def x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape, high=5):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def flags(*shape):
    return x(*shape, seed=2) > 0


B = {0: "B"}
BS = {0: "B", 1: "S"}


def unary(function, name=None, positive=False, scale=3.0):
    values = x(3, 5).abs() + 0.1 if positive else scale * x(3, 5)
    return Row(name or function.__name__, lambda t: function(t), (values,), {"args_0": B})


def check(row, folder):
    """Export through the public API; the check in tract, at other sizes too, is on."""
    target = TractNNEF.latest(dynamic_axes=row.axes)
    export_model_to_nnef(Call(row.function), row.inputs, folder / "op.nnef", target, compression_level=None)
