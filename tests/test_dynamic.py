"""Dynamic dimensions: what a model computes from its sizes, run in tract at other sizes than traced."""

import math

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorDynamicShapeValue,
    T2NErrorInvalidArgument,
    T2NErrorIOPytorchTractNotISO,
    T2NErrorNotImplemented,
)
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.tract_model import TractModel

F = nn.functional


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def export(folder, function, *inputs, axes, **options):
    model = function if isinstance(function, nn.Module) else Call(function)
    names = [f"args_{i}" for i in range(len(inputs))]
    target = TractNNEF.latest(dynamic_axes=dict(zip(names, axes, strict=True)))
    return export_model_to_nnef(
        model, inputs, folder / "m.nnef", target, input_names=names, compression_level=None, **options
    )


def run(path, function, *inputs):
    """The archive at these sizes, against torch."""
    with torch.no_grad():
        expected = function(*inputs)
    (actual,) = TractModel.load(path).run(*(i.numpy() for i in inputs)).values()
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=5e-4, atol=1e-4)


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# name -> (function of x [B, S], the smallest S it takes)
OF_ONE = {
    "double": (lambda x: torch.cat([x, x], 1), 1),
    "plus constant": (lambda x: F.pad(x, (1, 2)), 1),
    "half": (lambda x: x[:, : x.shape[1] // 2], 2),
    "other half": (lambda x: x[:, x.shape[1] // 2 :], 1),
    "every second": (lambda x: x[:, ::2], 1),
    "every second, from one": (lambda x: x[:, 1::2], 2),
    "all but one": (lambda x: x[:, 1:] - x[:, :-1], 2),
    "all but the last": (lambda x: x[:, :-1], 2),
    "last": (lambda x: x[:, -1], 1),
    "last three": (lambda x: x[:, -3:], 3),
    "convolution of stride 2": (lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3), stride=2, padding=1), 1),
    "convolutions of stride 2": (
        lambda x: F.conv1d(
            F.conv1d(x[:, None], torch.ones(1, 1, 3), stride=2, padding=1), torch.ones(1, 1, 3), stride=2, padding=1
        ),
        1,
    ),
    "pool": (lambda x: F.max_pool1d(x[:, None], 2), 2),
    "chunks": (lambda x: x.chunk(2, 1)[0], 3),
    "second chunk": (lambda x: x.chunk(2, 1)[1], 3),
    "split": (lambda x: x.split(x.shape[1] // 2, 1)[0], 4),
    "rest of four": (lambda x: F.pad(x, (0, x.shape[1] % 4)) * 2, 1),
    "up to a multiple of four": (lambda x: F.pad(x, (0, -x.shape[1] % 4)), 1),
    "up to a multiple of seven": (lambda x: F.pad(x, (0, (7 - x.shape[1] % 7) % 7)), 1),
    "rounded up": (lambda x: x[:, : math.ceil(x.shape[1] / 2)], 1),
    "at least four": (lambda x: x.new_ones(max(x.shape[1], 4)) * 2, 1),
    "at most four": (lambda x: x[:, : min(x.shape[1], 4)], 1),
    "square": (lambda x: x.new_ones(x.shape[1] ** 2) * 2, 1),
    "outer": (lambda x: (x[:, :, None] * x[:, None, :]).flatten(1), 1),
    "merged axes": (lambda x: x.reshape(-1) * 2, 1),
    "merged axes and back": (lambda x: (x.reshape(-1) * 2).reshape(x.shape), 1),
    "pairs": (lambda x: torch.cat([x, x], 1).view(x.shape[0], -1, 2).sum(-1), 1),
    "transposed": (lambda x: x.t().reshape(-1, 1), 1),
    "expanded": (lambda x: x[:, None].expand(-1, x.shape[1], -1) * 2, 1),
    "repeated": (lambda x: x.repeat(2, 3), 1),
    "repeated by itself": (lambda x: x[:1, :1].repeat(x.shape[0], x.shape[1]), 1),
    "interpolated": (lambda x: F.interpolate(x[:, None], scale_factor=2.0), 1),
    "stacked": (lambda x: torch.stack([x, x], 1).flatten(1), 1),
    "positions": (lambda x: x + torch.arange(x.shape[1]), 1),
    "positions, as many as halves": (lambda x: torch.arange(x.shape[1] // 2) * 2, 2),
    "positions from the middle": (lambda x: torch.arange(x.shape[1] // 2, x.shape[1]) * 2, 1),
    "relative positions": (lambda x: torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None], 1),
    "causal mask": (lambda x: torch.ones(x.shape[1], x.shape[1]).tril() * x[:1], 1),
    "mean": (lambda x: x.sum(1) / x.shape[1], 1),
    "scaled": (lambda x: x * x.shape[1] ** -0.5, 1),
    "root": (lambda x: x / math.sqrt(x.shape[1]), 1),
    "logarithm": (lambda x: x * math.log(x.shape[1]), 1),
    "ratio": (lambda x: x * (x.shape[0] / x.shape[1]), 1),
    "size as a tensor": (lambda x: x + torch.tensor(x.shape[1]), 1),
    "size of the other axis": (lambda x: x + x.shape[0], 1),
    "full of a size": (lambda x: torch.full((2,), x.shape[1]) * 2, 1),
    "windows": (lambda x: F.pad(x, (0, -x.shape[1] % 4)).view(x.shape[0], -1, 4).mean(-1), 1),
    "unfolded": (lambda x: x.unfold(1, 2, 2).sum(-1), 2),
    "gathered": (lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)], 1),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_sizes_of_one_input(name, tmp_path):
    function, smallest = OF_ONE[name]
    path = export(tmp_path, function, x(2, 8), axes=[{0: "B", 1: "S"}])
    for batch, length in ((1, 1), (3, 2), (1, 3), (2, 7), (5, 16), (1, 17), (4, 30)):
        if length >= smallest:
            run(path, function, x(batch, length))
