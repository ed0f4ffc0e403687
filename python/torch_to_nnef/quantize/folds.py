"""Places of a model where the inputs of weights can be scaled for nothing: the factor goes into what is before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """Channels that may be multiplied by any s [C] > 0 where they are made and divided by it where they are read, exactly.

    producers: `(fqn, axis)`: parameters whose slice c along `axis` is divided by s_c (norm weight and bias, rows of a linear and its
        bias...). consumers: `(fqn, axis)`: weights whose slice c along `axis` is multiplied by s_c (columns of a linear [N, K]: axis 1).
    channels: C. repeat: each channel of the producers is read by so many in the consumers (grouped heads of attention), in runs of
        `run`: consumer channel j reads producer channel (j // (repeat * run)) * run + j % run.
    """

    producers: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    channels: int
    repeat: int = 1
    run: int = 1
