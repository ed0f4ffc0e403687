"""Uses of packed weights that tract computes wrongly are refused; each was seen wrong, or crashing, in tract 0.23.9."""

from dataclasses import replace

import pytest
import torch

from torch_to_nnef.exceptions import T2NErrorConsistency
from torch_to_nnef.nnef.document import Document
from torch_to_nnef.nnef.linter import RULES, lint
from torch_to_nnef.op.statement import Ref, Statement, Variable
from torch_to_nnef.tensor.quant import quantize_q40

X = Ref("x", (2, 64), torch.float32)
W = Ref("w", (64, 64), torch.float32, "w")
STACK, NARROW = Ref("w", (2, 32, 64), torch.float32, "w"), Ref("w", (2, 64, 16), torch.float32, "w")
CUT = Ref("w", (64, 60), torch.float32, "w")  # of rows of 60, with zeros behind them in the archive
POINT = Ref("w", (64, 64, 1, 1), torch.float32, "w")


def document(operator, args, outputs=("y",), **attrs):
    tensor = quantize_q40(torch.randn(64, 64))
    statement = Statement(("y",), operator, args, tuple(attrs.items()), "node", "encoder.layer")
    return Document("g", (X,), outputs, (statement,), (Variable("w", "encoder.layer.weight", tensor),))


LEGAL = [
    ("tract_core_einsum", ([W, X],), {"expr": "nk,ak->an", "acc": "f32"}),
    ("t2n_linear", (W, X, Ref("b", (64,), torch.float32)), {"expr": "nk,ak->an"}),
    ("matmul", (X, W), {"transposeB": True}),
    ("matmul", (W, X), {}),
    ("linear", (X, W), {}),
    ("conv", (X, W), {}),
    ("tract_core_gather", (W, X), {"axis": 0, "datum_type": "f32"}),
    ("squeeze", (POINT,), {"axes": [2, 3]}),
    ("tract_moe_ffn", (X, Ref("r", (2, 64), torch.float32), STACK, STACK, STACK), {"expert_layout": "linear"}),
    ("tract_core_einsum", ([STACK, X],), {"expr": "enk,ak->ean", "acc": "f32"}),
]
ILLEGAL = [
    ("tract_core_einsum", ([W, X],), {"expr": "kn,ak->an", "acc": "f32"}),
    ("tract_core_einsum", ([X, W],), {"expr": "ak,nk->an", "acc": "f32"}),
    ("tract_core_einsum", ([W, X],), {"expr": "nk,ak->ank", "acc": "f32"}),
    ("matmul", (X, W), {}),
    ("matmul", (W, X), {"transposeA": True}),
    ("linear", (W, X), {}),
    ("conv", (W, X), {}),
    ("conv", (X, Ref("w", (64, 1, 64), torch.float32, "w")), {"groups": 64}),
    ("conv", (X, POINT), {"groups": 1}),
    ("squeeze", (POINT,), {"axes": [3]}),
    ("squeeze", (W,), {"axes": [1]}),
    ("deconv", (X, W), {}),
    ("tract_core_gather", (W, X), {"axis": 0}),
    ("tract_core_gather", (W, X), {"axis": 1, "datum_type": "f32"}),
    ("tract_core_gather", (CUT, X), {"axis": 0, "datum_type": "f32"}),
    ("transpose", (W,), {"axes": [1, 0]}),
    ("slice", (W,), {"axes": [0]}),
    ("tract_core_cast", (W,), {"to": "f16"}),
    ("add", (X, W), {}),
    ("concat", ([W, X],), {"axis": 0}),
    ("tract_core_einsum", ([replace(W, transposed=True), X],), {"expr": "nk,ak->an", "acc": "f32"}),
    ("matmul", (replace(W, transposed=True), X), {}),
    ("tract_moe_ffn", (X, W, STACK, STACK, STACK), {"expert_layout": "linear"}),
    ("tract_moe_ffn", (X, Ref("r", (2, 64), torch.float32), STACK, STACK, STACK), {"expert_layout": "canonical"}),
    ("tract_moe_ffn", (X, Ref("r", (2, 64), torch.float32), NARROW, NARROW, NARROW), {"expert_layout": "linear"}),
    ("tract_core_einsum", ([NARROW, X],), {"expr": "enk,ak->ean", "acc": "f32"}),
    ("tract_core_scan", ("body", [("x", X, 0, 1)], [("w", W)], [("h", X, "y")], [("y", "full", 0, 1)]), {}),
]


@pytest.mark.parametrize(("operator", "args", "attrs"), LEGAL)
def test_legal_uses_pass(operator, args, attrs):
    lint(document(operator, args, outputs=(), **attrs))


@pytest.mark.parametrize(("operator", "args", "attrs"), ILLEGAL)
def test_illegal_uses_are_refused_with_tensor_and_module(operator, args, attrs):
    with pytest.raises(T2NErrorConsistency, match=r"encoder\.layer\.weight in module encoder\.layer"):
        lint(document(operator, args, **attrs))


def test_every_rule_has_a_legal_use():
    assert {operator for operator, _, _ in LEGAL} == set(RULES)


def test_a_packed_output_is_refused():
    with pytest.raises(T2NErrorConsistency, match="cannot be an output"):
        lint(document("linear", (X, W), outputs=("w",)))


PRODUCT = 'y = tract_core_einsum([w, x], expr = "nk,ak->an", acc = "f32");'


def with_fragment(*body):
    lines = ('w = variable<scalar>(label = "encoder.layer.weight", shape = [64, 64]);', *body)
    signature = "(x: tensor<scalar>) -> (y: tensor<scalar>)"
    return replace(document("relu", (X,)), fragments={"step": (signature, lines)})


def test_a_packed_variable_of_a_fragment_may_be_the_first_operand_of_an_einsum():
    lint(with_fragment(PRODUCT))


@pytest.mark.parametrize(
    "line",
    [
        PRODUCT.replace("nk,ak", "kn,ak"),
        PRODUCT.replace("w, x", "x, w"),
        "y = matmul(w, x);",
        "y = w + x;",
        f"{PRODUCT} z = w;",
    ],
)
def test_other_uses_in_a_fragment_are_refused(line):
    with pytest.raises(T2NErrorConsistency, match=r"encoder\.layer\.weight in fragment step"):
        lint(with_fragment(line))
    with pytest.raises(T2NErrorConsistency, match="cannot be an output"):
        lint(document("squeeze", (POINT,), axes=[2, 3]))
