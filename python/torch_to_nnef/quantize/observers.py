"""Which range of an activation its 256 codes cover: everything that was seen, or less of it in smaller steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.tensor.chunks import flat_chunks

_STEPS = 255
"""Between the lowest and the highest of 256 codes."""
_SHRINKS = 2.0 ** (-torch.arange(0, 81, dtype=torch.float64) / 8)
"""Parts of a bound that are tried: down to a thousandth, each 9 % below the one before."""

_FEWEST = 128
"""Bins that must be left: of few distinct values, such as pixels, whatever is left looks like itself."""


class Observer(ABC):
    """Sees tensors that have one scale and zero point in common, and says which range the codes should cover."""

    @abstractmethod
    def see(self, x: torch.Tensor) -> None:
        """Take in `x`, floats of any shape and dtype. Raises `T2NErrorInvalidArgument` for NaN and Inf."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """`(low, high)` with low <= 0 <= high; zeros if nothing was seen."""


class MinMax(Observer):
    """From the smallest to the largest value."""

    def __init__(self) -> None:
        self._low = self._high = 0.0

    def see(self, x: torch.Tensor) -> None:
        """As `Observer.see`."""
        low, high = _extremes(x)
        self._low, self._high = min(self._low, low), max(self._high, high)

    def bounds(self) -> tuple[float, float]:
        """As `Observer.bounds`."""
        return self._low, self._high


class MovingAverage(Observer):
    """Exponential moving averages of smallest and largest values, a step for each tensor.

    torch takes 0.01 of each tensor, for training; of the few batches of a calibration that would keep little but the first.
    """

    def __init__(self, share: float = 0.1) -> None:
        self._share = share
        self._average: tuple[float, float] | None = None

    def see(self, x: torch.Tensor) -> None:
        """As `Observer.see`."""
        low, high = _extremes(x)
        before = self._average or (low, high)
        self._average = (
            before[0] + self._share * (low - before[0]),
            before[1] + self._share * (high - before[1]),
        )

    def bounds(self) -> tuple[float, float]:
        """As `Observer.bounds`."""
        return self._average or (0.0, 0.0)


class Histogram:
    """How many values lie where, in bins around 0 whose width is a power of two.

    Where a value lies beyond them, neighbours are joined, which is exact, so that the result does not depend on the order of the data.
    At least a quarter of the bins lie between 0 and the largest magnitude.
    """

    BINS = 8192

    def __init__(self) -> None:
        self._counts = torch.zeros(self.BINS, dtype=torch.float64)
        self._exponent = -100  # of the width: smaller values share the bins around 0
        self.low = self.high = 0.0
        self.zeros = 0

    def add(self, x: torch.Tensor) -> None:
        """Count the values of `x`."""
        low, high = _extremes(x)
        self.low, self.high = min(self.low, low), max(self.high, high)
        half, largest = self.BINS // 2, max(-low, high)
        if largest > math.ldexp(half, self._exponent):
            self._widen(math.frexp(largest / half)[1])
        for _, values in flat_chunks(x):
            scaled = values.float() * 2.0**-self._exponent
            zeros = int((scaled == 0).sum())
            counts = torch.histc(scaled, self.BINS, -half, half).double().cpu()
            counts[half] -= zeros
            self.zeros += zeros
            self._counts += counts

    def _widen(self, exponent: int) -> None:
        for _ in range(min(exponent - self._exponent, int(math.log2(self.BINS)))):
            joined = self._counts.view(-1, 2).sum(1)
            self._counts = torch.nn.functional.pad(joined, (self.BINS // 4, self.BINS // 4))
        self._exponent = exponent

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self._exponent)

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(values, counts)`, f64 [n]: the middles of the bins that are not empty, ascending, and how many values each has; no zeros."""
        index = self._counts.nonzero().flatten()
        return (index.double() - self.BINS // 2 + 0.5) * self.width, self._counts[index]


class _Counting(Observer):
    def __init__(self) -> None:
        self._histogram = Histogram()

    def see(self, x: torch.Tensor) -> None:
        """As `Observer.see`."""
        self._histogram.add(x)


class Percentile(_Counting):
    """What is left when of all values the share 1 - `percentile` is cut off at each end."""

    def __init__(self, percentile: float = 0.9999) -> None:
        super().__init__()
        if not 0.5 < percentile <= 1:
            raise T2NErrorInvalidArgument(f"percentile must be in (0.5, 1]: got {percentile}")
        self._percentile = percentile

    def bounds(self) -> tuple[float, float]:
        """As `Observer.bounds`."""
        seen = self._histogram
        values, counts = seen.filled()
        cut = (1 - self._percentile) * (float(counts.sum()) + seen.zeros)
        # The outermost bins that are not cut off, with the whole of their width.
        below, above = counts.cumsum(0) > cut, counts.flip(0).cumsum(0).flip(0) > cut
        if not bool(below.any()):
            return 0.0, 0.0
        low = float(values[below][0]) - seen.width / 2
        high = float(values[above][-1]) + seen.width / 2
        return min(max(low, seen.low), 0.0), max(min(high, seen.high), 0.0)


class LeastSquares(_Counting):
    """The range under which rounding and clipping have the least squared error."""

    def bounds(self) -> tuple[float, float]:
        """As `Observer.bounds`: both ends shrink together, then each alone, as long as that helps."""
        seen = self._histogram
        self._values, self._counts = seen.filled()
        low, high = torch.tensor([[seen.low], [seen.high]], dtype=torch.float64)
        if not low < high:
            return 0.0, 0.0
        coarse, fine = _SHRINKS[::2], torch.linspace(0.84, 1.16, 17, dtype=torch.float64)
        low, high = self._best(low * coarse, high * coarse)
        for shrinks in (coarse, coarse, fine):
            low, high = self._best(low, (high * shrinks).clamp(max=seen.high))
            low, high = self._best((low * shrinks).clamp(min=seen.low), high)
        return float(low), float(high)

    def _best(self, lows: torch.Tensor, highs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `(lows[i], highs[i])`, as `[1]` each."""
        count = max(len(lows), len(highs))
        lows, highs = lows.expand(count), highs.expand(count)
        best = int(torch.stack([self._error(low, high) for low, high in zip(lows, highs, strict=True)]).argmin())
        return lows[best : best + 1], highs[best : best + 1]

    def _error(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        values, counts = self._values, self._counts
        step = (high - low) / _STEPS
        if step <= 0:
            return torch.tensor(torch.inf, dtype=torch.float64)
        rounded = (values / step).round() * step
        # Steps that are hardly wider than bins: where in its bin a value lies decides, so the mean is taken.
        inside = (rounded - values).square() if step >= 4 * self._histogram.width else step.square() / 12
        outside = (values.clamp(low, high) - values).square()
        return ((inside + outside) * counts).sum()


class Entropy(_Counting):
    """The range that keeps most of the distribution: least KL(values || values as rounded), outliers counted at the ends.

    Migacz, "8-bit inference with TensorRT", GTC 2017, with codes for both signs.
    """

    def bounds(self) -> tuple[float, float]:
        """As `Observer.bounds`."""
        seen = self._histogram
        largest = max(-seen.low, seen.high)
        # Fewer bins than codes are told apart without loss, whatever is cut off.
        tried = [
            (max(seen.low, -t), min(seen.high, t))
            for t in (largest * _SHRINKS).tolist()
            if min(seen.high, t) - max(seen.low, -t) >= (_STEPS + 1) * seen.width
        ]
        # Of equals, the first: the widest.
        return min(tried, key=lambda bounds: self._divergence(*bounds), default=(seen.low, seen.high))

    def _divergence(self, low: float, high: float) -> float:
        values, counts = self._histogram.filled()
        inside = (values > low) & (values < high)
        kept = counts[inside]
        if len(kept) < _FEWEST:
            return math.inf
        exact = kept.clone()
        exact[0] += counts[values <= low].sum()
        exact[-1] += counts[values >= high].sum()
        codes = (values[inside] * (_STEPS / (high - low))).round().long()
        codes = codes - codes.min()
        # Each code's values are taken to be spread evenly over the bins that have any.
        mean = torch.bincount(codes, weights=kept) / torch.bincount(codes).clamp(min=1)
        p, q = exact / exact.sum(), mean[codes] / kept.sum()
        return float((p * (p / q).log()).sum())


OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType(
    {
        "min_max": MinMax,
        "moving_average": MovingAverage,
        "percentile": Percentile,
        "mse": LeastSquares,
        "entropy": Entropy,
    }
)


def _extremes(x: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest of 0 and the values of `x`."""
    if not x.numel():
        return 0.0, 0.0
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    if not math.isfinite(low) or not math.isfinite(high):
        raise T2NErrorInvalidArgument("NaN or infinite values")
    return min(low, 0.0), max(high, 0.0)
