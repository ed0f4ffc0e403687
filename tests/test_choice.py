"""Which method on which weight: overrides, f16 and f32, rows that Q40 cannot hold; every archive is run in tract."""

import re

import pytest
import torch
from torch import nn

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.compress import Choice
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.quantize import Selection
from torch_to_nnef.tensor.quant import QTensorHalf, as_half, load_safetensors, quantize_q40, save_safetensors

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.attend = nn.MultiheadAttention(64, 4, batch_first=True)
        self.wide, self.narrow = nn.Linear(64, 40), nn.Linear(40, 8, bias=False)
        self.matrix = nn.Parameter(torch.randn(8, 32))

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        x = self.attend(x, x, x, need_weights=False)[0]
        return self.narrow(self.wide(x).relu()) @ self.matrix


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def run(model, tmp_path, method="q40", **options):
    axes = {"ids": {0: "B", 1: "S"}}
    return quantize_and_verify(model, IDS, tmp_path / "m.nnef.tar", method, dynamic_axes=axes, force=True, **options)


def storage(report):
    return {row.fqn: row.storage for row in report.rows}


@pytest.mark.parametrize("method", [None, "q40"])
def test_any_weight_may_be_kept_in_f16(model, tmp_path, method):
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    report = run(model, tmp_path, method, overrides={"*": "f16"})
    assert report.ok
    assert set(storage(report).values()) == {"f16"}
    assert {row.bits_per_weight for row in report.rows} == {16.0}
    assert storage(report).keys() == {
        "embed.weight", "conv.weight", "attend.in_proj_weight", "attend.out_proj.weight", "wide.weight", "narrow.weight", "matrix",
    }  # fmt: skip
    large = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 2 * large < report.archive_bytes < 2 * large + 20_000
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_f16_is_what_the_archive_computes_with(model, tmp_path):
    """Values that f16 cannot hold exactly: the archive gives those of the rounded weights, not of the others."""
    run(model, tmp_path, None, overrides={"wide": "f16", "embed": "f16"})
    rounded = Net().eval()
    state = model.state_dict()
    for name in ("wide.weight", "embed.weight"):
        state[name] = state[name].half().float()
    rounded.load_state_dict(state)
    outputs = next(iter(TractModel.load(tmp_path / "m.nnef.tar").run(ids=IDS).values()))
    with torch.no_grad():
        near, far = ((torch.from_numpy(outputs) - m(IDS)).abs().max() for m in (rounded, model))
    assert near < 0.1 * far


def test_overrides_choose_the_first_that_matches(model, tmp_path):
    report = run(
        model, tmp_path,
        overrides={"conv": "f32", re.compile("out_proj"): "min_max_q4_0", "/^(conv|attend)/": "f16", "embed.weight": "f16"},
    )  # fmt: skip
    assert report.ok
    methods = {row.fqn: (row.storage, row.method) for row in report.rows}
    assert methods["conv.weight"] == ("f32", None)
    assert methods["attend.out_proj.weight"] == ("q40", "min_max_q4_0")
    assert methods["attend.in_proj_weight"] == methods["embed.weight"] == ("f16", "f16")
    assert methods["wide.weight"] == ("q40", "q40")


def test_rows_that_q40_cannot_hold_have_a_fallback(model, tmp_path):
    assert storage(run(model, tmp_path))["narrow.weight"] == "f32"
    report = run(model, tmp_path, fallback="f16")
    assert report.ok
    assert storage(report) | {"narrow.weight": "f16", "wide.weight": "q40"} == storage(report)
    assert all(row.quantized for row in report.rows)
    (tmp_path / "m.nnef.tar").unlink()
    with pytest.raises(T2NErrorImpossibleQuantization, match=r"`narrow.weight`: 40 = 40 elements a row"):
        run(model, tmp_path, fallback="error")
    assert list(tmp_path.iterdir()) == []
    assert run(model, tmp_path, fallback="error", exclude=["narrow", "matrix"]).ok


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overrides": {"wide": "q41"}}, "no quantization method 'q41'"),
        ({"overrides": {"absent": "f16"}}, "absent"),
        ({"overrides": {"/(/": "f16"}}, "is not a regex"),
        ({"fallback": "q8"}, "fallback is None, 'f16', 'pad' or 'error'"),
    ],
)
def test_choices_that_cannot_be_are_refused(model, tmp_path, options, words):
    with pytest.raises(T2NErrorInvalidArgument, match=re.escape(words)):
        run(model, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_value_beyond_f16_is_refused(model, tmp_path):
    model.wide.weight.data[3, 2] = 1e5
    with pytest.raises(T2NErrorImpossibleQuantization, match="beyond the range of f16"):
        run(model, tmp_path, overrides={"wide": "f16"})


def test_a_registry_may_have_an_f16_of_its_own(model):
    called = []
    Choice("mine", {"mine": lambda model, **_: called.append("mine"), "f16": lambda model, **_: called.append("f16")}, {"wide": "f16"})(
        model, Selection()
    )  # fmt: skip
    assert called == ["f16", "mine"]


def test_halves_are_tensors_like_other_packed_ones(tmp_path):
    weight = torch.randn(6, 5)
    half = as_half(weight, "w")
    assert torch.equal(half.decompress(), weight.half().float())
    assert (half.packed_nbytes, half.shape, half.dtype) == (60, weight.shape, torch.float32)
    save_safetensors({"w": half}, tmp_path / "w.safetensors")
    torch.save(half, tmp_path / "w.pt")
    for read in (load_safetensors(tmp_path / "w.safetensors")["w"], torch.load(tmp_path / "w.pt", weights_only=True)):
        assert isinstance(read, QTensorHalf)
        assert read.is_identical(half)


def test_a_method_that_packs_what_it_should_leave_is_told_on(model, tmp_path):
    """Of its own and without regard for the selection: the archive would not be what was asked for."""

    def mine(model, **kw):
        model.wide.weight = nn.Parameter(quantize_q40(model.wide.weight.detach()), requires_grad=False)

    before = model.wide.weight
    with pytest.raises(T2NErrorInvalidArgument, match=r"packed `wide\.weight`, which exclude or overrides keep"):
        run(model, tmp_path, mine, overrides={"wide": "f32"})
    assert model.wide.weight is before
    assert run(model, tmp_path, mine, overrides={"embed": "f16"}).ok
    assert run(model, tmp_path, mine, overrides={"wide": "q40"}).ok
