"""Ranges that observers choose: against definitions, exhaustive search, and what is known of distributions."""

import pytest
import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.observers import OBSERVERS, Histogram, LeastSquares, MovingAverage, Percentile
from torch_to_nnef.tensor.quant import QParams


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIGNALS = {
    "normal": draw(40_000),
    "relu": draw(40_000).relu(),
    "gelu": torch.nn.functional.gelu(2 * draw(40_000)),
    "shifted": draw(40_000) + 3,
    "negative": -draw(40_000).abs(),
    "heavy tails": draw(40_000) ** 3,
    "an outlier": torch.cat([draw(40_000), torch.tensor([100.0, -60.0])]),
    "pixels": torch.randint(0, 17, (4000,), generator=torch.Generator().manual_seed(0)) / 16,
}


def bounds(name, *tensors):
    observer = OBSERVERS[name]()
    for x in tensors:
        observer.see(x)
    return observer.bounds()


def error(x, low, high):
    return float((QParams.of_range(low, high, torch.uint8).fake(x) - x).double().square().mean())


def test_min_max_is_all_that_was_seen():
    assert bounds("min_max", torch.tensor([1.0, 3.0]), torch.tensor([[-2.0], [0.5]])) == (-2.0, 3.0)
    assert bounds("min_max", torch.tensor([1.0, 3.0])) == (0.0, 3.0)


def test_moving_average_forgets():
    observer = MovingAverage(0.25)
    for x in ([-1.0, 4.0], [-3.0, 8.0], [1.0, 2.0]):
        observer.see(torch.tensor(x))
    assert observer.bounds() == pytest.approx((-1.5 * 0.75, 5.0 * 0.75 + 2.0 * 0.25))


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_bounds_hold_zero_and_lie_within_what_was_seen(name, signal):
    x = SIGNALS[signal]
    low, high = bounds(name, x)
    assert min(float(x.min()), 0) <= low <= 0 <= high <= max(float(x.max()), 0)
    assert low < high


@pytest.mark.parametrize("name", OBSERVERS)
def test_what_has_no_range(name):
    assert bounds(name) == bounds(name, torch.zeros(5), torch.zeros(0)) == (0.0, 0.0)
    low, high = bounds(name, torch.full((1000,), 2.5))
    assert error(torch.tensor([2.5]), low, high) < 1e-6
    for bad in (float("nan"), float("inf")):
        with pytest.raises(T2NErrorInvalidArgument):
            bounds(name, torch.tensor([1.0, bad]))


@pytest.mark.parametrize("name", ["min_max", "percentile", "mse", "entropy"])
def test_neither_order_nor_cuts_nor_size_matter(name):
    x = SIGNALS["an outlier"]
    whole = bounds(name, x)
    assert bounds(name, *x.flip(0).split(777)) == whole
    assert bounds(name, x.double().view(2, -1)) == whole
    # A power of two changes the exponent alone.
    assert bounds(name, x * 2.0**-30) == pytest.approx([b * 2.0**-30 for b in whole], rel=1e-6)


def test_percentile_is_the_quantile():
    x = draw(100_000)
    low, high = bounds("percentile", x)
    width = float(x.abs().max()) / 2048
    for outside, further_in in ((x > high, x > high - 2 * width), (x < low, x < low + 2 * width)):
        assert int(outside.sum()) <= 10 <= int(further_in.sum())
    zeros = torch.cat([torch.zeros(99_990), torch.arange(1.0, 11.0)])
    assert bounds("percentile", zeros)[1] <= 1.01
    observer = Percentile(0.9)
    observer.see(torch.arange(-500.0, 501.0))
    assert observer.bounds() == pytest.approx((-400, 400), abs=1)
    for wrong in (0.5, 1.1):
        with pytest.raises(T2NErrorInvalidArgument):
            Percentile(wrong)


@pytest.mark.parametrize("signal", SIGNALS)
def test_least_squares_is_as_good_as_exhaustive_search(signal):
    x = SIGNALS[signal]
    found = error(x, *bounds("mse", x))
    lowest, highest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    tried = [error(x, lowest * a / 40, highest * b / 40) for a in range(0, 41, 2) for b in range(1, 41, 2)]
    # The zero point is rounded after the search, which moves both ends by up to half a step.
    assert found <= 1.03 * min(tried)
    assert found <= 1.0001 * min(error(x, *bounds(name, x)) for name in ("min_max", "percentile", "entropy")) * 1.03


def test_clipping_gains_where_tails_are_heavy():
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(1e-5, 1 - 1e-5, 100_000))
    whole = error(x, *bounds("min_max", x))
    assert error(x, *bounds("mse", x)) < 0.9 * whole
    assert bounds("entropy", x)[1] < bounds("min_max", x)[1]


def test_of_few_distinct_values_nothing_is_cut():
    x = SIGNALS["pixels"]
    assert bounds("entropy", x) == bounds("min_max", x)


def test_a_histogram_counts_every_value_once():
    seen, values = Histogram(), torch.cat([draw(1000) * scale for scale in (1e-3, 1.0, 1e4)] + [torch.zeros(7)])
    for part in values.split(100):
        seen.add(part)
    middles, counts = seen.filled()
    assert (float(counts.sum()), seen.zeros) == (3000, 7)
    edges = torch.cat([middles - seen.width / 2, middles[-1:] + seen.width / 2])
    expected = torch.stack(
        [((values >= low) & (values < low + seen.width) & (values != 0)).sum() for low in edges[:-1]]
    )
    assert torch.equal(counts, expected.double())
    assert Histogram.BINS // 4 * seen.width <= values.abs().max() <= Histogram.BINS // 2 * seen.width


def test_extreme_sizes_are_seen():
    for size in (1e-30, 1e30, 1e38):
        observer = LeastSquares()
        observer.see(torch.tensor([-size, size / 3, size]))
        low, high = observer.bounds()
        assert high == pytest.approx(size, rel=0.02)
        assert low == pytest.approx(-size, rel=0.02)
