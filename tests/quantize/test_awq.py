"""Scales by activation: what they gain is real, nothing gets worse, and folds that cannot be judged are left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from torch_to_nnef.quantize.folds import Fold, Slices
from torch_to_nnef.quantize.methods.awq import ActivationScaling, best_factors, scaled_statistics
from torch_to_nnef.quantize.statistics import InputStatistics
from torch_to_nnef.tensor.quant import quantize_q40

K, N = 64, 40
CHANNELS = tuple(range(K))
READERS = {
    "linear": (lambda: nn.Linear(K, N), 1, CHANNELS, lambda x: x),
    "matmul": (lambda: Matmul(), 0, CHANNELS, lambda x: x),
    "conv": (lambda: nn.Conv1d(K, N, 3), 1, CHANNELS, lambda x: x[:, :, None].expand(-1, -1, 3).flatten(1)),
    "shared heads": (lambda: nn.Linear(2 * K, N), 1, CHANNELS * 2, lambda x: torch.cat([x, x], 1)),
    "experts": (lambda: Experts(), 2, CHANNELS, lambda x: x),
    "half of it": (lambda: nn.Linear(2 * K, N), 1, CHANNELS + (-1,) * K, lambda x: torch.cat([x, x.flip(1)], 1)),
}


class Matmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, N))


class Experts(nn.Module):
    """Two matrices, one on the other, that see the same inputs here."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, N // 2, K))


def plain(rows, name, _):
    return quantize_q40(rows, "scale_search", name=name)


def moments(x):
    hessian = (x.T @ x / len(x))[None]
    return InputStatistics(count=len(x), hessian=hessian, diagonal=hessian.diagonal(dim1=-2, dim2=-1))


def inputs(outliers=True):
    """[256, K]: some channels are 30 times as large."""
    x = torch.randn(256, K, generator=torch.Generator().manual_seed(0))
    return x * torch.where(torch.arange(K) % 16 == 3, 30.0, 1.0) if outliers else x.sign()


def net(reader):
    torch.manual_seed(0)
    make, axis, channels, spread = READERS[reader]
    model = nn.ModuleDict({"norm": nn.LayerNorm(K), "read": make()})
    fold = Fold(
        (Slices("norm.weight", 0, CHANNELS), Slices("norm.bias", 0, CHANNELS)),
        (Slices("read.weight", axis, channels),),
        K,
    )
    return model, fold, spread


def rows(model, reader):
    weight = model["read"].weight.detach()
    return {"matmul": weight.mT, "experts": weight.flatten(0, -2)}.get(reader, weight.flatten(1)).clone()


@pytest.mark.parametrize("reader", READERS)
def test_outliers_get_finer_steps(reader):
    model, fold, spread = net(reader)
    x = spread(inputs())
    known, before = {"read.weight": moments(x)}, rows(model, reader)
    if reader == "experts":
        stacked = known["read.weight"]
        known = {"read.weight": replace(stacked, hessian=stacked.hessian.repeat(2, 1, 1), diagonal=stacked.diagonal.repeat(2, 1))}
    scaling = ActivationScaling((fold,), plain, {"read.weight"})
    now = scaling(model, known)["read.weight"]
    after = rows(model, reader)
    by = after[0] / before[0]
    # The same product, of inputs that the norm has divided.
    torch.testing.assert_close((x / by) @ after.T, x @ before.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(now.hessian[-1:], moments(x / by).hessian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now.diagonal, now.hessian.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(1 / model["norm"].weight.detach(), by[: K * 3 : 3] if reader == "conv" else by[:K])

    def noise(weights, statistics):
        return statistics.output_error(weights, plain(weights, "", None).decompress())[1]

    # Of rounding to nearest; two of 32 in a group are large, for which the others now pay.
    assert noise(after, now) < 0.95 * noise(before, known["read.weight"])
    scaling.undo()
    assert torch.equal(rows(model, reader), before)
    assert bool((model["norm"].weight == 1).all())


def test_inputs_of_one_size_are_left_alone():
    model, fold, _ = net("linear")
    assert best_factors(model, fold, {"read.weight": moments(inputs(outliers=False))}, plain) is None


def test_judged_by_inputs_that_were_held_out():
    """What was learned says that some channels are large, what was held out that they are not."""
    model, fold, _ = net("linear")
    learned = moments(inputs())
    assert best_factors(model, fold, {"read.weight": learned}, plain) is not None
    held_out = moments(inputs() / inputs().square().mean(0).sqrt())
    assert best_factors(model, fold, {"read.weight": replace(learned, held_out=held_out)}, plain) is None


def test_dead_channels_do_not_blow_up():
    model, fold, _ = net("linear")
    x = inputs()
    x[:, :5] = 0
    factors = best_factors(model, fold, {"read.weight": moments(x)}, plain)
    assert bool(torch.isfinite(factors).all())
    assert factors.max() / factors.min() < 1e4


def test_every_statistic_is_scaled():
    x, by = inputs(), torch.rand(K) + 0.5
    known = replace(moments(x), held_out=moments(x[:10]), frequency=torch.ones(3))
    now = scaled_statistics(known, by)
    torch.testing.assert_close(now.hessian, moments(x / by).hessian)
    torch.testing.assert_close(now.held_out.diagonal, moments(x[:10] / by).diagonal)
    assert now.frequency is known.frequency
    assert scaled_statistics(replace(known, hessian=None, held_out=None), by).hessian is None


def left_alone(model, fold, known, waiting=("read.weight",), encoded=()):
    scaling = ActivationScaling((fold,), plain, set(waiting), encoded=set(encoded))
    assert scaling(model, known) == known
    return scaling.applied == []


def test_folds_that_cannot_be_judged():
    model, fold, _ = net("linear")
    known = {"read.weight": moments(inputs())}
    assert left_alone(model, fold, {"read.weight": None})  # the calibration never reached it
    assert left_alone(model, fold, {})
    other = replace(fold, consumers=(*fold.consumers, Slices("other.weight", 1, CHANNELS)))
    model["other"] = nn.Linear(K, N)
    assert left_alone(model, other, known, waiting=("read.weight", "other.weight"))  # it comes later
    assert left_alone(model, fold, known, encoded=("norm.weight",))
    model["read"].weight = nn.Parameter(quantize_q40(model["read"].weight.detach()), requires_grad=False)
    assert left_alone(model, fold, known)


def test_a_reader_that_stays_in_float_is_scaled_too():
    model, fold, _ = net("linear")
    model["other"] = nn.Linear(K, N)
    fold = replace(fold, consumers=(*fold.consumers, Slices("other.weight", 1, CHANNELS)))
    before = model["other"].weight.detach().clone()
    scaling = ActivationScaling((fold,), plain, {"read.weight"})
    scaling(model, {"read.weight": moments(inputs())})
    torch.testing.assert_close(model["other"].weight * model["norm"].weight, before)
