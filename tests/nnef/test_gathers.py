"""Slices of what packed embeddings give, near and far: tract would move them in front of the lookup, and panic."""

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify

IDS = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))
TAKES = {
    "columns": lambda net, x: x[..., :16],
    "two parts": lambda net, x: torch.cat([x[..., 32:], x[..., :32]], -1),
    "the last token, scaled": lambda net, x: (x * 8)[:, -1],
    "tokens behind a linear": lambda net, x: net.linear(x).relu()[:, 1:],
    "a gate": lambda net, x: nn.functional.glu(x),
    "one of two": lambda net, x: x + x.mean(1, keepdim=True)[:, :, :1],
    "nothing": lambda net, x: net.linear(x),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("width", [64, 60])
def test_sliced(take, width, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.linear = nn.Embedding(64, width), nn.Linear(width, 32)

        def forward(self, ids):
            return take(self, self.embed(ids))

    axes = {"ids": {0: "B", 1: "S"}}
    report = quantize_and_verify(Net().eval(), IDS, tmp_path / "m.nnef", fallback="pad", dynamic_axes=axes)
    assert report.ok
    assert report.rows[0].storage == "q40"
    assert ("columns" in (tmp_path / "m.nnef" / "graph.nnef").read_text()) == (
        width == 60 or take not in (TAKES["nothing"], TAKES["one of two"])
    )
