"""Names travel with tensors."""

import copy
import pickle

import torch
from torch import nn

from torch_to_nnef.tensor import NamedTensor, apply_name_to_tensor_in_module
from torch_to_nnef.tensor.quant import quantize_q40


def test_named_tensor_shares_memory_and_gives_plain_results():
    base = torch.zeros(3)
    named = NamedTensor(base, "a.b")
    base[0] = 5
    assert (named.nnef_name, float(named[0])) == ("a.b", 5.0)
    assert type(named + 1) is torch.Tensor


def test_named_tensor_copies_keep_the_name():
    named = NamedTensor(torch.arange(3.0, requires_grad=True), "w")
    for twin in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert (type(twin), twin.nnef_name, twin.tolist()) == (NamedTensor, "w", [0.0, 1.0, 2.0])
        assert twin.requires_grad


def test_gradient_reaches_the_source():
    source = torch.ones(2, requires_grad=True)
    (NamedTensor(source, "w") * 3).sum().backward()
    assert source.grad.tolist() == [3.0, 3.0]


def test_module_names():
    model = nn.ModuleDict({"emb": nn.Embedding(4, 32), "head": nn.Linear(32, 4, bias=False), "norm": nn.BatchNorm1d(3)})
    model["head"].weight = model["emb"].weight
    before = dict(model.state_dict(keep_vars=True))
    named = apply_name_to_tensor_in_module(model)
    assert list(named) == [
        "emb.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    assert model["head"].weight.nnef_name == "emb.weight"
    assert all(model.state_dict(keep_vars=True)[k] is v for k, v in before.items())
    layer = nn.Linear(32, 4)
    layer.weight = nn.Parameter(quantize_q40(layer.weight), requires_grad=False)
    apply_name_to_tensor_in_module(layer)
    assert layer.weight.nnef_name == "weight"
