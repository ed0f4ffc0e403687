"""`q40_awq` and `q40_awq_gptq` through the registry, and in tract."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.compress import DEFAULT_COMPRESSION, call_method
from torch_to_nnef.exceptions import T2NErrorInvalidArgument

METHODS = {"q40_awq": "q40_imatrix", "q40_awq_gptq": "q40_gptq"}


class Encoder(nn.Module):
    """A pre-norm layer of a transformer, some of whose channels are large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.mha = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True)
        self.again, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            for norm in (self.norm, self.again):
                norm.weight.mul_(torch.where(torch.arange(64) % 16 == 3, 30.0, 1.0))
            self.up.weight[::16].mul_(20.0)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.mha(y, y, y, need_weights=False)[0]
        return x + self.down(F.relu(self.up(self.again(x))))


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(32, 64, 5, padding=2), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(256, 32),
    )  # fmt: skip
    with torch.no_grad():
        net[1].weight.mul_(torch.where(torch.arange(64) == 3, 100.0, 1.0))
        net[3].weight[5].mul_(100.0)
    return net.eval()


NETS = {"encoder": (Encoder, (8, 12, 64)), "conv": (conv_net, (4, 32, 20))}
CHANGED = {"encoder": {"norm.weight", "again.weight", "up.bias"}, "conv": {"1.weight", "3.bias"}}


def batches(shape, seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_in_tract(name, method, tmp_path):
    make, shape = NETS[name]
    model, exact = make().eval(), make().eval()
    data, unseen = batches(shape, 0), batches(shape, 1)
    report = quantize_and_verify(model, (data[0],), tmp_path / "m.nnef", method, calibration=data, inplace=True)
    assert report.ok, report
    assert all(row.quantized for row in report.rows)
    assert {row.method for row in report.rows} == {method}
    before = dict(exact.named_parameters())
    changed = {n for n, p in model.named_parameters() if p.dim() == 1 and not torch.equal(p, before[n])}
    assert method == "q40_awq_gptq" or changed >= CHANGED[name]  # GPTQ gains from fewer folds
    other = copy.deepcopy(exact)
    quantize_and_verify(other, (data[0],), tmp_path / "o.nnef", METHODS[method], calibration=data, inplace=True)

    def lost(model):
        with torch.no_grad():
            return sum(float((model(x) - exact(x)).square().sum()) for x in unseen)

    # Weighted search gains from finer steps for large inputs. GPTQ has little left to gain, and loses nothing.
    assert lost(model) < (0.95 if method == "q40_awq" else 1.05) * lost(other)


def test_the_given_model_keeps_its_norms(tmp_path):
    model, (x, *more) = Encoder().eval(), batches((8, 12, 64), 0)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    quantize_and_verify(model, (x,), tmp_path / "m.nnef", "q40_awq", calibration=more)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("method", METHODS)
def test_calibration_is_asked_for(method, tmp_path):
    with pytest.raises(T2NErrorInvalidArgument, match="calibration"):
        quantize_and_verify(Encoder(), torch.randn(8, 12, 64), tmp_path / "m.nnef", method)
    with pytest.raises(T2NErrorInvalidArgument, match="calibration"):
        call_method(DEFAULT_COMPRESSION[method], Encoder())


def test_without_a_graph_it_says_so(caplog):
    model = Encoder().eval()
    norm = model.norm.weight
    with caplog.at_level(logging.WARNING, logger="torch_to_nnef"):
        call_method(DEFAULT_COMPRESSION["q40_awq"], model, calibration=batches((8, 12, 64), 0))
    assert "q40_awq: no inputs are scaled" in caplog.text
    assert model.norm.weight is norm
