"""Weights are encoded by the inputs they get, in order; until all are, the model is the one it was."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize import Selection, Use
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import Batch, Calibration, as_calibration
from torch_to_nnef.quantize.rows import recording
from torch_to_nnef.tensor.offload import offload
from torch_to_nnef.tensor.quant import QTensor, quantize_q40


def plain(weight, name, statistics):
    return quantize_q40(weight, name=name)


def quantized(model, batches, **options):
    """Name -> statistics that an encoder gets, in order of encoding; rows by name."""
    known = {}

    def encode(weight, name, statistics):
        known[name] = statistics
        return quantize_q40(weight, name=name)

    data = batches if isinstance(batches, Calibration) else as_calibration(batches)
    with recording() as rows:
        quantize_calibrated_(model, encode, data, method="q40", **options)
    return known, {row.fqn: row for row in rows}


def moment(x):
    """Mean of x x^T over the rows of x [..., K]."""
    x = x.detach().flatten(0, -2)
    return x.T @ x / len(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)) * self.gate(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))


def samples(count=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 32, generator=generator) for _ in range(count)]


def test_inputs_are_those_that_quantized_weights_give():
    """By hand: quantize one after the other, and look at what the next one reads."""
    model, hand, exact = Net().eval(), Net().eval(), Net().eval()
    data = samples()
    known, rows = quantized(model, data)
    assert list(known) == [f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "gate", "down")] + ["head.weight"]
    assert known["blocks.0.up.weight"] is known["blocks.0.gate.weight"]
    assert known["blocks.0.up.weight"].learn.drift is None
    x, y = torch.cat(data[:4]), torch.cat(data[:4])
    for block, old, index in zip(hand.blocks, exact.blocks, (0, 1), strict=True):
        if index:
            learn = known[f"blocks.{index}.up.weight"].learn
            assert torch.allclose(learn.hessian[0, 0], moment(x), atol=1e-5)
            assert torch.allclose(learn.drift[0, 0], x.detach().T @ (y - x).detach() / len(x), atol=1e-5)
            assert torch.allclose(learn.drift_square[0, 0], moment(y - x), atol=1e-6)
        for part in (block.up, block.gate):
            part.weight = nn.Parameter(quantize_q40(part.weight.detach()).decompress())
        middle, was = torch.tanh(block.up(x)) * block.gate(x), torch.tanh(old.up(y)) * old.gate(y)
        learn = known[f"blocks.{index}.down.weight"].learn
        assert torch.allclose(learn.hessian[0, 0], moment(middle), atol=1e-5)
        assert torch.allclose(learn.drift_square[0, 0], moment(was - middle), atol=1e-6)
        block.down.weight = nn.Parameter(quantize_q40(block.down.weight.detach()).decompress())
        x, y = x + block.down(middle), old(y)
    assert torch.allclose(known["head.weight"].learn.hessian[0, 0], moment(x), atol=1e-5)
    held = data[4]
    with torch.no_grad():
        expected = exact.head(exact.blocks[1](exact.blocks[0](held))) - exact.head.bias
        lost = expected - (model(held) - model.head.bias)
    ratio = float(expected.double().square().sum() / lost.double().square().sum())
    assert rows["head.weight"].output_snr_db == pytest.approx(10 * math.log10(ratio), abs=1e-2)
    assert rows["head.weight"].seconds > 0


def test_otherwise_they_are_those_of_the_float_model():
    model, exact = Net(), Net().eval()
    known, _ = quantized(model, samples(), sequential=False)
    x = exact.blocks[0](torch.cat(samples()[:4]))
    assert torch.allclose(known["blocks.1.up.weight"].learn.hessian[0, 0], moment(x), atol=1e-5)
    assert known["head.weight"].learn.drift is None
    held = exact.blocks[0](samples()[4])
    assert torch.allclose(known["blocks.1.up.weight"].held_out.hessian[0, 0], moment(held), atol=1e-5)


def test_the_same_comes_out_every_time():
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))
        known, rows = quantized(Net(), samples())
        runs.append((known, {name: row.output_snr_db for name, row in rows.items()}))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(k.learn.hessian, runs[1][0][name].learn.hessian) for name, k in runs[0][0].items())


def test_a_single_batch_of_a_single_sample_is_not_judged():
    known, rows = quantized(Net(), [torch.ones(1, 32)])
    assert known["head.weight"].held_out is None
    assert rows["head.weight"].output_snr_db is None


def state(model):
    tensors = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    return tensors, [m.training for m in model.modules()], hooks, fused


def assert_same_state(a, b):
    assert a[1:] == b[1:]
    assert [t[:2] for t in a[0]] == [t[:2] for t in b[0]]
    assert all(torch.equal(x, y) for (*_, x), (*_, y) in zip(a[0], b[0], strict=True))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 5, 6])
def test_an_error_while_encoding_leaves_the_model(sequential, error, at):
    model = Net().train()
    model.blocks[1].eval()
    before, calls = state(model), []

    def encode(weight, name, statistics):
        calls.append(name)
        if len(calls) == at:
            raise error
        return plain(weight, name, statistics)

    with recording() as rows, pytest.raises(error):
        quantize_calibrated_(model, encode, as_calibration(samples()), method="q40", sequential=sequential)
    assert_same_state(before, state(model))
    assert rows == []


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("at", range(1, 60, 9))
def test_ctrl_c_while_the_model_runs_leaves_it(sequential, at):
    model = Net().train()
    ran = []

    def interrupt(*_):
        ran.append(1)
        if len(ran) == at:
            raise KeyboardInterrupt

    model.blocks[1].gate.register_forward_hook(interrupt)
    before = state(model)
    try:
        quantize_calibrated_(model, plain, as_calibration(samples()), method="q40", sequential=sequential)
    except KeyboardInterrupt:
        assert_same_state(before, state(model))
    else:
        assert len(ran) < at
        assert isinstance(model.head.weight, QTensor)


def test_modes_are_put_back_and_dropout_is_off():
    model = Net().train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    known, _ = quantized(model, samples())
    assert [m.training for m in model.modules()] == modes
    again, _ = quantized(Net().eval(), samples())
    assert torch.equal(known["head.weight"].learn.hessian, again["head.weight"].learn.hessian)
    assert not any(p.requires_grad for p in model.parameters() if isinstance(p, QTensor))
    assert model.head.bias.requires_grad


def test_progress_is_told_in_bytes_and_while_the_model_runs():
    told = []
    quantize_calibrated_(
        Net(), plain, as_calibration(samples()), method="q40", progress=lambda *step: told.append(step)
    )
    assert told[0][0] == 0
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    total = sum(p.nbytes for p in Net().parameters() if p.dim() == 2)
    assert {t for _, t, _ in told} == {total}
    assert told[-1] == (total, total, "")
    assert (0, total, "inputs of blocks.0.up.weight, 2 of 5") in told
    assert (0, total, "blocks.0.up.weight") in told


def test_what_is_packed_already_stays_and_computes():
    model, exact = Net().eval(), Net().eval().blocks[0]
    packed = nn.Parameter(quantize_q40(exact.up.weight.detach()), requires_grad=False)
    model.blocks[0].up.weight = packed
    known, rows = quantized(model, samples())
    assert "blocks.0.up.weight" not in known
    assert model.blocks[0].up.weight is packed
    assert rows["blocks.0.up.weight"].reason == "already quantized"
    exact.up.weight, exact.gate.weight = (
        nn.Parameter(quantize_q40(p.weight.detach()).decompress()) for p in (exact.up, exact.gate)
    )
    x = torch.cat(samples()[:4])
    middle = torch.tanh(exact.up(x)) * exact.gate(x)
    assert torch.allclose(known["blocks.0.down.weight"].learn.hessian[0, 0], moment(middle), atol=1e-5)


def test_weights_on_disk_are_refused():
    model = Net()
    model.head.weight = nn.Parameter(offload(model.head.weight.detach()), requires_grad=False)
    before = dict(model.named_parameters())
    with pytest.raises(T2NErrorInvalidArgument, match=r"`head\.weight` is on disk"):
        quantized(model, samples())
    assert all(p is before[name] for name, p in model.named_parameters())


def test_inputs_that_are_not_finite_name_the_weight_and_change_nothing():
    model = Net().eval()
    model.blocks[1].up.bias.data[3] = float("inf")
    model.blocks[1].gate.bias.data[3] = float("nan")
    before = state(model)
    with pytest.raises(T2NErrorInvalidArgument, match=r"inputs of `blocks\.1\.down\.weight` are not finite"):
        quantized(model, samples())
    assert [t[:2] for t in before[0]] == [t[:2] for t in state(model)[0]]


def test_a_batch_that_the_model_does_not_take_changes_nothing():
    model = Net()
    before = state(model)
    with pytest.raises(T2NErrorInvalidArgument, match=r"Net fails on a batch of argument 0 \[4, 31\]"):
        quantized(model, [*samples(), torch.ones(4, 31)])
    assert_same_state(before, state(model))


def test_attention_of_torch_is_seen_through_its_fused_form():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    uses = {n: frozenset({Use.LINEAR}) for n, p in layer.named_parameters() if p.dim() == 2}
    data = [torch.randn(2, 3, 32) for _ in range(4)]
    known, rows = quantized(layer, data, selection=Selection(uses=uses))
    assert torch.allclose(known["self_attn.in_proj_weight"].learn.hessian[0, 0], moment(torch.cat(data[:3])), atol=1e-5)
    assert all(row.output_snr_db > 10 for row in rows.values())
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_weights_are_seen_at_every_step():
    torch.manual_seed(0)
    model = nn.LSTM(32, 32, batch_first=True)
    uses = {n: frozenset({Use.LINEAR}) for n, p in model.named_parameters() if p.dim() == 2}
    data = [torch.randn(2, 6, 32) for _ in range(4)]
    known, _ = quantized(model, data, selection=Selection(uses=uses), sequential=False)
    assert torch.allclose(known["weight_ih_l0"].learn.hessian[0, 0], moment(torch.cat(data[:3])), atol=1e-5)
    states = [torch.cat([torch.zeros(2, 1, 32), model_out[:, :-1]], 1) for model_out in outputs_of(data[:3])]
    assert torch.allclose(known["weight_hh_l0"].learn.hessian[0, 0], moment(torch.cat(states)), atol=1e-5)
    assert torch.backends.mkldnn.enabled


def outputs_of(data):
    torch.manual_seed(0)
    model = nn.LSTM(32, 32, batch_first=True)
    with torch.no_grad():
        return [model(x)[0] for x in data]


class Experts(nn.Module):
    """Each token goes to one of four experts; `first` names them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 64, 32) / 6)
        self.out = nn.Parameter(torch.randn(64, 32) / 8)

    def forward(self, which, x):
        hidden = torch.zeros(len(x), 64)
        for index in which.unique():
            hidden[which == index] = functional.linear(x[which == index], self.up[index])
        return torch.relu(hidden) @ self.out


def test_experts_are_known_by_the_tokens_they_get_and_matrices_kn_by_their_inputs():
    model, exact = Experts(), Experts()
    which = [torch.tensor([0, 0, 2, 2, 2, 0]), torch.tensor([2, 1, 1, 1, 1, 1]), torch.tensor([0, 2, 1, 1, 3, 3])]
    x = [torch.randn(6, 32) for _ in which]
    uses = {"up": frozenset({Use.EXPERTS}), "out": frozenset({Use.MATMUL})}
    data = Calibration(
        tuple(Batch(pair, {}) for pair in zip(which[:2], x[:2], strict=True)), (Batch((which[2], x[2]), {}),)
    )
    known, rows = quantized(model, data, selection=Selection(uses=uses))
    rows_of, ids = torch.cat(x[:2]), torch.cat(which[:2])
    hessian = known["up"].learn.hessian[:, 0]
    for index in range(3):
        assert torch.allclose(hessian[index], moment(rows_of[ids == index]), atol=1e-5)
    assert not hessian[3].any()
    assert known["out"].learn.hessian.shape == (1, 1, 64, 64)
    assert (model.up.shape, model.out.shape) == ((4, 64, 32), (64, 32))
    with torch.no_grad():
        lost = exact(which[2], x[2]) - model(which[2], x[2])
        snr = 10 * math.log10(float(exact(which[2], x[2]).square().sum() / lost.square().sum()))
    assert rows["out"].output_snr_db == pytest.approx(snr, abs=0.05)


def test_a_tied_head_is_encoded_last_by_what_it_reads():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(48, 32)
            self.layer = nn.Linear(32, 32)
            self.head = nn.Linear(32, 48, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.layer(self.embedding(ids))))

    model = Tied()
    known, _ = quantized(model, [torch.randint(48, (2, 6)) for _ in range(4)])
    assert list(known) == ["layer.weight", "embedding.weight"]
    statistics = known["embedding.weight"]
    assert statistics.learn.hessian.shape == (1, 1, 32, 32)
    assert statistics.learn.frequency.sum() == pytest.approx(48)
    assert model.head.weight is model.embedding.weight
