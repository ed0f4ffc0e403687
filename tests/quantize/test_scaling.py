"""A fold applied: exact for powers of two, undone to the bit, and nobody's parameters are written to."""

import copy

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.folds import Fold, Slices
from torch_to_nnef.quantize.scaling import apply_fold, rescaled, spread
from torch_to_nnef.tensor.offload import OffloadedTensor, offload
from torch_to_nnef.tensor.quant import quantize_q40

CHANNELS = tuple(range(8))
FOLD = Fold((Slices("0.weight", 0, CHANNELS), Slices("0.bias", 0, CHANNELS)), (Slices("2.weight", 1, CHANNELS),), 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_by_powers_of_two_nothing_changes(model):
    x = torch.randn(5, 4)
    before = model(x)
    apply_fold(model, FOLD, 2.0 ** torch.arange(-4, 4))
    assert torch.equal(model(x), before)


def test_new_parameters_take_the_places_of_the_old(model):
    old = list(model.parameters())
    values = copy.deepcopy(old)
    model[2].weight.requires_grad_(False)
    done = apply_fold(model, FOLD, torch.full((8,), 3.0))
    assert [a is b for a, b in zip(model.parameters(), old, strict=True)] == [False, False, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    torch.testing.assert_close(model[2].weight.detach(), values[2].detach() * 3)
    done.undo()
    assert all(a is b for a, b in zip(model.parameters(), old, strict=True))
    assert all(map(torch.equal, old, values))


def test_a_shared_weight_stays_shared(model):
    model.append(nn.Linear(8, 3))
    model[3].weight = model[2].weight
    apply_fold(model, FOLD, torch.full((8,), 2.0))
    assert model[3].weight is model[2].weight


def test_weights_on_disk_stay_there(model):
    held = model[2].weight.detach().clone()
    model[2].weight = nn.Parameter(offload(held), requires_grad=False)
    apply_fold(model, FOLD, torch.full((8,), 2.0))
    assert isinstance(model[2].weight, OffloadedTensor)
    assert torch.equal(model[2].weight.load(), held * 2)


def test_slices_without_a_channel_and_an_offset():
    model = nn.ParameterDict({"norm": torch.tensor([0.0, 1.0, 3.0]), "read": torch.ones(2, 3)})
    fold = Fold((Slices("norm", 0, (1, -1, 0), offset=1.0),), (Slices("read", 1, (1, -1, 0)),), 2)
    apply_fold(model, fold, torch.tensor([2.0, 4.0]))
    assert model["norm"].tolist() == [0.25 - 1, 1.0, 1.0]  # (1 + 0) / 4 - 1, as it was, (1 + 3) / 2 - 1
    assert model["read"].tolist() == [[4.0, 1.0, 2.0]] * 2
    assert spread(fold.consumers[0], torch.tensor([2.0, 4.0])).tolist() == [4.0, 1.0, 2.0]


def test_one_parameter_on_both_sides():
    """A linear whose outputs and inputs are the same channels, as in a state that is carried."""
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    apply_fold(model, Fold((Slices("weight", 0, (0, 1)),), (Slices("weight", 1, (0, 1)),), 2), torch.tensor([2.0, 8.0]))
    assert torch.equal(model.weight, before * torch.tensor([[1.0, 4.0], [0.25, 1.0]]))


@pytest.mark.parametrize("factors", [[1.0] * 7, [0.0] + [1.0] * 7, [-1.0] * 8, [float("nan")] * 8, [float("inf")] * 8])
def test_factors_that_are_none(model, factors):
    old = list(model.parameters())
    with pytest.raises(T2NErrorInvalidArgument, match="8 positive finite numbers"):
        apply_fold(model, FOLD, torch.tensor(factors))
    assert all(a is b for a, b in zip(model.parameters(), old, strict=True))


def test_factors_beyond_the_dtype(model):
    model.half()
    old = list(model.parameters())
    with pytest.raises(T2NErrorInvalidArgument, match="`2.weight`: a factor leaves the range of torch.float16"):
        apply_fold(model, FOLD, torch.full((8,), 1e6))
    assert all(a is b for a, b in zip(model.parameters(), old, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_packed_weights(transposed):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize_q40(weight)
    before = packed.decompress().mT if transposed else packed.decompress()
    packed = packed.transposed() if transposed else packed
    factors = torch.linspace(0.3, 7, 8)
    by = factors if transposed else factors[:, None]
    new = rescaled(packed, Slices("w", int(transposed), CHANNELS), factors)
    assert type(new) is type(packed)
    # f16 has 11 bits.
    torch.testing.assert_close(new.decompress(), before * by, rtol=2**-11, atol=0)
    assert torch.equal(
        rescaled(packed, Slices("w", int(transposed), CHANNELS), 2 * torch.ones(8)).decompress(), 2 * before
    )


@pytest.mark.parametrize("factor", [1e-5, 1e6])
def test_rows_whose_scales_leave_f16(factor):
    packed = quantize_q40(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    assert rescaled(packed, FOLD.producers[0], torch.full((8,), factor)) is None
