import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.axes import Condition, asserted
from torch_to_nnef.verify.resize import other_sizes, resized_input_sets


@given(st.dictionaries(st.sampled_from("BSPHW"), st.integers(0, 600), min_size=1))
def test_every_symbol_takes_three_sizes_and_never_its_traced_one(traced):
    combinations = other_sizes(traced)
    assert len(combinations) >= 3
    assert len({tuple(c.items()) for c in combinations}) == len(combinations)
    for symbol, size in traced.items():
        tried = {c[symbol] for c in combinations}
        assert len(tried) == 3
        assert size not in tried
        assert size <= 1 or 1 in tried
        assert max(tried) <= max(2 * size, size + 3)
        assert min(tried) >= 1


def test_symbols_are_combined_in_different_kinds_and_once_all_doubled():
    assert other_sizes({"B": 2, "S": 8}) == [
        {"B": 1, "S": 9},
        {"B": 3, "S": 16},
        {"B": 4, "S": 1},
        {"B": 4, "S": 16},
    ]


def test_without_dynamic_axes_only_the_traced_inputs_remain():
    x = torch.zeros(2, 3)
    (traced,) = resized_input_sets([x], [{}])
    assert traced.traced
    assert traced.sizes == {}
    assert traced.tensors[0] is x


def test_values_repeat_and_shared_symbols_vary_together():
    ids = torch.tensor([[5, 7, 9], [2, 4, 6]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    fixed = torch.ones(4)
    traced, *others = resized_input_sets([ids, mask, fixed], [{0: "B", -1: "S"}, {0: "B", 1: "S"}, {}])
    assert traced.sizes == {"B": 2, "S": 3}
    assert len(others) >= 3
    for inputs in others:
        new_ids, new_mask, new_fixed = inputs.tensors
        shape = (inputs.sizes["B"], inputs.sizes["S"])
        assert not inputs.traced
        assert new_ids.shape == new_mask.shape == shape
        assert new_ids.dtype == torch.int64
        assert new_mask.dtype == torch.bool
        assert torch.equal(new_fixed, fixed)
        for b in range(shape[0]):
            for s in range(shape[1]):
                assert new_ids[b, s] == ids[b % 2, s % 3]
                assert new_mask[b, s] == mask[b % 2, s % 3]


def test_an_empty_axis_grows_with_zeros():
    cache = torch.zeros(2, 0, 4, dtype=torch.float16)
    _, *others = resized_input_sets([cache], [{1: "P"}])
    for inputs in others:
        assert inputs.tensors[0].shape == (2, inputs.sizes["P"], 4)
        assert inputs.tensors[0].dtype == torch.float16
        assert not inputs.tensors[0].any()


def test_inputs_are_left_alone_and_gradients_are_not_carried():
    x = torch.randn(2, requires_grad=True)
    before = x.detach().clone()
    _, *others = resized_input_sets([x], [{0: "B"}])
    assert torch.equal(x, before)
    assert not any(inputs.tensors[0].requires_grad for inputs in others)


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_out_of_range(axis):
    with pytest.raises(T2NErrorDynamicShapeValue, match=rf"input 1: dynamic axis {axis} \(B\).*\[2, 3\]"):
        resized_input_sets([torch.zeros(1), torch.zeros(2, 3)], [{}, {axis: "B"}])


def test_a_symbol_of_two_sizes():
    with pytest.raises(T2NErrorDynamicShapeValue, match=r"'B' has size 2 in 'input 0' but 3 in 'input 1'"):
        resized_input_sets([torch.zeros(2), torch.zeros(3)], [{0: "B"}, {0: "B"}])


def test_an_axis_of_two_names():
    with pytest.raises(T2NErrorDynamicShapeValue, match="named both 'B' and 'S'"):
        resized_input_sets([torch.zeros(2, 3)], [{1: "B", -1: "S"}])
    assert resized_input_sets([torch.zeros(2, 3)], [{1: "B", -1: "B"}])[0].sizes == {"B": 3}


def sizes_tried(size, conditions=(), assumed=(), axis="S"):
    _, *others = resized_input_sets([torch.zeros(size)], [{0: axis}], conditions, assumed)
    return others


def condition(text, holds, *numbers, merely_unequal=False):
    return Condition(text, lambda sizes: holds(sizes["S"]), frozenset(numbers), merely_unequal)


def test_sums_follow_their_parts():
    past, mask = torch.zeros(4), torch.zeros(13)
    _, *others = resized_input_sets([mask, past], [{0: "P+2*S+1"}, {0: "P"}])
    assert len(others) >= 3
    for inputs in others:
        assert inputs.tensors[1].shape == (inputs.sizes["P"],)
        assert inputs.tensors[0].shape == (inputs.sizes["P"] + 2 * inputs.sizes["S"] + 1,)


def test_no_size_is_tried_that_is_asserted_not_to_be():
    others = sizes_tried(8, [condition("S > 5", lambda s: s > 5), condition("S <= 9", lambda s: s <= 9)])
    assert sorted(inputs.sizes["S"] for inputs in others) == [6, 7, 9]
    assert [inputs.outside for inputs in others] == [(), (), ()]


def test_nothing_is_tried_where_it_is_asserted_to_be_legal():
    assert [inputs.sizes["S"] for inputs in sizes_tried(8, asserted(["tract_assert S >= 0"]))] == [1, 9, 16, 0]
    assert [inputs.sizes["S"] for inputs in sizes_tried(8, asserted(["tract_assert S >= 1"]))] == [1, 9, 16]
    past = resized_input_sets([torch.zeros(3, 4)], [{0: "S", 1: "P"}], asserted(["tract_assert P >= 0"]))[-1]
    assert (past.sizes, past.tensors[0].shape) == ({"S": 3, "P": 0}, (3, 0))


def test_sizes_that_torch_may_take_are_tried_beside_the_usual():
    others = sizes_tried(8, assumed=[condition("S % 4 == 0", lambda s: s % 4 == 0, 4, 0)])
    assert [inputs.sizes["S"] for inputs in others] == [1, 9, 16, 24, 4]
    assert [inputs.outside for inputs in others] == [("S % 4 == 0",), ("S % 4 == 0",), (), (), ()]


@pytest.mark.parametrize(("merely", "field"), [(False, "outside"), (True, "beside")])
def test_an_assumption_is_tried_where_it_fails(merely, field):
    for holds, number, failing in ((lambda s: s < 50, 50, 50), (lambda s: s != 7, 7, 7)):
        others = sizes_tried(8, assumed=[condition("assumed", holds, number, merely_unequal=merely)])
        assert [inputs.sizes["S"] for inputs in others] == [1, 9, 16, failing]
        assert getattr(others[-1], field) == ("assumed",)


def test_samples_are_not_made_much_larger_for_an_assumption():
    others = sizes_tried(8, assumed=[condition("S < 4096", lambda s: s < 4096, 4096)])
    assert [inputs.sizes["S"] for inputs in others] == [1, 9, 16]


def test_samples_and_assertions_that_leave_nothing():
    with pytest.raises(T2NErrorDynamicShapeValue, match="sample inputs are not as asserted: S=8, but S > 9"):
        sizes_tried(8, [condition("S > 9", lambda s: s > 9)])
    with pytest.raises(T2NErrorDynamicShapeValue, match="no size but that of the samples, S=8, is as asserted: S == 8"):
        sizes_tried(8, [condition("S == 8", lambda s: s == 8)])
