"""Learned scales: closer outputs, the same codes, and nothing at all where nothing is gained."""

import copy

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.calibration import Batch, Calibration
from torch_to_nnef.quantize.methods.min_max import quantize_min_max
from torch_to_nnef.quantize.tuning import distance_of, outputs_of, tune
from torch_to_nnef.tensor.quant import QTensorTractScaleOnly


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 16, bias=False)
        self.matrix = nn.Parameter(torch.randn(64, 64) / 8)  # used as x @ matrix: packed transposed

    def forward(self, x):
        return self.last(self.norm(self.first(x).relu()) @ self.matrix)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(Batch((torch.randn(16, 64, generator=generator),), {}) for _ in range(count))


@pytest.fixture
def nets():
    torch.manual_seed(0)
    model = Net().eval()
    packed = quantize_min_max(copy.deepcopy(model), (nn.Linear,))
    return model, packed


def relative_error(model, packed, data):
    with torch.no_grad():
        pairs = [(batch(model), batch(packed)) for batch in data]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def test_outputs_come_closer_on_data_never_seen(nets):
    model, packed = nets
    before = dict(packed.named_parameters())
    unseen = batches(4, seed=7)
    error = relative_error(model, packed, unseen)
    steps = []
    tuned = tune(
        packed, dict(model.named_parameters()), Calibration(batches(24), batches(4, seed=3)), passes=4,
        step=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert dict(packed.named_parameters()).keys() == before.keys()
    assert all(packed.get_parameter(name) is tensor for name, tensor in before.items())
    assert tuned.after < tuned.before
    assert steps == [(i, 96) for i in range(96)]
    assert set(tuned.tensors) == {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight"}
    for name in ("first.weight", "last.weight"):
        new, old = tuned.tensors[name], packed.get_parameter(name).detach()
        assert isinstance(new, QTensorTractScaleOnly)
        assert torch.equal(new.u8_blob, old.u8_blob)
        assert new.qscheme.scale.dtype is torch.float16
    for name, tensor in tuned.tensors.items():
        module, _, attribute = name.rpartition(".")
        setattr(packed.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    assert relative_error(model, packed, unseen) < 0.9 * error  # white inputs leave little to win
    assert tuned.after == pytest.approx(relative_error(model, packed, batches(4, seed=3)), rel=0.05)


def test_nothing_is_given_where_nothing_is_gained(nets):
    model, _ = nets
    exact = copy.deepcopy(model)
    tuned = tune(exact, dict(model.named_parameters()), Calibration(batches(3)), passes=1)
    assert (tuned.before, tuned.after, dict(tuned.tensors)) == (0.0, 0.0, {})


def test_logits_are_compared_as_distributions():
    logits = torch.randn(3, 5)
    shifted = {"logits": logits + 4.0}
    assert float(distance_of({"logits": logits}, shifted)) == pytest.approx(0.0, abs=1e-6)
    p, q = logits.softmax(-1), torch.full((3, 5), 0.2)
    by_hand = (p * (p / q).log()).sum(-1).mean()
    assert float(distance_of({"logits": logits}, {"logits": torch.zeros(3, 5)})) == pytest.approx(
        float(by_hand), rel=1e-5
    )
    assert float(distance_of({"0": logits}, {"0": 2 * logits})) == pytest.approx(1.0)


def test_a_model_without_float_outputs_is_refused():
    with pytest.raises(T2NErrorInvalidArgument, match="no float tensors"):
        outputs_of((torch.ones(2, dtype=torch.int64), None))
