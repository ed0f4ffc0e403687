"""The whole way in seconds: what a wheel in an empty environment must do, offline."""

import numpy as np
import pytest
import torch
from torch import nn

import torch_to_nnef
from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.tensor.quant import QTensor


class Tiny(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 64, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, ids):
        hidden = self.conv(self.embedding(ids).transpose(1, 2)).relu().transpose(1, 2)
        return self.head(self.norm(hidden)).softmax(-1)


@pytest.mark.parametrize("suffix", [".nnef", ".nnef.tar", ".nnef.tgz"])
def test_module_to_verified_archive(tmp_path, suffix):
    torch.manual_seed(0)
    model = Tiny().eval()
    path = tmp_path / f"tiny{suffix}"
    report = quantize_and_verify(model, torch.tensor([[1, 2, 3]]), path, dynamic_axes={"ids": {0: "B", 1: "S"}})
    assert report.ok
    assert {row.fqn: row.storage for row in report.rows} == {
        "embedding.weight": "q40",
        "conv.weight": "q40",
        "head.weight": "q40",
    }
    assert len(report.archive) >= 3
    assert not any(isinstance(p, QTensor) for p in model.parameters())
    ids = torch.tensor([[4, 5, 6, 7, 49]])
    probabilities = TractModel.load(path).run(ids)["output"]
    with torch.no_grad():
        reference = model(ids).numpy()
    assert np.abs(probabilities - reference).max() < 0.05
    assert np.allclose(probabilities.sum(-1), 1, atol=1e-5)


def test_the_version_comes_from_one_place():
    from importlib.metadata import version

    assert torch_to_nnef.__version__ == version("torch-to-nnef-native")
