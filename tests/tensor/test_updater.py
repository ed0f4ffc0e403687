"""One replacement, every place."""

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument
from torch_to_nnef.tensor import ModTensorUpdater, QTensor
from torch_to_nnef.tensor.quant import quantize_q40


@pytest.fixture
def tied():
    model = nn.ModuleDict({"emb": nn.Embedding(8, 32), "head": nn.Linear(32, 8), "norm": nn.BatchNorm1d(3)})
    model["head"].weight = model["emb"].weight
    model["again"] = model["head"]
    return model


def test_all_places_of_a_shared_weight(tied):
    updater = ModTensorUpdater(tied)
    assert [p.fqn for p in updater.places(tied["emb"].weight)] == ["emb.weight", "head.weight", "again.weight"]
    held = updater.update_by_ref(tied["emb"].weight, quantize_q40(tied["emb"].weight))
    assert isinstance(held, QTensor)
    assert tied["emb"].weight is tied["head"].weight is tied["again"].weight is held
    assert not held.requires_grad


def test_by_any_name_and_again(tied):
    updater = ModTensorUpdater(tied)
    first = updater.update_by_name("head.weight", torch.zeros(8, 32))
    assert isinstance(first, nn.Parameter)
    assert first.requires_grad
    second = updater.update_by_name("emb.weight", torch.ones(8, 32))
    assert tied["again"].weight is second
    assert updater.get("again.weight") is second
    with pytest.raises(T2NErrorInvalidArgument):
        updater.update_by_ref(first, torch.ones(8, 32))


def test_buffers(tied):
    updater = ModTensorUpdater(tied)
    updater.update_by_name("norm.running_mean", torch.full((3,), 2.0))
    assert tied["norm"].running_mean.tolist() == [2.0] * 3
    assert "running_mean" in tied["norm"]._buffers


def test_errors_change_nothing(tied):
    updater, before = ModTensorUpdater(tied), tied["emb"].weight
    with pytest.raises(T2NErrorInconsistentTensor, match=r"emb\.weight"):
        updater.update_by_name("emb.weight", torch.zeros(8, 31))
    with pytest.raises(T2NErrorInvalidArgument, match=r"no\.such"):
        updater.update_by_name("no.such", torch.zeros(1))
    assert tied["head"].weight is before
