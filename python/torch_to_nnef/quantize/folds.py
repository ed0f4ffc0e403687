"""Places of a model where the inputs of weights can be scaled for nothing: the factor goes into what is before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slices:
    """Slices of a parameter along an axis, and the channel that each belongs to.

    fqn: of the parameter. axis: slice i is `parameter.select(axis, i)`. channels: of slice i, or -1: it belongs to none.
    offset: what the model adds to the parameter before it multiplies with it: 1 for norms that compute `x * (1 + weight)`.
    """

    fqn: str
    axis: int
    channels: tuple[int, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Fold:
    """Channels that may be divided by any s [channels] > 0 where they are made and multiplied by it where they are read.

    What the model computes stays the same but for rounding.

    producers: parameters whose slices are divided by s: weight and bias of a norm, rows of a linear and its bias...
    consumers: weights whose slices are multiplied by s: columns of a linear, input channels of a convolution...
    """

    producers: tuple[Slices, ...]
    consumers: tuple[Slices, ...]
    channels: int
