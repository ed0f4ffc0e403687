"""All weights or none, ties kept, a row for each."""

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization
from torch_to_nnef.quantize import Selection, Use, quantize_, recording
from torch_to_nnef.quantize.methods.min_max import quantize_min_max
from torch_to_nnef.quantize.methods.scale_search import quantize_scale_search
from torch_to_nnef.tensor.quant import QTensor, quantize_q40


def tied_net():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"emb": nn.Embedding(16, 64), "mid": nn.Linear(64, 33), "out": nn.Linear(33, 64), "head": nn.Linear(64, 16)}
    )
    net["head"].weight = net["emb"].weight
    return net


def encode(weight, name):
    return quantize_q40(weight, name=name)


def test_weights_are_replaced_and_ties_kept():
    net = tied_net()
    reference = net["emb"].weight.detach().clone()
    assert quantize_(net, encode, method="q40") is net
    assert isinstance(net["emb"].weight, QTensor)
    assert isinstance(net["emb"].weight, nn.Parameter)
    assert net["head"].weight is net["emb"].weight
    assert net["emb"].weight.nnef_name == "emb.weight"
    assert type(net["out"].weight) is nn.Parameter
    assert torch.equal(net["emb"](torch.tensor([3])), quantize_q40(reference).decompress()[[3]])


def test_rows_tell_all_that_was_asked():
    with recording() as rows:
        quantize_(tied_net(), encode, method="q40", selection=Selection(exclude="mid"))
    by_name = {row.fqn: row for row in rows}
    assert list(by_name) == ["emb.weight", "mid.weight", "out.weight"]
    done, excluded, refused = rows
    assert (done.module_class, done.shape, done.dtype, done.storage) == ("Embedding", (16, 64), "float32", "q40")
    assert (done.quantized, done.reason, done.method, done.bits_per_weight) == (True, None, "q40", 4.5)
    assert (done.nbytes_before, done.nbytes_after) == (4096, 576)
    assert 15 < done.snr_db < 30
    assert done.relative_rmse == pytest.approx(10 ** (-done.snr_db / 20))
    assert (excluded.quantized, excluded.reason, excluded.storage) == (False, "excluded by the caller", "f32")
    assert (refused.bits_per_weight, refused.snr_db, refused.method, refused.nbytes_after) == (32.0, None, None, 8448)
    assert "33 elements a row" in refused.reason


def test_quantizing_twice_changes_nothing():
    net = quantize_scale_search(tied_net())
    held = net["emb"].weight
    with recording() as rows:
        quantize_scale_search(net)
    assert net["emb"].weight is held
    assert (rows[0].storage, rows[0].quantized, rows[0].reason, rows[0].method) == (
        "q40",
        True,
        "already quantized",
        None,
    )


@pytest.mark.parametrize("error", [T2NErrorImpossibleQuantization, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("stage", ["encode", "swap"])
def test_all_or_nothing(error, stage, monkeypatch):
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    before = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    calls = []

    def failing(weight, name):
        calls.append(name)
        if stage == "encode" and len(calls) == 3:
            raise error("stop")
        return encode(weight, name)

    if stage == "swap":
        from torch_to_nnef.tensor.updater import Place

        put = Place.put

        def failing_put(self, tensor):
            put(self, tensor)
            if self.fqn == "1.weight" and isinstance(tensor, QTensor):
                raise error("stop")

        monkeypatch.setattr(Place, "put", failing_put)
    with recording() as rows, pytest.raises(error):
        quantize_(net, failing, method="q40")
    assert len(calls) == 3
    assert {name: (id(p), p.requires_grad) for name, p in net.named_parameters()} == before
    assert rows == []


def test_a_nan_names_the_weight_and_leaves_the_model():
    net = tied_net()
    with torch.no_grad():
        net["head"].weight[1, 1] = float("nan")
    with pytest.raises(T2NErrorImpossibleQuantization, match=r"emb\.weight"):
        quantize_min_max(net, [nn.Linear])
    assert type(net["emb"].weight) is nn.Parameter


def test_progress():
    seen = []
    quantize_(tied_net(), encode, method="q40", progress=lambda *step: seen.append(step))
    assert seen == [(0, 12544, "emb.weight"), (4096, 12544, "mid.weight"), (12544, 12544, "")]


def test_functional_weights_and_buffers_by_use():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))
            self.register_buffer("b", torch.randn(32, 32))

        def forward(self, x):
            return nn.functional.linear(nn.functional.linear(x, self.w), self.b)

    net = Functional()
    x = torch.ones(1, 32)
    expected = net(x)
    uses = {"w": frozenset({Use.LINEAR}), "b": frozenset({Use.LINEAR})}
    quantize_scale_search(net, selection=Selection(uses=uses))
    assert isinstance(net.w, QTensor)
    assert isinstance(net.b, QTensor)
    assert "b" in dict(net.named_buffers())
    assert 0 < (net(x) - expected).abs().max() < 0.2 * expected.abs().max()


def test_attention_still_runs():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    x = torch.randn(1, 3, 64)
    expected = layer(x)
    quantize_scale_search(layer)
    with torch.no_grad():
        assert (layer(x) - expected).abs().max() < 0.5
