"""`int8_smooth`: channels of very different size are made alike before they get one scale, by what the graph proves to be exact."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.compress import DEFAULT_COMPRESSION, Choice, call_method
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.folds import find_folds
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.quantize import Selection, recording
from torch_to_nnef.quantize.budget import Budget
from torch_to_nnef.quantize.calibration import as_batch
from torch_to_nnef.quantize.methods.int8 import quantize_smooth_int8
from torch_to_nnef.quantize.smoothing import ChannelRanges, smooth
from torch_to_nnef.quantize.targets import find_targets, int8_reason
from torch_to_nnef.tensor.quant import QTensorInt8


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Gated(nn.Module):
    """A block of a language model whose norm and gates make a few channels far larger than others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3] = 60
            self.up.weight[5] *= 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 3)).eval()
    with torch.no_grad():
        model[1].weight[4] = 50
    return model


GATED = [draw(4, 9, 32, seed=seed) for seed in range(6)]
SOUNDS = [draw(2, 8, 40, seed=seed) for seed in range(6)]
CASES = {"gated": (Gated, GATED, 2), "convolutions": (convolutions, SOUNDS, 1)}


def selection(model, x, **filters):
    _, graph = captured_graph(model, prepare(model, x, None, {}))
    return Selection(weight_uses(graph), folds=find_folds(graph), **filters)


@pytest.mark.parametrize("case", CASES)
def test_the_float_model_computes_the_same(case):
    make, data, count = CASES[case]
    exact = make().eval()
    model, chosen = copy.deepcopy(exact), selection(exact, data[0])
    targets = [t for t in find_targets(model, None, chosen, int8_reason) if t.reason is None]
    ranges = ChannelRanges(targets)
    with torch.no_grad():
        for x in data:
            with ranges.watch():
                model(x)
        before = dict(model.named_parameters())
        scaled = smooth(model, chosen.folds, targets, ranges)
        changed = {name for name, p in model.named_parameters() if p is not before[name]}
        assert len(changed) >= 2 * count
        torch.testing.assert_close(model(data[5]), exact(data[5]), rtol=1e-4, atol=1e-4)
        again = ChannelRanges(find_targets(model, None, chosen, int8_reason))
        with again.watch():
            model(data[0])
        # What weights read has channels of more even size.
        spread = [max(float(r.size.max() / r.size.median()) for r in seen.of.values()) for seen in (again, ranges)]
        assert spread[0] < 0.5 * spread[1]
    scaled.undo()
    assert all(p is before[name] for name, p in model.named_parameters())


def test_ranges_of_channels():
    layer, x = nn.Linear(4, 3), draw(5, 7, 4)
    ranges = ChannelRanges(find_targets(nn.Sequential(layer), None, None, int8_reason))
    with torch.no_grad():
        for part in (x[:2], x[2:]):
            with ranges.watch():
                layer(part)
    (found,), rows = ranges.of.values(), x.reshape(-1, 4)
    assert torch.equal(found.low, rows.amin(0))
    assert torch.equal(found.high, rows.amax(0))
    torch.testing.assert_close(found.size, rows.square().mean(0).sqrt())


@pytest.mark.parametrize("case", CASES)
def test_it_loses_less_and_runs_in_tract(case, tmp_path):
    make, data, _ = CASES[case]

    def lost(method):
        report = quantize_and_verify(make().eval(), data[0], tmp_path / f"{method}.nnef.tar", method, calibration=data)
        assert report.ok
        assert all(row.storage == "int8" for row in report.rows)
        return report.quantization[0].outputs[0].snr_db

    assert lost("int8_smooth") > lost("int8") + 3  # half the energy of the noise


def test_without_gain_or_graph_it_is_int8(caplog):
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    data = [draw(4, 8, seed=seed) for seed in range(5)]
    plain = call_method(DEFAULT_COMPRESSION["int8"], copy.deepcopy(exact), calibration=data)
    caplog.set_level("WARNING")
    found = call_method(DEFAULT_COMPRESSION["int8_smooth"], copy.deepcopy(exact), calibration=data)
    assert "no channels are scaled" in caplog.text
    assert all(found[i].weight.is_identical(plain[i].weight) for i in (0, 1))


def test_a_reader_that_is_left_alone_keeps_its_fold_alone():
    exact = Gated().eval()
    chosen = selection(exact, GATED[0], exclude="up")  # reads the norm, and produces for down
    model = quantize_smooth_int8(copy.deepcopy(exact), calibration=GATED, selection=chosen)
    assert torch.equal(model.norm.weight, exact.norm.weight)
    assert isinstance(model.gate.weight, QTensorInt8)
    assert not isinstance(model.up.weight, QTensorInt8)


@pytest.mark.parametrize("moment", ["channels", "down", "outputs"])
def test_ctrl_c_leaves_the_model_as_it_was(moment):
    def stop(done, total, what):
        if what.startswith(moment):
            raise KeyboardInterrupt

    model = Gated().eval()
    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        quantize_smooth_int8(model, calibration=GATED, selection=selection(model, GATED[0]), progress=stop)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_budget_runs_it_again():
    exact = Gated().eval()
    choice = Choice("int8_smooth", budget=Budget(target_bpw=13))
    chosen = selection(exact, GATED[0])
    with recording() as rows:
        model = choice(copy.deepcopy(exact), chosen, [as_batch(GATED[5], exact)], calibration=GATED)
    assert {row.storage for row in rows} == {"int8", "f16"}
    with torch.no_grad():
        assert (model(GATED[5]) - exact(GATED[5])).norm() < 0.1 * exact(GATED[5]).norm()


def test_it_needs_data():
    with pytest.raises(T2NErrorInvalidArgument, match="calibration"):
        quantize_smooth_int8(Gated())
