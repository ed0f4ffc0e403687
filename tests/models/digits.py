"""A residual net on the digits of scikit-learn, 8 x 8 pixels, trained in seconds."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class DigitNet(nn.Module):
    """Convolutions with batch norm, a residual block, pools, a linear layer: (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self, width=32):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.first, self.first_norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.second_norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.deep, self.deep_norm = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, image):
        x = self.pool(self.relu(self.stem_norm(self.stem(image))))
        inner = self.relu(self.first_norm(self.first(x)))
        x = self.relu(x + self.second_norm(self.second(inner)))
        x = self.relu(self.deep_norm(self.deep(x)))
        return self.head(self.pool(x).flatten(1))


class Digits:
    """Images (N, 1, 8, 8) from 0 to 1 and labels (N), cut at random into 1400 to learn from and 397 to judge on."""

    def __init__(self):
        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
        labels = torch.tensor(found.target)[order]
        self.images, self.held_out = images[:1400], images[1400:]
        self.labels, self.held_out_labels = labels[:1400], labels[1400:]

    def batches(self, count=8):
        """Some of the training images, 32 at a time."""
        return list(self.images[: 32 * count].split(32))

    def accuracy(self, logits):
        """Share of the held-out digits that are read right."""
        return (logits.argmax(1) == self.held_out_labels).float().mean().item()

    def train(self, net, epochs=5):
        """`net`, trained by Adam and in eval mode."""
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(self.images[batch]), self.labels[batch]).backward()
                optimizer.step()
        return net.eval()
