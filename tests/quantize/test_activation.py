"""Inputs scaled by their size: what is gained is real, nothing gets worse, and folds that cannot be judged are left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.activation import ActivationScaling
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import Batch, Calibration
from torch_to_nnef.quantize.folds import Fold, Slices
from torch_to_nnef.quantize.rows import recording
from torch_to_nnef.quantize.statistics import InputStatistics, Moments
from torch_to_nnef.quantize.targets import Selection, Use, find_targets
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


def moments(x, matrices=1):
    return Moments(hessian=(x.T @ x / len(x)).repeat(matrices, 1, 1, 1))


def known(reader, x, held_out=None):
    matrices = 2 if reader == "experts" else 1
    return InputStatistics(moments(x, matrices), None if held_out is None else moments(held_out, matrices))


def inputs(outliers=True):
    """[256, K]: some channels are 30 times as large."""
    x = torch.randn(256, K, generator=torch.Generator().manual_seed(0))
    return x * torch.where(torch.arange(K) % 16 == 3, 30.0, 1.0) if outliers else x.sign()


def net(reader):
    """A norm in front of a reader, its fold, the weights to be encoded, and how the reader sees what the norm makes."""
    torch.manual_seed(0)
    make, axis, channels, spread = READERS[reader]
    model = nn.ModuleDict({"norm": nn.LayerNorm(K), "read": make()})
    fold = Fold(
        (Slices("norm.weight", 0, CHANNELS), Slices("norm.bias", 0, CHANNELS)),
        (Slices("read.weight", axis, channels),),
        K,
    )
    return model, fold, wanted(model, reader), spread


def wanted(model, reader="linear", names=("read.weight",)):
    use = {"matmul": Use.MATMUL, "experts": Use.EXPERTS, "conv": Use.CONV}.get(reader, Use.LINEAR)
    uses = dict.fromkeys(names, frozenset({use}))
    return [t for t in find_targets(model, None, Selection(uses=uses)) if t.reason is None]


def rows(reader, weight):
    return {"matmul": weight.mT, "experts": weight.flatten(0, -2)}.get(reader, weight.flatten(1))


@pytest.mark.parametrize("reader", READERS)
def test_outliers_get_finer_steps(reader):
    model, fold, (target,), spread = net(reader)
    x = spread(inputs())
    scaling, statistics = ActivationScaling(model, (fold,), [target], plain, plain), known(reader, x)
    scaling.choose([target], statistics, {})
    scaled, now = scaling.scaled(target, statistics)
    before, after = rows(reader, target.tensor.detach()), rows(reader, scaled.tensor)
    by = after[0] / before[0]
    torch.testing.assert_close(now.learn.hessian[-1, 0], moments(x / by).hessian[0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaling.unscaled(target, scaled.tensor), target.tensor.detach())
    assert torch.equal(scaling.final(target).tensor, scaled.tensor)
    ((_, factors),) = scaling.chosen
    torch.testing.assert_close(by[: K * 3 : 3] if reader == "conv" else by[:K], factors)

    def noise(weights, statistics):
        return statistics.judge.output_error(weights, plain(weights, "", None).decompress())[1]

    # Of rounding to nearest; two of 32 in a group are large, for which the others now pay.
    assert noise(after, now) < (1.0 if reader == "conv" else 0.95) * noise(before, statistics)
    # The same error, seen from the inputs as they are.
    error = scaling.unscaled(target, plain(scaled.tensor, "", None).decompress()) if reader != "matmul" else None
    if error is not None:
        seen = statistics.judge.output_error(target.tensor.detach(), error)[1]
        assert seen == pytest.approx(noise(after, now), rel=1e-3)


def test_inputs_of_one_size_are_left_alone():
    model, fold, targets, _ = net("linear")
    scaling = ActivationScaling(model, (fold,), targets, plain, plain)
    scaling.choose(targets, known("linear", inputs(outliers=False)), {})
    assert scaling.chosen == []


@pytest.mark.parametrize("agrees", [True, False])
def test_judged_by_inputs_that_were_held_out(agrees):
    """What was learned says that some channels are large; what was held out says so too, or that they are not."""
    model, fold, targets, _ = net("linear")
    x = inputs()
    scaling = ActivationScaling(model, (fold,), targets, plain, plain)
    scaling.choose(targets, known("linear", x, x if agrees else x / x.square().mean(0).sqrt()), {})
    assert len(scaling.chosen) == agrees


def test_dead_channels_do_not_blow_up():
    model, fold, targets, _ = net("linear")
    x = inputs()
    x[:, :5] = 0
    scaling = ActivationScaling(model, (fold,), targets, plain, plain)
    scaling.choose(targets, known("linear", x), {})
    ((_, factors),) = scaling.chosen
    assert bool(torch.isfinite(factors).all())
    assert factors.max() / factors.min() < 1e4


def chosen(model, folds, targets, now=slice(None), packed=()):
    scaling = ActivationScaling(model, folds, targets, plain, plain)
    scaling.choose(targets[now], known("linear", inputs()), dict(packed))
    return scaling.chosen


def test_folds_that_cannot_be_judged():
    model, fold, targets, _ = net("linear")
    assert chosen(model, (fold,), targets)
    scaling = ActivationScaling(model, (fold,), targets, plain, plain)
    scaling.choose(targets, InputStatistics(Moments(frequency=torch.ones(N))), {})  # an embedding alone
    assert scaling.chosen == []
    # A reader whose channels are in another order has statistics of its own.
    model["other"] = nn.Linear(K, N)
    other = replace(fold, consumers=(*fold.consumers, Slices("other.weight", 1, CHANNELS[::-1])))
    assert not chosen(model, (other,), wanted(model, names=("read.weight", "other.weight")))
    # An embedding has no rows that could be rescaled once it is packed, and is packed before.
    model["table"] = nn.Embedding(N, K)
    table = replace(fold, producers=(Slices("table.weight", 1, CHANNELS),))
    everything = [t for t in find_targets(model, None) if t.reason is None]
    assert not chosen(model, (table,), everything)
    model["read"].weight = nn.Parameter(quantize_q40(model["read"].weight.detach()), requires_grad=False)
    assert not chosen(model, (fold,), targets)


class Block(nn.Module):
    """A norm, two readers of it, one of which makes what a third one reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(K)
        self.gate, self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(K, 2 * K), nn.Linear(2 * K, N)
        with torch.no_grad():
            self.norm.weight.mul_(torch.where(torch.arange(K) % 16 == 3, 30.0, 1.0))
            self.up.weight[::16].mul_(30.0)

    def forward(self, x):
        x = self.norm(x)
        return self.down(torch.sigmoid(self.gate(x) / 30) * self.up(x))


WIDE = tuple(range(2 * K))
FOLDS = (
    Fold(
        (Slices("norm.weight", 0, CHANNELS), Slices("norm.bias", 0, CHANNELS)),
        (Slices("gate.weight", 1, CHANNELS), Slices("up.weight", 1, CHANNELS)),
        K,
    ),
    Fold((Slices("up.weight", 0, WIDE), Slices("up.bias", 0, WIDE)), (Slices("down.weight", 1, WIDE),), 2 * K),
)


def batches(seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(Batch((torch.randn(32, K, generator=generator),), {}) for _ in range(n))


def quantized(encode=plain, scaling=plain, **selection):
    model = Block()
    calibration = Calibration(batches(0), batches(1))
    with recording() as recorded:
        quantize_calibrated_(
            model, encode, calibration, selection=Selection(folds=FOLDS, **selection), method="t", scaling=scaling
        )
    return model, recorded


def relative_error(model):
    x = torch.cat([batch.args[0] for batch in batches(2, 16)])
    with torch.no_grad():
        expected = Block()(x)
        return float((model(x) - expected).square().sum() / expected.square().sum())


def test_a_model_with_two_folds():
    unscaled, _ = quantized(scaling=None)
    model, recorded = quantized()
    assert [row.fqn for row in recorded if row.quantized] == ["gate.weight", "up.weight", "down.weight"]
    # The weights that are compared are those that the rows stand for: 4 bits give 20 dB of anything.
    assert all(row.snr_db > 18 for row in recorded)
    assert bool((model.norm.weight != Block().norm.weight).any())
    assert bool((model.up.bias != Block().up.bias).any())
    assert torch.equal(model.gate.bias, Block().gate.bias)
    assert relative_error(model) < 0.9 * relative_error(unscaled)


def test_a_reader_that_stays_in_float_is_scaled_too():
    model, recorded = quantized(exclude="gate")
    assert bool((model.gate.weight != Block().gate.weight).any())
    assert not next(row for row in recorded if row.fqn == "gate.weight").quantized
    assert relative_error(model) < 2e-2


@pytest.mark.parametrize("error", [T2NErrorInvalidArgument("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_model_as_it_was(error):
    model = Block()
    before = dict(model.named_parameters())

    def fails(rows, name, statistics):
        if name == "down.weight":
            raise error
        return plain(rows, name, statistics)

    with pytest.raises(type(error)):
        quantize_calibrated_(
            model, fails, Calibration(batches(0)), selection=Selection(folds=FOLDS), method="t", scaling=plain
        )
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
