"""Architectures of the zoo that no package ships, as small as keeps them what they are."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


def convs(before, after, count=2):
    """`count` convolutions of 3x3 with batch norm and ReLU."""
    steps = [(before if i == 0 else after, after) for i in range(count)]
    layers = [(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)) for a, b in steps]
    return nn.Sequential(*(layer for three in layers for layer in three))


class UNet(nn.Module):
    """Ronneberger et al. 2015: down by pooling, up by transposed convolution, joined at each level."""

    def __init__(self, widths=(16, 32, 64), classes=4):
        super().__init__()
        self.stem = convs(3, widths[0])
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), convs(a, b)) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(pairs))
        self.join = nn.ModuleList(convs(2 * a, a) for a, _ in reversed(pairs))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, image):
        levels = [self.stem(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], dim=1))
        return self.head(x)


class SpatialAttention(nn.Module):
    """One head over all positions, as the middle of a latent diffusion decoder has it."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, channels),
            *(nn.Conv2d(channels, n * channels, 1) for n in (3, 1)),
        )

    def forward(self, x):
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in self.qkv(self.norm(x)).chunk(3, dim=1))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(mixed.reshape(x.shape))


class VaeDecoder(nn.Module):
    """Latents to an image: residual blocks with group norm and SiLU, attention, nearest upsampling."""

    def __init__(self, latents=4, widths=(64, 32)):
        super().__init__()
        self.stem = nn.Conv2d(latents, widths[0], 3, padding=1)
        self.middle = nn.Sequential(self.block(widths[0]), SpatialAttention(widths[0]), self.block(widths[0]))
        self.up = nn.Sequential(*(self.stage(a, b) for a, b in zip(widths, [*widths[1:], widths[-1]], strict=True)))
        self.head = nn.Sequential(nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    @staticmethod
    def block(width):
        halves = [(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        return Residual(*halves[0], *halves[1])

    def stage(self, before, after):
        return nn.Sequential(
            self.block(before), nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(before, after, 3, padding=1)
        )

    def forward(self, latent):
        return self.head(self.up(self.middle(self.stem(latent))))


class CausalConv1d(nn.Conv1d):
    """Sees no later step: all padding in front."""

    def forward(self, x):
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Tcn(nn.Module):
    """Bai et al. 2018: residual blocks of dilated causal convolutions with weight norm."""

    def __init__(self, channels=32, classes=6, dilations=(1, 2, 4)):
        super().__init__()
        conv = nn.utils.parametrizations.weight_norm
        self.stem = nn.Conv1d(8, channels, 1)
        self.blocks = nn.Sequential(
            *(
                Residual(conv(CausalConv1d(channels, channels, 3, dilation=d)), nn.ReLU(), nn.Dropout(0.1))
                for d in dilations
            )
        )
        self.head = nn.Conv1d(channels, classes, 1)

    def forward(self, signal):
        return self.head(self.blocks(self.stem(signal)))


class Transpose(nn.Module):
    """Exchange two axes."""

    def __init__(self, a, b):
        super().__init__()
        self.axes = a, b

    def forward(self, x):
        return x.transpose(*self.axes)


class Mixer(nn.Sequential):
    """Tolstikhin et al. 2021: linear layers over patches, then over channels."""

    def __init__(self, patches=16, width=64, classes=10, depth=2):
        def mlp(size):
            return nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size)

        blocks = [
            block
            for _ in range(depth)
            for block in (
                Residual(nn.LayerNorm(width), Transpose(1, 2), *mlp(patches), Transpose(1, 2)),
                Residual(nn.LayerNorm(width), *mlp(width)),
            )
        ]
        stem = nn.Conv2d(3, width, 8, stride=8), nn.Flatten(2), Transpose(1, 2)
        super().__init__(*stem, *blocks, nn.LayerNorm(width), Transpose(1, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.append(nn.Linear(width, classes))


class FeedForward(Residual):
    """Half a residual step of a Conformer block."""

    def __init__(self, width):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + 0.5 * self.inner(x)


class Attend(nn.Module):
    """torch's own multi-head attention of a sequence with itself."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Conformer(nn.Module):
    """Gulati et al. 2020, without relative positions: strided convolutions, then blocks of attention and convolution."""

    def __init__(self, mels=40, width=64, classes=12, depth=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU())
        self.project = nn.Linear(16 * (((mels - 1) // 2 - 1) // 2), width)
        self.blocks = nn.Sequential(*(self.block(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    @staticmethod
    def block(width):
        depthwise = nn.Conv1d(width, width, 15, padding=7, groups=width)
        convolution = (
            *(nn.LayerNorm(width), Transpose(1, 2), nn.Conv1d(width, 2 * width, 1), nn.GLU(1), depthwise),
            *(nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1), Transpose(1, 2)),
        )
        attention = Residual(nn.LayerNorm(width), Attend(width, 4))
        return nn.Sequential(
            FeedForward(width), attention, Residual(*convolution), FeedForward(width), nn.LayerNorm(width)
        )

    def forward(self, mel):
        x = self.stem(mel[:, None]).transpose(1, 2).flatten(2)
        return self.head(self.blocks(self.project(x))).log_softmax(-1)


class DsCnn(nn.Module):
    """Zhang et al. 2017: a convolution, then depthwise separable ones, over mel features (N, T, mels)."""

    def __init__(self, width=32, classes=12, depth=2):
        super().__init__()
        stem = nn.Conv2d(1, width, (10, 4), 2, padding=(4, 1), bias=False), nn.BatchNorm2d(width), nn.ReLU()
        self.features = nn.Sequential(*stem, *(layer for _ in range(depth) for layer in self.separable(width)))
        self.head = nn.Linear(width, classes)

    @staticmethod
    def separable(width):
        for conv in (nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.Conv2d(width, width, 1)):
            yield from (conv, nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, mel):
        return self.head(F.adaptive_avg_pool2d(self.features(mel[:, None]), 1).flatten(1))


class KeywordSpotter(nn.Module):
    """Waveform (N, samples) to keywords: power spectrum, a bank of triangular filters, logarithm, `DsCnn`."""

    def __init__(self, window=256, hop=128, mels=20):
        super().__init__()
        self.window_size, self.hop = window, hop
        self.register_buffer("window", torch.hann_window(window))
        self.register_buffer("bank", triangles(mels, window // 2 + 1))
        self.net = DsCnn()

    def forward(self, audio):
        spectrum = torch.stft(audio, self.window_size, self.hop, window=self.window, center=True, return_complex=True)
        power = spectrum.abs().square()
        return self.net(torch.log(torch.matmul(self.bank, power) + 1e-3).transpose(1, 2))


def triangles(count, bins):
    """`count` overlapping triangular filters over `bins` frequencies, wider towards the top."""
    centers = (torch.linspace(0, 1, count + 2) ** 1.5 * (bins - 1))[:, None]
    at, low, mid, high = torch.arange(bins), centers[:-2], centers[1:-1], centers[2:]
    return torch.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clamp(min=0)


class Tagger(nn.Module):
    """Token ids (N, S) to a tag each: an embedding, a bidirectional LSTM, a linear layer."""

    def __init__(self, vocabulary=50, width=32, tags=5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])
