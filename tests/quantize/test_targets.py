"""Which weights are asked for, and which may be Q40."""

import re

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.targets import Selection, Use, find_targets, q40_reason
from torch_to_nnef.tensor.quant import quantize_q40


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(16, 64)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 33))
        self.conv = nn.Conv2d(32, 8, 3)
        self.depthwise = nn.Conv1d(32, 32, 32, groups=32)
        self.up = nn.ConvTranspose1d(64, 64, 2)
        self.attention = nn.MultiheadAttention(64, 2)
        self.norm = nn.LayerNorm(64)
        self.free = nn.Parameter(torch.ones(64, 64))
        self.head = nn.Linear(64, 16, bias=False)
        self.head.weight = self.emb.weight


def found(net, classes=None, **selection):
    return {t.places[0].fqn: t.reason for t in find_targets(net, classes, Selection(**selection))}


def test_default_classes_with_reasons():
    assert found(Net()) == {
        "emb.weight": None,
        "body.0.weight": None,
        "body.1.weight": None,
        "conv.weight": None,
        "depthwise.weight": "used by depthwise conv: tract computes with Q40 only in linear, conv and embedding",
        "attention.out_proj.weight": None,
    }


def test_shape_is_a_reason():
    assert "= 33 elements a row" in found(nn.Linear(33, 64))["weight"]
    assert "= 27 elements a row" in found(nn.Conv2d(3, 64, 3))["weight"]


def test_subclasses_count_and_other_parameters_do_not():
    class MyLinear(nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.extra = nn.Parameter(torch.ones(32, 32))

    assert found(nn.Sequential(MyLinear()), [nn.Linear]) == {"0.weight": None}
    assert found(nn.Sequential(MyLinear()), [nn.Embedding]) == {}


def test_a_shared_weight_is_one_target_with_all_its_places():
    net = Net()
    (target,) = (t for t in find_targets(net, [nn.Linear]) if t.tensor is net.emb.weight)
    assert [p.fqn for p in target.places] == ["emb.weight", "head.weight"]


def test_a_weight_shared_with_an_illegal_use_stays_float():
    net = nn.ModuleDict({"lin": nn.Linear(64, 64), "up": nn.ConvTranspose1d(64, 64, 1)})
    net["up"].weight = nn.Parameter(torch.ones(64, 64, 1))
    net["lin"].weight = net["up"].weight
    assert "conv_transpose" in found(net)["lin.weight"]


def test_known_uses_decide():
    uses = {
        "emb.weight": frozenset({Use.EMBEDDING}),
        "head.weight": frozenset({Use.LINEAR}),
        "body.0.weight": frozenset({Use.LINEAR, Use.OTHER}),
        "attention.in_proj_weight": frozenset({Use.LINEAR}),
        "free": frozenset({Use.LINEAR}),
        "up.weight": frozenset({Use.CONV_TRANSPOSE}),
        "norm.weight": frozenset({Use.OTHER}),
    }
    reasons = found(Net(), [nn.Linear], uses=uses)
    assert reasons == {
        "emb.weight": None,
        "attention.in_proj_weight": None,
        "free": None,
        "body.0.weight": "used by other operators: tract computes with Q40 only in linear, conv and embedding",
        "body.1.weight": "the graph does not use it",
        "attention.out_proj.weight": "the graph does not use it",
    }


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("body.*", {"body.0.weight", "body.1.weight"}),
        ("body.0", {"body.0.weight"}),
        ("head", {"emb.weight"}),
        (re.compile(r"\.[01]\.w"), {"body.0.weight", "body.1.weight"}),
        (lambda module, fqn: isinstance(module, nn.Conv2d), {"conv.weight"}),
        (["conv", lambda module, fqn: fqn == "emb.weight"], {"conv.weight", "emb.weight"}),
    ],
)
def test_filters(filters, expected):
    assert set(found(Net(), include=filters)) == expected
    excluded = {fqn for fqn, reason in found(Net(), exclude=filters).items() if reason == "excluded by the caller"}
    assert excluded == expected


def test_filters_that_cannot_work_are_errors():
    with pytest.raises(T2NErrorInvalidArgument, match="selects none"):
        found(Net(), include="bdoy.*")
    with pytest.raises(T2NErrorInvalidArgument, match="glob"):
        found(Net(), exclude=[3])


@pytest.mark.parametrize(
    ("tensor", "uses", "reason"),
    [
        (torch.ones(4, 32), None, None),
        (torch.ones(4, 32), {Use.LINEAR, Use.EMBEDDING}, None),
        (torch.ones(4, 32, dtype=torch.bfloat16), {Use.LINEAR}, None),
        (torch.ones(4, 32, 3), {Use.CONV}, None),
        (torch.ones(4, 32, 3), None, None),
        (torch.ones(4, 32, 3), {Use.LINEAR}, "matrix"),
        (torch.ones(4, 32, 1, 1, 1), {Use.CONV}, "spatial"),
        (torch.ones(4, 1, 32), {Use.DEPTHWISE_CONV}, "depthwise"),
        (torch.ones(4, 32), {Use.LINEAR, Use.OTHER}, "used by other"),
        (torch.ones(4, 32), set(), "does not use"),
        (torch.ones(4, 32, dtype=torch.int8), None, "int8"),
        (torch.ones(4, 32, device="meta"), None, "meta"),
        (torch.ones(32), None, "rank 1"),
    ],
)
def test_q40_reason(tensor, uses, reason):
    got = q40_reason(tensor, None if uses is None else frozenset(uses))
    assert got is None if reason is None else reason in got


def test_already_quantized():
    layer = nn.Linear(32, 4)
    layer.weight = nn.Parameter(quantize_q40(layer.weight), requires_grad=False)
    assert found(layer) == {"weight": "already quantized"}
