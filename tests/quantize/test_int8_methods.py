"""`int8*` through the registry: ranges are those of what weights read, however they are used; all weights change, or none."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef.compress import DEFAULT_COMPRESSION, Choice, call_method
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.quantize import Selection, Use, recording
from torch_to_nnef.quantize.budget import Budget
from torch_to_nnef.quantize.calibration import as_batch
from torch_to_nnef.quantize.methods.int8 import quantize_static_int8
from torch_to_nnef.quantize.observers import MinMax
from torch_to_nnef.tensor.offload import offload
from torch_to_nnef.tensor.quant import QParams, QTensor, QTensorInt8, QTensorTractScaleOnly, quantize_int8

KEYS = [key for key in DEFAULT_COMPRESSION if key.startswith("int8")]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 10),
    ).eval()  # fmt: skip


IMAGES = [draw(6, 4, 8, 8, seed=seed) for seed in range(5)]  # the last is held out


def quantized(model, calibration, **options):
    """`(model, rows)`; min-max, since its ranges can be told."""
    with recording() as rows:
        model = quantize_static_int8(
            copy.deepcopy(model), calibration=calibration, **{"observer": "min_max", **options}
        )
    return model, rows


def range_of(*tensors, dtype=torch.int8):
    low, high = min(float(t.min()) for t in tensors), max(float(t.max()) for t in tensors)
    return QParams.of_range(low, high, dtype)


@pytest.mark.parametrize("key", KEYS)
def test_keys(key):
    exact, unseen = net(), draw(16, 4, 8, 8, seed=9)
    with recording() as rows:
        model = call_method(DEFAULT_COMPRESSION[key], copy.deepcopy(exact), calibration=IMAGES)
    with torch.no_grad():
        noise = (model(unseen) - exact(unseen)).square().sum() / exact(unseen).square().sum()
    # Steps of 8 bits are 40 dB below such values; observers that clip tails lose more on so little data.
    assert noise < (1e-2 if key in ("int8_moving_average", "int8_entropy") else 1e-3)
    assert {row.method for row in rows} == {key}
    for row, index in zip(rows, (0, 3, 6), strict=True):
        weight = model[index].weight
        assert (row.fqn, row.storage, row.quantized) == (f"{index}.weight", "int8", True)
        assert row.bits_per_weight == 8 * weight.packed_nbytes / weight.numel() >= 8
        assert 30 < row.snr_db < 60
        assert 15 < row.output_snr_db < 60
        assert weight.axis == (None if key == "int8_per_tensor" else 0)
        assert weight.input_qparams.dtype == torch.int8


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_ranges_are_those_of_the_inputs_in_the_float_model(dtype):
    exact = net()
    model, _ = quantized(exact, IMAGES, activations=dtype)
    learned = torch.cat(IMAGES[:4])
    with torch.no_grad():
        inputs = {0: learned, 3: exact[:3](learned), 6: exact[:6](learned)}
    for index, x in inputs.items():
        assert model[index].weight.input_qparams == range_of(x, dtype=getattr(torch, dtype))
        assert model[index].weight.is_identical(
            quantize_int8(exact[index].weight.detach(), input_qparams=model[index].weight.input_qparams)
        )


def test_output_snr_is_that_of_held_out_products():
    exact = nn.Sequential(nn.Linear(16, 8), nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2))
    x = [draw(3, 8, 16, seed=seed) for seed in range(5)]
    exact[0] = nn.Linear(16, 16)
    model, rows = quantized(exact, x)
    with torch.no_grad():
        middle = exact[0](x[4])
        pairs = [
            (functional.linear(x[4], m[0].weight), functional.conv1d(middle, m[1].weight, None, 1, 2, 2, 2))
            for m in (exact, model)
        ]
    for row, clean, noisy in zip(rows, *pairs, strict=True):
        expected = 10 * torch.log10(clean.square().sum() / (clean - noisy).square().sum())
        assert row.output_snr_db == pytest.approx(float(expected), abs=1e-3)


class Functional(nn.Module):
    """No module holds a weight as modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(draw(24, 16))
        self.columns = nn.Parameter(draw(24, 12, seed=1))
        self.kernel = nn.Parameter(draw(12, 6, 3, seed=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(x, self.rows).relu()
        return functional.conv1d((hidden @ self.columns).mT, self.kernel, groups=2)


def test_functional_uses_of_a_known_graph():
    uses = {"rows": {Use.LINEAR}, "columns": {Use.MATMUL}, "kernel": {Use.CONV}}
    selection = Selection({name: frozenset(found) for name, found in uses.items()})
    data = [draw(2, 9, 16, seed=seed) for seed in range(5)]
    exact = Functional()
    model, rows = quantized(exact, data, selection=selection)
    assert [(row.fqn, row.quantized) for row in rows] == [("rows", True), ("columns", True), ("kernel", True)]
    assert (model.rows.axis, model.columns.axis, model.kernel.axis) == (0, 1, 0)
    with torch.no_grad():
        hidden = functional.linear(torch.cat(data[:4]), exact.rows).relu()
        assert model.columns.input_qparams == range_of(hidden)
        assert model.kernel.input_qparams == range_of(hidden @ exact.columns)
        clean, noisy = exact(data[4]), model(data[4])
    assert (clean - noisy).square().sum() < 1e-3 * clean.square().sum()


def test_attention_of_torch():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, x, x)[0]

    torch.manual_seed(0)
    exact, data = Attention().eval(), [draw(2, 7, 16, seed=seed) for seed in range(5)]
    uses = {f"inner.{name}": frozenset({Use.LINEAR}) for name in ("in_proj_weight", "out_proj.weight")}
    model, rows = quantized(exact, data, selection=Selection(uses))
    assert all(row.quantized for row in rows)
    assert model.inner.in_proj_weight.input_qparams == range_of(*data[:4])
    assert model.inner.out_proj.weight.input_qparams is not None
    with torch.no_grad():
        assert (model(data[0]) - exact(data[0])).abs().max() < 0.03 * exact(data[0]).abs().max()


def test_a_weight_used_twice_has_one_range_for_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(10 * self.layer(x))

    exact, data = Twice(), [draw(4, 8, seed=seed) for seed in range(5)]
    model, _ = quantized(exact, data)
    with torch.no_grad():
        again = [10 * exact.layer(x) for x in data[:4]]
    assert model.layer.weight.input_qparams == range_of(*data[:4], *again)


def test_tables_have_a_scale_a_row_and_no_input():
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    tokens = [torch.randperm(16, generator=torch.Generator().manual_seed(seed))[None] for seed in range(5)]
    model, rows = quantized(exact, tokens, per_channel=False)
    assert (model[0].weight.axis, model[0].weight.input_qparams, model[1].weight.axis) == (0, None, None)
    assert [row.method for row in rows] == ["int8, weight only", "int8"]
    assert all(row.output_snr_db > 25 for row in rows)
    tied = copy.deepcopy(exact)
    tied[1].weight = tied[0].weight
    model, rows = quantized(tied, tokens)
    assert model[1].weight is model[0].weight
    assert model[0].weight.input_qparams is not None
    assert len(rows) == 1
    assert torch.equal(model[0](tokens[0]), model[0].weight.decompress()[tokens[0]])


def test_what_stays_float_says_why():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose1d(8, 8, 2), "memory": nn.LSTM(8, 8, batch_first=True), "used": nn.Linear(8, 8),
            "unused": nn.Linear(8, 8), "kept": nn.Linear(8, 8), "q40": nn.Linear(32, 8),
        }
    )  # fmt: skip
    model["q40"].weight = nn.Parameter(
        DEFAULT_COMPRESSION["q40"](nn.Sequential(model["q40"]))[0].weight, requires_grad=False
    )
    use = {"up": Use.CONV_TRANSPOSE, "used": Use.LINEAR, "unused": Use.LINEAR, "kept": Use.LINEAR, "q40": Use.LINEAR}
    uses = {f"{name}.weight": frozenset({how}) for name, how in use.items()}
    uses |= {f"memory.weight_{name}_l0": frozenset({Use.LINEAR}) for name in ("ih", "hh")}
    model.forward = lambda x: model["kept"](model["used"](model["memory"](model["up"](x).mT)[0]))
    with recording() as rows:
        quantize_static_int8(
            model,
            calibration=[draw(1, 8, 8, seed=seed) for seed in range(2)],
            selection=Selection(uses, exclude="kept"),
            to_quantize_module_classes=(nn.Linear, nn.ConvTranspose1d),
        )
    reasons = {row.fqn.removesuffix(".weight"): row.reason for row in rows}
    assert "conv_transpose" in reasons["up"]
    assert "recurrent" in reasons["memory.weight_ih_l0"]
    assert "recurrent" in reasons["memory.weight_hh_l0"]
    assert "never reached" in reasons["unused"]
    assert (reasons["used"], reasons["kept"], reasons["q40"]) == (None, "excluded by the caller", "already quantized")
    assert [name for name, p in model.named_parameters() if isinstance(p, QTensorInt8)] == ["used.weight"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"calibration": None}, T2NErrorInvalidArgument, "calibration"),
        ({"observer": "magic"}, T2NErrorInvalidArgument, "entropy"),
        ({"activations": "int4"}, T2NErrorInvalidArgument, "uint8"),
        ({"calibration": [torch.full((1, 4, 8, 8), torch.nan)] * 2}, T2NErrorInvalidArgument, r"0\.weight"),
        ({"calibration": [draw(1, 3, 8, 8)] * 2}, T2NErrorInvalidArgument, "fails on a batch"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(options, error, match):
    model = net().train()
    before = dict(model.named_parameters())
    with pytest.raises(error, match=match):
        quantize_static_int8(model, **{"calibration": IMAGES, **options})
    assert all(after is before[name] for name, after in model.named_parameters())
    assert model.training


@pytest.mark.parametrize("moment", ["0.weight", "6.weight", "outputs"])
def test_a_bad_weight_or_ctrl_c_changes_nothing(moment):
    def stop(done, total, what):
        if what.startswith(moment):
            raise KeyboardInterrupt

    model = net()
    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        quantize_static_int8(model, calibration=IMAGES, progress=stop)
    assert all(after is before[name] for name, after in model.named_parameters())
    with torch.no_grad():
        model[6].weight[0, 0] = torch.nan
    with pytest.raises(T2NErrorImpossibleQuantization, match=r"6\.weight"):
        quantize_static_int8(model, calibration=IMAGES)
    assert not any(isinstance(p, QTensor) for p in model.parameters())


def test_weights_on_disk_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(offload(model[0].weight.detach()), requires_grad=False)
    with pytest.raises(T2NErrorInvalidArgument, match="on disk"):
        quantize_static_int8(model, calibration=[draw(1, 8)] * 2)


def test_an_observer_of_ones_own():
    class Wide(MinMax):
        def bounds(self):
            return -100.0, 100.0

    model, _ = quantized(net(), IMAGES, observer=Wide)
    assert model[0].weight.input_qparams == QParams.of_range(-100, 100, torch.int8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_and_halves(channels_last):
    exact = net()
    if channels_last:
        exact = exact.to(memory_format=torch.channels_last)
    plain, rows = quantized(net(), IMAGES)
    model, same = quantized(exact, IMAGES)
    assert model[0].weight.is_identical(plain[0].weight)
    assert [row.output_snr_db for row in same] == pytest.approx([row.output_snr_db for row in rows], abs=1e-3)
    data = [draw(64, 8, seed=seed).half() for seed in range(5)]
    half, rows = quantized(nn.Sequential(nn.Linear(8, 8)).half(), data)
    assert half[0].weight.dtype == torch.float16
    assert half(draw(4, 8).half()).dtype == torch.float16
    assert rows[0].output_snr_db > 30


@pytest.mark.parametrize("first", ["int8", "q40"])
def test_mixed_with_q40(first):
    other = {"int8": "q40", "q40": "int8"}[first]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32)).eval()
    exact, data = copy.deepcopy(model), [draw(4, 32, 4, seed=seed) for seed in range(5)]
    choice = Choice(first, overrides={"3": other})
    model = choice(model, Selection(), calibration=data)
    kinds = {"int8": QTensorInt8, "q40": QTensorTractScaleOnly}
    assert (type(model[0].weight), type(model[3].weight)) == (kinds[first], kinds[other])
    with torch.no_grad():
        assert (model(data[4]) - exact(data[4])).norm() < 0.1 * exact(data[4]).norm()


def test_a_budget_keeps_what_costs_most_in_f16():
    exact = net()

    def bits(**budget):
        choice = Choice("int8", budget=Budget(**budget))
        with recording() as rows:
            model = choice(copy.deepcopy(exact), Selection(), [as_batch(IMAGES[4], exact)], calibration=IMAGES)
        return [type(model[i].weight).__name__ for i in (0, 3, 6)], rows

    kinds, rows = bits(target_bpw=13)
    assert {"QTensorInt8", "QTensorHalf"} == set(kinds)
    assert any("in int8 alone" in (row.method or "") for row in rows)
    with pytest.raises(T2NErrorInvalidArgument, match="bits already"):
        bits(target_bpw=6)
