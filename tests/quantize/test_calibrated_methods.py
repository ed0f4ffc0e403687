"""`q40_imatrix` and `q40_gptq` through the registry: they use what the calibration shows, and refuse to guess."""

import copy

import pytest
import torch
from torch import nn

from torch_to_nnef.compress import DEFAULT_COMPRESSION, call_method
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.tensor.quant import QTensor, quantize_q40

METHODS = ["q40_imatrix", "q40_gptq"]


class Tied(nn.Module):
    """A lookup, a layer, and a head that shares the weight of the lookup."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.layer(self.embedding(tokens))))


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(8, 16, 4, stride=2, groups=2, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(256, 32)
    )


def _images(seed: int) -> torch.Tensor:
    """Channels of different sizes, neighbours alike."""
    x = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(seed)).cumsum(-1)
    return x * torch.linspace(-1.5, 1.5, 8).exp()[:, None, None]


@pytest.mark.parametrize("method", METHODS)
def test_calibration_is_asked_for(method):
    model = _net()
    with pytest.raises(T2NErrorInvalidArgument, match="calibration"):
        call_method(DEFAULT_COMPRESSION[method], model)
    assert not any(isinstance(p, QTensor) for p in model.parameters())


def test_each_knows_more_than_the_one_before():
    seen, unseen, exact = [_images(seed) for seed in range(5)], _images(9), _net()

    def lost(method: str) -> float:
        model = call_method(DEFAULT_COMPRESSION[method], copy.deepcopy(exact), calibration=seen)
        assert all(isinstance(model[i].weight, QTensor) for i in (0, 3))
        with torch.no_grad():
            return float((model(unseen) - exact(unseen)).square().mean())

    search, imatrix, gptq = map(lost, ("q40", *METHODS))
    assert gptq < imatrix < search
    assert gptq < 0.6 * search


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_weight_is_encoded_once_by_what_its_head_reads(method):
    tokens = [torch.randint(0, 48, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    exact = Tied()
    model = call_method(DEFAULT_COMPRESSION[method], copy.deepcopy(exact), calibration=tokens)
    assert model.head.weight is model.embedding.weight
    plain = quantize_q40(exact.head.weight.detach())
    assert not model.head.weight.is_identical(plain)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_only_looked_up_is_scale_searched(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32))
    plain = quantize_q40(model[0].weight.detach())
    call_method(DEFAULT_COMPRESSION[method], model, calibration=[torch.arange(16)] * 2)
    assert model[0].weight.is_identical(plain)


@pytest.mark.parametrize("method", ["q40_imatrix", "q40_gptq", "q40_awq", "q40_awq_gptq"])
def test_a_cache_stands_for_the_data_it_was_made_of(method, tmp_path):
    given = {"calibration": [_images(seed) for seed in range(5)], "calibration_cache": tmp_path / "cache.npz"}
    first = call_method(DEFAULT_COMPRESSION[method], _net(), **given)
    again = call_method(DEFAULT_COMPRESSION[method], _net(), calibration_cache=given["calibration_cache"])
    own = call_method(DEFAULT_COMPRESSION[method], _net(), calibration=given["calibration"], sequential=False)
    for index in (0, 3):
        assert first[index].weight.is_identical(again[index].weight)
        assert first[index].weight.is_identical(own[index].weight)
