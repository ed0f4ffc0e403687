"""`q40_best`: never worse on held-out inputs than any candidate, rows that say what was chosen, all or nothing."""

import copy

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.quantize.methods.best import CANDIDATES, quantize_best
from torch_to_nnef.quantize.rows import recording
from torch_to_nnef.quantize.tuning import Tuned
from torch_to_nnef.tensor.quant import QScalePerGroupF16, QTensor, QTensorTractScaleOnly, quantize_q40

CLASSES = (nn.Linear, nn.Conv1d)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(32, 64, 3, padding=1), nn.BatchNorm1d(64)
        self.mix, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.mix(self.norm(self.conv(x)).relu().mT).tanh().mean(1))


def data(count, seed=0):
    """Inputs whose channels go together, as those of real nets do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(99))
    return [torch.einsum("bct,cd->bdt", torch.randn(6, 32, 10, generator=generator), mixing) for _ in range(count)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def error(model, packed):
    with torch.no_grad():
        pairs = [(model(x), packed(x)) for x in data(4, seed=5)]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_no_weight_is_worse_than_any_candidate_on_held_out_inputs(model):
    """Of each weight the candidates are tried under the same statistics: the one that is kept has the least error."""
    seen = {}

    def judged(rows, name, statistics):
        errors = {
            k: statistics.judge.output_error(rows, c(rows, name, statistics).decompress())[1]
            for k, c in CANDIDATES.items()
        }
        best = min(errors, key=errors.__getitem__)
        seen[name] = best, errors
        return CANDIDATES[best](rows, name, statistics)

    quantize_calibrated_(copy.deepcopy(model), judged, as_calibration(data(10)), classes=CLASSES, method="by hand")
    with recording() as rows:
        quantize_best(copy.deepcopy(model), calibration=data(10), to_quantize_module_classes=CLASSES, tuning_passes=0)
    assert {row.fqn: row.method for row in rows} == {name: f"q40_best: {best}" for name, (best, _) in seen.items()}
    for best, errors in seen.values():
        assert errors[best] <= errors["min_max_q4_0"]


def test_it_beats_what_needs_no_data_and_is_verified_in_tract(model, tmp_path):
    work = copy.deepcopy(model)
    report = quantize_and_verify(
        work, data(1)[0], tmp_path / "m.nnef.tgz", "q40_best", calibration=data(15), inplace=True,
        dynamic_axes={"x": {0: "B"}},
    )  # fmt: skip
    assert report.ok
    plain = copy.deepcopy(model)
    quantize_and_verify(plain, data(1)[0], tmp_path / "p.nnef.tgz", "min_max_q4_0_all", inplace=True)
    assert error(model, work) < 0.5 * error(model, plain)
    assert all(row.method.startswith("q40_best: ") and row.output_snr_db > 15 for row in report.rows)
    assert len({row.fqn for row in report.rows}) == len(report.rows) == 3
    assert all(row.output_snr_db >= row.min_max_output_snr_db for row in report.rows)


def test_tuning_that_leaves_a_weight_worse_than_min_max_is_undone(model, monkeypatch):
    """As if learned scales were far off: everything is as without tuning."""
    work, plain = copy.deepcopy(model), copy.deepcopy(model)
    options = {"calibration": data(10), "to_quantize_module_classes": CLASSES}
    quantize_best(plain, tuning_passes=0, **options)

    def spoiled(model, *_, **__):
        weight = model.mix.weight.detach()
        scheme = QScalePerGroupF16(32, weight.qscheme.scale * 1.5, 4)
        shape, codecs = weight.shape, weight.u8_compressors
        wrong = QTensorTractScaleOnly.from_packed(weight.u8_blob, shape, scheme, weight.dtype, codecs)
        others = {n: p.detach() for n, p in model.named_parameters() if isinstance(p, QTensor)}
        return Tuned(1.0, 0.5, {**others, "mix.weight": wrong, "norm.bias": torch.ones(64)})

    monkeypatch.setattr("torch_to_nnef.quantize.methods.best.tune", spoiled)
    with recording() as rows:
        quantize_best(work, **options)
    assert all(not row.method.endswith("tuned") for row in rows)
    assert work.mix.weight.is_identical(plain.mix.weight)
    assert torch.equal(work.norm.bias, model.norm.bias)


def test_an_interrupt_while_tuning_leaves_the_model_as_it_was(model, monkeypatch):
    before = dict(model.named_parameters())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_to_nnef.quantize.methods.best.tune", interrupted)
    with recording() as rows, pytest.raises(KeyboardInterrupt):
        quantize_best(model, calibration=data(5))
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert rows == []


def test_a_weight_that_is_never_used_is_judged_by_itself(model):
    model.aside = nn.Linear(32, 4)
    with recording() as rows:
        quantize_best(model, calibration=data(5), to_quantize_module_classes=CLASSES, tuning_passes=0)
    aside = next(row for row in rows if row.fqn == "aside.weight")
    assert aside.output_snr_db is None
    assert isinstance(model.aside.weight, QTensor)
    assert aside.snr_db >= 10


def test_it_needs_data(model):
    with pytest.raises(T2NErrorInvalidArgument, match="calibration="):
        quantize_best(model)
    assert quantize_q40(model.mix.weight) is not None
