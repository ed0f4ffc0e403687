"""`quantize_and_verify`: choices by tensor, registries, copies and in-place work, errors that change nothing."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef._native import read_dat
from torch_to_nnef.compress import DEFAULT_COMPRESSION
from torch_to_nnef.exceptions import T2NErrorConsistency, T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.tensor.quant import QScalePerGroupF16, QTensor, QTensorTract, QTensorTractScaleOnly, quantize_q40


class Model(nn.Module):
    """A tied head, a functional linear, a weight that is no matrix product, and one whose rows are no whole groups."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 32)
        self.hidden = nn.Linear(32, 64)
        self.functional = nn.Parameter(torch.randn(32, 64) / 8)
        self.scale = nn.Parameter(torch.randn(1, 32))
        self.projection = nn.Parameter(torch.randn(32, 32) / 6)
        self.odd = nn.Linear(31, 32)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = torch.relu(self.hidden(self.embedding(ids)))
        x = torch.nn.functional.linear(x, self.functional) * self.scale
        x = x @ torch.tanh(self.projection)
        return self.head(x + self.odd(x[..., 1:]))


IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture
def model():
    return Model().eval()


def run(model, path, *args, **options):
    return quantize_and_verify(model, IDS, path, *args, dynamic_axes={"ids": {0: "B", 1: "S"}}, **options)


def storage(report):
    return {row.fqn: row.storage for row in report.rows}


def snapshot(model):
    return [
        (name, id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    ], model.training


def assert_untouched(model, before):
    parameters, training = before
    now = list(model.named_parameters(remove_duplicate=False))
    assert [(n, id(p)) for n, p in now] == [(n, i) for n, i, _ in parameters]
    assert all(torch.equal(p, value) for (_, p), (_, _, value) in zip(now, parameters, strict=True))
    assert model.training == training


def test_the_use_decides_and_what_is_left_says_why(model, tmp_path):
    report = run(model, tmp_path / "m.nnef.tgz")
    assert report.ok
    packed = {"embedding.weight": "q40", "hidden.weight": "q40", "functional": "q40"}
    assert storage(report) == packed | {"odd.weight": "f32", "projection": "f32"}
    assert next(row.reason for row in report.rows if row.fqn == "projection").startswith("used by other operators")
    odd = next(row for row in report.rows if row.fqn == "odd.weight")
    assert "32" in odd.reason
    assert "odd.weight" in str(report)


def test_the_model_is_left_alone_and_results_are_close(model, tmp_path):
    model.train()
    before = snapshot(model)
    run(model, tmp_path / "m.nnef.tar")
    assert_untouched(model, before)
    with torch.no_grad():
        reference = model.eval()(IDS).numpy()
    outputs = TractModel.load(tmp_path / "m.nnef.tar").run(ids=IDS)
    assert (
        torch.cosine_similarity(torch.from_numpy(outputs["output"]).flatten(), torch.from_numpy(reference).flatten(), 0)
        > 0.95
    )


def test_inplace_quantizes_the_model_itself(model, tmp_path):
    report = run(model, tmp_path / "m.nnef", inplace=True)
    assert isinstance(model.hidden.weight, QTensor)
    assert model.head.weight is model.embedding.weight
    assert report.quantization[0].outputs[0].rmse > 0


def test_no_method_exports_and_verifies_only(model, tmp_path):
    report = run(model, tmp_path / "m.nnef", None)
    assert report.ok
    assert (report.rows, report.quantization, report.method) == ((), (), None)


def test_the_report_splits_the_time(model, tmp_path):
    report = run(model, tmp_path / "m.nnef.tar")
    names = [name for name, seconds in report.steps if seconds > 0]
    assert names == ["capture", "lower", "quantize", "write", "verify", "compare with float"]


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"include": "hidden*"}, {"hidden.weight"}),
        ({"exclude": ["embedding", re.compile("^func")]}, {"hidden.weight"}),
        ({"exclude": lambda module, _: isinstance(module, nn.Linear)}, {"functional"}),
        ({"method": "min_max_q4_0"}, {"hidden.weight", "functional", "embedding.weight"}),
        ({"method": None, "overrides": {"hidden.weight": "min_max_q4_0"}}, {"hidden.weight"}),
    ],
)
def test_choices_by_tensor(model, tmp_path, options, quantized):
    report = run(model, tmp_path / "m.nnef", **options)
    assert {row.fqn for row in report.rows if row.quantized} == quantized


def test_an_override_uses_its_own_method(model, tmp_path):
    report = run(model, tmp_path / "m.nnef", overrides={"hidden.weight": "min_max_q4_0_all"})
    methods = {row.fqn: row.method for row in report.rows if row.quantized}
    assert methods == {"embedding.weight": "q40", "functional": "q40", "hidden.weight": "min_max_q4_0_all"}


def test_a_callable_of_ones_own_needs_only_the_registry_signature(model, tmp_path):
    seen = {}

    def mine(model, tokenizer, export_dirpath, local_dir):
        seen.update(tokenizer=tokenizer, export_dirpath=export_dirpath, local_dir=local_dir)
        model.hidden.weight = nn.Parameter(
            quantize_q40(model.hidden.weight.detach(), "signed_extreme"), requires_grad=False
        )

    before = snapshot(model)
    report = run(model, tmp_path / "m.nnef", mine)
    assert_untouched(model, before)
    assert seen == {"tokenizer": None, "export_dirpath": None, "local_dir": None}
    assert report.method == "mine"
    assert storage(report) == {"hidden.weight": "q40"}
    assert report.rows[0].snr_db > 15


def test_a_registry_of_ones_own_gets_calibration_and_may_return_a_model(model, tmp_path):
    def counted(model, calibration, **_):
        assert list(calibration) == [1, 2]
        return DEFAULT_COMPRESSION["q40"](model)

    report = run(model, tmp_path / "m.nnef", "counted", {"counted": counted}, calibration=iter([1, 2]))
    assert "hidden.weight" in storage(report)


class Tripled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return 3 * self.inner(ids)


def packed_copy(model, **_):
    return DEFAULT_COMPRESSION["min_max_q4_0"](copy.deepcopy(model))


def tripled(model, **_):
    return Tripled(packed_copy(model))


def without_bias(model, **_):
    model.hidden = nn.Linear(32, 64, bias=False)
    nn.init.constant_(model.hidden.weight, 0.01)


@pytest.mark.parametrize("method", [packed_copy, tripled, without_bias])
def test_what_a_method_makes_is_what_is_exported(model, tmp_path, method):
    wanted = copy.deepcopy(model)
    wanted = method(wanted) or wanted
    path = tmp_path / "m.nnef"
    assert run(model, path, method).ok
    found = TractModel.load(path).run(IDS)["output"]
    np.testing.assert_allclose(found, wanted(IDS).detach().numpy(), atol=1e-4)


def test_a_method_that_returns_another_model_cannot_work_in_place(model, tmp_path):
    before = snapshot(model)
    with pytest.raises(T2NErrorInvalidArgument, match="inplace"):
        run(model, tmp_path / "m.nnef", packed_copy, inplace=True)
    assert_untouched(model, before)
    assert not any(tmp_path.iterdir())


def test_a_method_may_not_change_what_comes_out(model, tmp_path):
    modules = list(model.modules())

    def cut(model, **_):
        model.head = nn.Linear(32, 5)

    with pytest.raises(T2NErrorInvalidArgument, match="other outputs"):
        run(model, tmp_path / "m.nnef", cut, inplace=True)
    assert list(model.modules()) == modules


def test_what_packing_cost_is_not_told_of_weights_that_came_packed(model, tmp_path):
    report = run(DEFAULT_COMPRESSION["q40"](model), tmp_path / "m.nnef", None)
    assert {(row.storage, row.snr_db) for row in report.rows} == {("q40", None)}
    assert "q40" in str(report)
    assert "q40" in report._repr_html_()


@pytest.mark.parametrize("form", ["generator", "loader", "texts"])
def test_methods_of_ours_learn_from_batches_a_loader_or_texts(model, tmp_path, form):
    rows = torch.randint(12, (10, 4), generator=torch.Generator().manual_seed(0))
    given = {
        "generator": (row[None] for row in rows),
        "loader": DataLoader(TensorDataset(rows, torch.zeros(10)), batch_size=2),
        "texts": [" ".join(str(int(token)) for token in rows.flatten())],
    }[form]

    def tokenizer(text, **_):
        return {"input_ids": [int(word) for word in text.split() if word.isdecimal()]}

    class OfTexts(Model):
        def forward(self, input_ids):
            return super().forward(input_ids)

    model = OfTexts().eval() if form == "texts" else model
    before = snapshot(model)
    options = {"calibration": given, "tokenizer": tokenizer, "overrides": {"hidden": "q40"}}
    report = quantize_and_verify(model, IDS, tmp_path / "m.nnef", "q40_gptq", **options)
    assert report.ok
    assert_untouched(model, before)
    by_name = {row.fqn: row for row in report.rows}
    assert (by_name["functional"].method, by_name["hidden.weight"].method) == ("q40_gptq", "q40")
    assert by_name["functional"].output_snr_db > 10
    assert by_name["hidden.weight"].output_snr_db is None


def test_what_was_learned_is_kept_in_a_file(model, tmp_path):
    rows = torch.randint(12, (5, 1, 4), generator=torch.Generator().manual_seed(0))
    cache = tmp_path / "cache.npz"
    first = run(model, tmp_path / "a.nnef", "q40_gptq", calibration=rows.unbind(), calibration_cache=cache)
    again = run(model, tmp_path / "b.nnef", "q40_gptq", calibration_cache=cache)
    assert [(r.fqn, r.output_snr_db) for r in first.rows] == [(r.fqn, r.output_snr_db) for r in again.rows]
    with pytest.raises(T2NErrorInvalidArgument, match="q40 takes no calibration_cache"):
        run(model, tmp_path / "c.nnef", "q40", calibration_cache=cache)
    with pytest.raises(T2NErrorInvalidArgument, match="learns from calibration data: pass calibration="):
        run(model, tmp_path / "c.nnef", "q40_gptq", calibration_cache=tmp_path / "none.npz")


def test_a_method_that_learns_says_that_it_needs_data(model, tmp_path):
    with pytest.raises(T2NErrorInvalidArgument, match="learns from calibration data: pass calibration="):
        run(model, tmp_path / "m.nnef", "q40_gptq")
    assert not list(tmp_path.iterdir())


def test_a_method_that_writes_into_weights_does_not_reach_the_users_model(model, tmp_path):
    def writes(model, **_):
        with torch.no_grad():
            model.hidden.weight.mul_(2)

    before = snapshot(model)
    run(model, tmp_path / "m.nnef", writes)
    assert_untouched(model, before)


class Nan(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.second.weight[3, 4] = torch.nan

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_that_cannot_be_quantized_changes_nothing(tmp_path, inplace):
    model = Nan()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(T2NErrorImpossibleQuantization, match=r"second\.weight"):
        quantize_and_verify(model, torch.randn(2, 32), tmp_path / "m.nnef", inplace=inplace)
    assert [id(p) for p in model.parameters()] == before
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_packed_weight_in_an_illegal_use_is_refused_and_undone(model, tmp_path, inplace):
    def everything(model, **_):
        model.scale = nn.Parameter(quantize_q40(model.scale.detach()), requires_grad=False)

    before = snapshot(model)
    with pytest.raises(T2NErrorConsistency, match="scale in module"):
        run(model, tmp_path / "m.nnef", everything, inplace=inplace)
    assert_untouched(model, before)
    assert not any(tmp_path.iterdir())


def test_an_existing_archive_is_replaced_only_by_force(model, tmp_path):
    path = tmp_path / "m.nnef.tar"
    path.write_text("precious")
    with pytest.raises(T2NErrorInvalidArgument, match="force"):
        run(model, path)
    assert path.read_text() == "precious"
    assert run(model, path, force=True).ok


@pytest.mark.parametrize(("method", "registry"), [("q41", DEFAULT_COMPRESSION), ("q40", {})])
def test_an_unknown_method_lists_the_known_ones(model, tmp_path, method, registry):
    with pytest.raises(T2NErrorInvalidArgument, match=re.escape(str(sorted(registry)))):
        run(model, tmp_path / "m.nnef", method, registry)


def test_an_unverified_archive_is_not_ok(model, tmp_path):
    report = run(model, tmp_path / "m.nnef", inference_target=TractNNEF.latest(check_io=False))
    assert not report.verified
    assert not report.ok


def test_progress_is_told_about_every_weight(model, tmp_path):
    calls = []
    report = run(model, tmp_path / "m.nnef", progress=lambda done, total, fqn: calls.append((done, total, fqn)))
    quantized = [row for row in report.rows if row.quantized]
    ends = [sum(row.nbytes_before for row in quantized[:i]) for i in range(len(quantized) + 1)]
    assert calls == [
        (end, ends[-1], name) for end, name in zip(ends, [*(row.fqn for row in quantized), ""], strict=True)
    ]


class Halved(QTensorTractScaleOnly):
    """A tensor with its own file: the same codes under scales of half the size."""

    def write_in_file(self, dirpath, label, inference_target=None):
        quantize_q40(self.decompress() / 2, "signed_extreme").write_in_file(dirpath, label, inference_target)


def test_a_qtensor_subclass_writes_its_own_bytes(tmp_path):
    layer = nn.Linear(32, 4, bias=False)
    plain = quantize_q40(layer.weight.detach(), "signed_extreme")
    packed = Halved(layer.weight.detach(), plain.qscheme)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    target = TractNNEF.latest(check_io=False)
    report = quantize_and_verify(layer, torch.randn(2, 32), tmp_path / "m.nnef", None, inference_target=target)
    dtype, shape, blocks = read_dat(Path(report.archive_path) / "weight.dat")
    assert (dtype, shape) == ("q40", [4, 32])
    scales = blocks.reshape(4, 18)[:, :2].copy().view(np.float16).ravel()
    expected = plain.qscheme.scale.numpy().ravel() / 2
    assert np.allclose(np.abs(scales), np.abs(expected), rtol=2e-3)


class Doubled(QTensorTractScaleOnly):
    """The same by `write_dat` alone."""

    def write_dat(self, path):
        quantize_q40(self.decompress() * 2, "signed_extreme").write_dat(path)


class TwoBits(QTensorTract):
    """No Q40 itself, but written as it."""

    def write_dat(self, path):
        quantize_q40(self.decompress(), "signed_extreme").write_dat(path)


def test_a_qtensor_subclass_may_refine_write_dat_alone(tmp_path):
    layer = nn.Linear(32, 4, bias=False)
    fp = layer.weight.detach()
    plain = quantize_q40(fp, "signed_extreme")
    for packed, factor in (
        (Doubled(fp, plain.qscheme), 2),
        (TwoBits(fp, QScalePerGroupF16(32, plain.qscheme.scale, 2)), 1),
    ):
        layer.weight = nn.Parameter(packed, requires_grad=False)
        path = tmp_path / f"{type(packed).__name__}.nnef"
        quantize_and_verify(layer, torch.randn(2, 32), path, None, inference_target=TractNNEF.latest(check_io=False))
        _, _, blocks = read_dat(path / "weight.dat")
        quantize_q40(packed.decompress() * factor, "signed_extreme").write_dat(tmp_path / "expected.dat")
        assert np.array_equal(blocks, read_dat(tmp_path / "expected.dat")[2])


def test_a_half_precision_model_in_q40(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).half()
    report = quantize_and_verify(
        model, torch.randn(3, 64).half(), tmp_path / "m.nnef", dynamic_axes={"input": {0: "B"}}
    )
    assert report.ok
    assert set(storage(report).values()) == {"q40"}
