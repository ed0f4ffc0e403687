"""Dimensions as tract's text: the value of the text is the value of the expression."""

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.tdim import dim_text

B, S = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "BS")


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (7, "7"),
        (sympy.Integer(7), "7"),
        (S, "S"),
        (B + S, "(B + S)"),
        (4 * S, "(4 * S)"),
        (S**2, "(S * S)"),
        (FloorDiv(S, 2), "(S / 2)"),
        (Mod(S, 3), "(S - (3 * (S / 3)))"),
        (Max(B, S), "max(B, S)"),
    ],
)
def test_text(dim, text):
    assert dim_text(dim) == text


dims = st.recursive(
    st.one_of(st.sampled_from([B, S]), st.integers(1, 9).map(sympy.Integer)),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, st.integers(1, 7)).map(lambda p: FloorDiv(p[0], sympy.Integer(p[1]))),
        st.tuples(inner, inner).map(lambda p: Max(*p)),
        st.tuples(inner, inner).map(lambda p: Min(*p)),
    ),
    max_leaves=6,
)


@given(dims, st.integers(1, 50), st.integers(1, 50))
def test_the_text_means_what_the_expression_means(dim, b, s):
    value = int(dim.subs({B: b, S: s}))
    python = dim_text(dim).replace("/", "//")
    assert eval(python, {"B": b, "S": s, "max": max, "min": min}) == value


def test_what_tract_has_no_form_for_is_refused():
    with pytest.raises(T2NErrorDynamicShapeValue, match="no form"):
        dim_text(sympy.sqrt(S))
