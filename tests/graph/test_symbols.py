"""Dimensions: what torch says of them in the user's names, and the text of it, computed by tract as by torch."""

import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument
from torch_to_nnef.graph.axes import asserted, axis_expression, solved, symbol
from torch_to_nnef.graph.symbols import Symbols, _condition
from torch_to_nnef.graph.tdim import dim_text, exact, lowest
from torch_to_nnef.tract_model import TractModel

B, S, P = symbol("B"), symbol("S"), symbol("P")


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (7, "7"),
        (sympy.Integer(7), "7"),
        (S, "S"),
        (B + S, "(B + S)"),
        (4 * S, "(4 * S)"),
        (S**2, "(S * S)"),
        (S - P, "(S - P)"),
        (-S, "(-1 * S)"),
        (FloorDiv(S, 2), "(S / 2)"),
        (Mod(S, 3), "(S - (3 * (S / 3)))"),
        (Max(B, S), "max(B, S)"),
        # What is divided is never negative...
        (FloorDiv(S - 1, 2) + 1, "((1 + S) / 2)"),
        (FloorDiv(S - 3, 2), "(((1 + S) / 2) - 2)"),
        (FloorDiv(-S, 4), "(-1 * ((3 + S) / 4))"),
        (PythonMod(-S, 4), "((4 * ((3 + S) / 4)) - S)"),
        (FloorDiv(4 * S + P, 4), "(S + (P / 4))"),
        # ... and a division is not subtracted from what it divides.
        (S - FloorDiv(S, 2), "((1 + S) / 2)"),
        (S - FloorDiv(S + 1, 2), "(S / 2)"),
    ],
)
def test_text(dim, text):
    assert dim_text(dim) == text


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (sympy.sqrt(S), "no form"),
        (FloorDiv(S, P), "divides dimensions by numbers only"),
        (FloorDiv(S - P, 3), "may be negative"),
    ],
)
def test_what_tract_has_no_form_for_is_refused(dim, message):
    with pytest.raises(T2NErrorDynamicShapeValue, match=message):
        dim_text(dim)


SIZES = [(s, p) for s in (0, 1, 2, 3, 4, 5, 7, 8, 16, 17) for p in (0, 1, 2, 3, 6)]
# What models compute of sizes; two of these are added or subtracted, halved, and taken as a rest.
PARTS = [
    S,
    2 * S,
    S + P,
    S * P,
    FloorDiv(S + P, 3),
    FloorDiv(S - 1, 2) + 1,
    S - FloorDiv(S, 2),
    PythonMod(7 - PythonMod(S, 7), 7),
    Max(S - 3, P),
]


def expressions(left):
    for right in PARTS:
        for both in (left + right, left - right):
            yield from (both, FloorDiv(both, 2), PythonMod(both, 5))


def text_or_none(dim):
    try:
        return dim_text(dim)
    except T2NErrorDynamicShapeValue:
        return None


def value(dim):
    names = {"Max": max, "Min": min, "PythonMod": lambda a, b: a % b, "Mod": lambda a, b: a % b}
    return eval(f"lambda S, P: {dim}", names)


@pytest.mark.parametrize("left", PARTS, ids=str)
def test_tract_computes_what_torch_does(left, tmp_path):
    """Wherever it is the size of something: below zero, which no size is, tract may round its own way."""
    texts = {dim: text for dim in expressions(left) if (text := text_or_none(dim)) is not None}
    assert len(texts) > 25  # the others are refused
    names = [f"v{i}" for i in range(len(texts))]
    lines = [
        f'    {name} = tract_core_cast({text}, to = "i64");' for name, text in zip(names, texts.values(), strict=True)
    ]
    (tmp_path / "graph.nnef").write_text(
        "version 1.0;\nextension tract_registry tract_core;\nextension tract_symbol S;\nextension tract_symbol P;\n"
        f"graph g(x, y) -> ({', '.join(names)})\n{{\n"
        "    x = external<scalar>(shape = [S]);\n    y = external<scalar>(shape = [P]);\n" + "\n".join(lines) + "\n}\n"
    )
    model = TractModel.load(tmp_path)
    wrong = []
    for s, p in SIZES:
        results = model.run(np.zeros(s, np.float32), np.zeros(p, np.float32))
        for name, (dim, text) in zip(names, texts.items(), strict=True):
            wanted = value(dim)(s, p)
            if wanted >= 0 and results[name] != wanted:
                wrong.append((dim, text, s, p, wanted, int(results[name])))
    assert wrong == []


@given(st.sampled_from(PARTS), st.sampled_from(PARTS), st.integers(0, 50), st.integers(0, 50))
def test_a_bound_is_a_bound(left, right, s, p):
    for dim in (left + right, left * right, left - right, Min(left, right), Max(left, right)):
        assert lowest(exact(dim)) <= value(dim)(s, p)


# -- what torch says


def traced(*sizes):
    """Symbols of torch with these hints, and their environment."""
    environment = ShapeEnv()
    return environment, [
        environment.create_symintnode(
            environment.create_symbol(size, ConstantSource(f"size{i}")), hint=size, source=ConstantSource(f"size{i}")
        )
        for i, size in enumerate(sizes)
    ]


def test_names_and_roundings():
    _, (s, p) = traced(8, 6)
    symbols = Symbols({s.node.expr: 2 * S, p.node.expr: P})
    assert symbols.dim(3) == 3
    assert symbols.dim(s + p) == 2 * S + P
    assert symbols.dim(s // 2) == S
    assert symbols.dim(-p % 4) == -P - 4 * FloorDiv(-P, 4)
    assert symbols.dim(math.ceil(p / 2)) == FloorDiv(P + 1, 2)
    assert symbols.dim(math.floor(torch.sym_float(p) * 1.5)) == FloorDiv(3 * P, 2)


def test_a_size_that_depends_on_the_data():
    environment, _ = traced(8)
    with pytest.raises(T2NErrorDynamicShapeValue, match="depends on the data"):
        Symbols({}).dim(environment.create_unbacked_symint())


def test_what_torch_assumed():
    environment, (s, p) = traced(8, 6)
    assert s > 5
    assert s % 4 == 0
    assert s // 2 == 4
    assert p != 7
    symbols = Symbols({s.node.expr: S}, [guard.expr for guard in environment.guards])
    assumed = {c.text: c for c in symbols.assumed()}
    assert all(condition.holds({"S": 8}) for condition in assumed.values())
    assert not all(condition.holds({"S": 12}) for condition in assumed.values())
    assert symbols.dim(s // 2 + s) == S + 4


# -- what the user says


@pytest.mark.parametrize(("text", "expr"), [("S", S), ("2*S", 2 * S), ("S + P - 1", S + P - 1), ("2*S*3", 6 * S)])
def test_axes(text, expr):
    assert axis_expression(text) == expr


@pytest.mark.parametrize("text", ["", "S*P", "S/2", "S//2", "2", "-", "f(S)", "S[0]", "S*S", "1.5*S", "S if S else P"])
def test_what_is_no_axis(text):
    with pytest.raises(T2NErrorDynamicShapeValue, match="no size of an axis"):
        axis_expression(text)


def test_sizes_of_names():
    assert solved([("2*T+1", 7, "x"), ("P+S", 9, "mask"), ("S", 4, "x"), ("P", 5, "past")]) == {"S": 4, "P": 5, "T": 3}


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("S <= 4", {"S": 4}, {"S": 5}),
        ("S >= 2*P", {"S": 4, "P": 2}, {"S": 3, "P": 2}),
        ("S+P == 9", {"S": 4, "P": 5}, {"S": 4, "P": 4}),
        ("S > 1;", {"S": 2}, {"S": 1}),
        ("(2 * S) / 3 == 2", {"S": 4}, {"S": 5}),
        ("S < 4096 - P", {"S": 1, "P": 1}, {"S": 4095, "P": 1}),
    ],
)
def test_assertions(text, right, wrong):
    (condition,) = asserted(["tract_registry tract_extra", f"tract_assert {text}"])
    assert condition.holds(right)
    assert not condition.holds(wrong)


def test_an_assertion_of_names_that_are_not_there():
    (condition,) = asserted(["tract_assert Q <= 4"])
    assert condition.holds({"S": 9})


@pytest.mark.parametrize(
    "text", ["", "S", "S <= 4 <= 5", "S != 3", "S ** 2 < 4", "S / P > 1", "2 * S / 3 > 1", "causal: S > 1"]
)
def test_an_assertion_that_cannot_be_read(text):
    with pytest.raises(T2NErrorInvalidArgument, match="write one relation"):
        asserted([f"tract_assert {text}"])


def test_a_condition_without_a_value_does_not_hold():
    condition = _condition(sympy.Eq(Mod(S - 2, 2), 0))
    assert [condition.holds({"S": size}) for size in (1, 3, 4)] == [False, False, True]
