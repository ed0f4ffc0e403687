"""What each weight costs alone, and what stays in f16 for a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify, sensitivity
from torch_to_nnef.compress import DEFAULT_COMPRESSION, Choice
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.budget import Budget
from torch_to_nnef.quantize.calibrated import running
from torch_to_nnef.quantize.calibration import as_batch
from torch_to_nnef.quantize.costs import costs_alone
from torch_to_nnef.quantize.judge import Judge
from torch_to_nnef.quantize.rows import recording
from torch_to_nnef.quantize.targets import Selection
from torch_to_nnef.tensor.quant import QTensorHalf, QTensorTractScaleOnly, quantize_q40
from torch_to_nnef.tensor.updater import ModTensorUpdater


class Classifier(nn.Module):
    """An embedding, a chain of blocks, a head: the head is tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))
        self.head = nn.Linear(32, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).softmax(-1)


IDS = torch.arange(48).reshape(4, 12)
WEIGHTS = {"embed.weight", "head.weight", *(f"blocks.{i}.{j}.weight" for i in range(3) for j in (0, 2))}


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.double() * (p.double().log() - q.double().log())).sum(-1).mean())


def test_judge_measures_kl_of_probabilities_and_logits_and_relative_error():
    logits, other = torch.randn(2, 300, 7, generator=torch.Generator().manual_seed(0))

    class Says(nn.Module):
        value = logits

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value

    model, batch = Says(), as_batch(torch.zeros(1))
    expected = _kl(logits.softmax(-1), other.softmax(-1))
    for measure, values, wanted in (
        ("kl", (logits, other), expected),
        (None, (logits.softmax(-1), other.softmax(-1)), expected),
        (None, (logits, other), float((logits - other).square().sum() / logits.square().sum())),
    ):
        model.value = values[0]
        judge = Judge(model, [batch], measure)
        assert judge(model) == pytest.approx(0, abs=1e-9)
        model.value = values[1]
        assert judge(model) == pytest.approx(wanted, rel=1e-4)


def test_judge_refuses_what_is_not_finite():
    with pytest.raises(T2NErrorInvalidArgument, match="finite"):
        Judge(nn.Identity(), [as_batch(torch.tensor([float("nan")]))])


@pytest.mark.parametrize("tied", [False, True])
def test_cost_alone_is_that_of_the_model_with_one_weight_replaced(tied):
    model = Classifier().eval()
    if tied:
        model.head.weight = model.embed.weight
    names = WEIGHTS - ({"head.weight"} if tied else set())
    packed = {name: quantize_q40(model.get_parameter(name).detach()) for name in sorted(names)}
    with running(model):
        exact = model(IDS)
        costs = costs_alone(model, packed, Judge(model, [as_batch(IDS)]))
        assert torch.equal(model(IDS), exact)
        assert {cost.fqn for cost in costs} == names
        assert [cost.cost for cost in costs] == sorted((cost.cost for cost in costs), reverse=True)
        for cost in costs:
            updater = ModTensorUpdater(model)
            before = updater.get(cost.fqn)
            held = updater.update_by_name(cost.fqn, packed[cost.fqn].decompress())
            assert cost.cost == pytest.approx(_kl(exact, model(IDS)), rel=1e-3, abs=1e-9)
            updater.update_by_ref(held, before)


def _chosen(budget: Budget, method: str = "q40", **how):
    model = Classifier().eval()
    with recording() as rows:
        Choice(method, budget=budget, **how)(model, Selection(), [as_batch(IDS)], calibration=[IDS])
    return model, {row.fqn: row for row in rows}


@pytest.mark.parametrize("method", ["q40", "q40_gptq"])
def test_target_bpw_spends_the_bits_on_what_costs_most(method):
    model, rows = _chosen(Budget(target_bpw=8.0), method)
    halves = {name for name, p in model.named_parameters() if isinstance(p, QTensorHalf)}
    bits = sum(8 * row.nbytes_after for row in rows.values()) / sum(
        p.numel() for n, p in model.named_parameters() if n in rows
    )
    assert rows.keys() == WEIGHTS
    assert 4.5 < bits <= 8.0
    assert halves
    assert {fqn for fqn, row in rows.items() if row.storage == "f16"} == halves
    assert all("alone" in rows[fqn].method for fqn in halves)


def test_target_bpw_of_q40_keeps_nothing_and_less_is_refused():
    model, _ = _chosen(Budget(target_bpw=4.5))
    assert not any(isinstance(p, QTensorHalf) for p in model.parameters())
    with pytest.raises(T2NErrorInvalidArgument, match=r"4\.50 bits already"):
        _chosen(Budget(target_bpw=4.2))


def test_max_kl_keeps_the_fewest_and_is_measured_on_the_whole_model():
    exact = Classifier().eval()(IDS).detach()
    everything = _kl(exact, _chosen(Budget())[0](IDS).detach())
    limit = everything / 2
    model, _ = _chosen(Budget(max_kl=limit))
    kept = [n for n, p in model.named_parameters() if isinstance(p, QTensorHalf)]
    assert kept
    assert _kl(exact, model(IDS).detach()) <= limit
    assert _chosen(Budget(max_kl=2 * everything))[0].get_parameter("head.weight").storage_name == "q40"


def test_max_kl_out_of_reach_says_how_near_f16_comes_and_leaves_the_model():
    model = Classifier().eval()
    before = dict(model.named_parameters())
    with pytest.raises(T2NErrorInvalidArgument, match=r"max_kl=1e-12: with all of its weights in f16"):
        Choice("q40", budget=Budget(max_kl=1e-12))(model, Selection(), [as_batch(IDS)])
    assert all(p is before[n] for n, p in model.named_parameters())


def test_a_method_that_changes_other_weights_runs_again_for_each_measurement():
    runs = []

    def learns_biases(model: nn.Module, selection: Selection | None = None, **kw: object) -> None:
        runs.append(1)
        DEFAULT_COMPRESSION["q40"](model, selection=selection)
        model.head.bias = nn.Parameter(model.head.bias.detach() * 1.001)

    model = Classifier().eval()
    registry = {**DEFAULT_COMPRESSION, "mine": learns_biases}
    with recording() as rows:
        Choice("mine", registry, budget=Budget(target_bpw=8.0))(model, Selection(), [as_batch(IDS)])
    assert len(runs) == 2
    assert {row.storage for row in rows} == {"q40", "f16"}
    assert any(isinstance(p, QTensorTractScaleOnly) for p in model.parameters())


def test_sensitivity_leaves_the_model_and_knows_weights_by_use():
    model = Classifier().eval()
    before = dict(model.named_parameters())
    measure, costs = sensitivity(model, [(IDS,)])
    assert measure == "kl"
    assert {cost.fqn for cost in costs} == WEIGHTS
    assert all(p is before[n] for n, p in model.named_parameters())
    assert sensitivity(model, [(IDS,)], measure="error", include="head")[1][0].cost != costs[0].cost


def test_sensitivity_refuses_a_method_whose_weights_only_fit_together():
    def learns(model: nn.Module, selection: Selection | None = None, **kw: object) -> None:
        DEFAULT_COMPRESSION["q40"](model, selection=selection)
        model.head.bias = nn.Parameter(model.head.bias.detach() + 1)

    with pytest.raises(T2NErrorInvalidArgument, match="changes other weights too"):
        sensitivity(Classifier().eval(), [(IDS,)], learns)


def test_a_method_that_makes_another_model_has_no_budget():
    registry = {"other": lambda model, **kw: Classifier()}
    with pytest.raises(T2NErrorInvalidArgument, match="makes another model"):
        Choice("other", registry, budget=Budget(max_kl=1.0))(Classifier(), Selection(), [as_batch(IDS)])


def test_a_budget_without_a_method_or_without_weights():
    with pytest.raises(T2NErrorInvalidArgument, match="name one"):
        Choice(None, budget=Budget(target_bpw=5.0))
    for budget in (Budget(target_bpw=5.0), Budget(max_kl=0.1)):
        model = nn.Sequential(nn.Linear(3, 3)).eval()
        Choice("q40", budget=budget)(model, Selection(), [as_batch(torch.ones(1, 3))])


@pytest.mark.parametrize("values", [(5.0, 0.1), (0.0, None), (None, -1.0), (None, float("nan"))])
def test_budgets_that_make_no_sense(values):
    with pytest.raises(T2NErrorInvalidArgument):
        Budget(*values)


def test_whole_way_in_tract(tmp_path):
    report = quantize_and_verify(Classifier().eval(), (IDS,), tmp_path / "m.nnef.tgz", target_bpw=8.0)
    assert report.ok
    assert {row.storage for row in report.rows} == {"q40", "f16"}
