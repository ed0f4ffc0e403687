import re

import numpy as np
import pytest
import torch

from torch_to_nnef.exceptions import (
    T2NErrorDynamicShapeValue,
    T2NErrorIOPytorchTractNotISO,
    T2NErrorIoQuantity,
    T2NErrorRuntime,
    T2NErrorTract,
)
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.verify import (
    Comparison,
    compare,
    compare_models,
    raise_on_mismatch,
    resized_input_sets,
    verify_archive,
)
from torch_to_nnef.verify.resize import InputSet

APPROXIMATE = TractCheckTolerance.APPROXIMATE
NAMES = ["doubled", "y"]


def model(tensors):
    x, bias = tensors
    return [2 * x, torch.relu(2 * x) + bias]


@pytest.fixture
def input_sets():
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(2, 3, generator=generator), torch.randn(3, generator=generator)
    return resized_input_sets([x, bias], [{0: "B"}, {}])


def test_a_right_archive_agrees_at_every_size(archive, input_sets):
    comparisons = verify_archive(archive, model, input_sets, NAMES, APPROXIMATE)
    assert [c.sizes["B"] for c in comparisons] == [2, 1, 3, 4]
    assert [c.traced for c in comparisons] == [True, False, False, False]
    for c in comparisons:
        assert c.kind == "archive"
        assert c.ok
        assert [o.name for o in c.outputs] == NAMES
        assert [o.shape for o in c.outputs] == [(c.sizes["B"], 3)] * 2
    raise_on_mismatch(comparisons, input_sets)


def test_outputs_are_matched_by_name(archive, input_sets):
    (first, *_) = verify_archive(archive, lambda t: model(t)[::-1], input_sets, NAMES[::-1], APPROXIMATE)
    assert first.ok


def test_a_wrong_value_is_reported_with_its_place(archive, input_sets):
    def wrong(tensors):
        doubled, y = model(tensors)
        if len(y) == 4:
            y[2, 1] += 1
        return [doubled, y]

    comparisons = verify_archive(archive, wrong, input_sets, NAMES, APPROXIMATE)
    assert [c.ok for c in comparisons] == [True, True, True, False]
    located = []
    with pytest.raises(T2NErrorIOPytorchTractNotISO) as caught:
        raise_on_mismatch(comparisons, input_sets, lambda inputs: located.append(inputs) or "it is the addition")
    assert located == [input_sets[3]]
    output = comparisons[3].outputs[1]
    assert output.reference_at_worst == pytest.approx(output.actual_at_worst + 1)
    lines = str(caught.value).splitlines()
    assert "'approximate'" in lines[0]
    assert lines[1] == (
        f"  B=4: output 'y': 1 of 12 values (8.33%) outside, worst at [2, 1]: "
        f"reference {output.reference_at_worst!r}, actual {output.actual_at_worst!r}"
    )
    assert lines[2:] == ["it is the addition"]


def test_a_search_that_fails_does_not_hide_the_mismatch(archive, input_sets):
    comparisons = verify_archive(archive, lambda t: [-v for v in model(t)], input_sets, NAMES, APPROXIMATE)

    def locate(_):
        raise T2NErrorTract("no such node")

    with pytest.raises(T2NErrorIOPytorchTractNotISO, match=r"(?s)output 'y'.*could not be found: no such node"):
        raise_on_mismatch(comparisons, input_sets, locate)


def test_many_wrong_outputs_are_counted_rather_than_listed():
    output = compare(torch.ones(1), np.zeros(1, np.float32), APPROXIMATE)
    inputs = InputSet({}, (), traced=True)
    comparison = Comparison("archive", {}, True, (output,) * 25, APPROXIMATE)
    with pytest.raises(T2NErrorIOPytorchTractNotISO) as caught:
        raise_on_mismatch([comparison], [inputs])
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 5 more"


def test_a_model_that_writes_into_its_inputs_is_compared_on_the_original_ones(archive, input_sets):
    def writes(tensors):
        outputs = model(tensors)
        tensors[0].zero_()
        return outputs

    kept = [inputs.tensors[0].clone() for inputs in input_sets]
    assert all(c.ok for c in verify_archive(archive, writes, input_sets, NAMES, APPROXIMATE))
    assert all(torch.equal(inputs.tensors[0], before) for inputs, before in zip(input_sets, kept, strict=True))


def test_no_graph_is_recorded(archive, input_sets):
    weight = torch.ones(3, requires_grad=True)

    def records(tensors):
        outputs = [output * weight for output in model(tensors)]
        assert not any(output.requires_grad for output in outputs)
        return outputs

    assert all(c.ok for c in verify_archive(archive, records, input_sets, NAMES, APPROXIMATE))


def test_bf16_inputs_reach_tract_as_f32(archive):
    inputs = [torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]
    (comparison,) = verify_archive(archive, model, [InputSet({}, tuple(inputs), traced=True)], NAMES, APPROXIMATE)
    assert comparison.ok
    assert comparison.outputs[0].dtype == "bfloat16"


def fails_at(*sizes):
    def refuses(tensors):
        if len(tensors[0]) in sizes:
            raise IndexError(f"position {len(tensors[0])} is out of range")
        return model(tensors)

    return refuses


def test_sizes_that_torch_refuses_are_reported(archive, input_sets):
    comparisons = verify_archive(archive, fails_at(1, 4), input_sets, NAMES, APPROXIMATE)
    assert [c.refused for c in comparisons] == [
        None,
        "IndexError: position 1 is out of range",
        None,
        "IndexError: position 4 is out of range",
    ]
    assert [len(c.outputs) for c in comparisons] == [2, 0, 2, 0]


def test_a_dynamic_axis_that_torch_never_accepts_is_an_error(archive, input_sets):
    with pytest.raises(T2NErrorDynamicShapeValue, match=r"(?s)B=1: IndexError: position 1.*B=4"):
        verify_archive(archive, fails_at(1, 3, 4), input_sets, NAMES, APPROXIMATE)


def test_a_model_that_fails_on_its_sample_inputs_is_an_error(archive, input_sets):
    with pytest.raises(T2NErrorRuntime, match="own sample inputs: position 2 is out of range"):
        verify_archive(archive, fails_at(2), input_sets, NAMES, APPROXIMATE)


def test_the_number_of_outputs_must_fit(archive, input_sets):
    with pytest.raises(T2NErrorIoQuantity, match="1 outputs named, torch gives 2, the other side 1"):
        verify_archive(archive, model, input_sets, ["y"], APPROXIMATE)
    with pytest.raises(T2NErrorIoQuantity, match=re.escape("no output ['z']; it has ['doubled', 'y']")):
        verify_archive(archive, model, input_sets, ["doubled", "z"], APPROXIMATE)


def test_sizes_at_which_tract_fails_are_named(archive):
    inputs = InputSet({"B": 2}, (torch.zeros(2, 5), torch.zeros(3)), traced=True)
    with pytest.raises(T2NErrorTract, match="at sizes B=2"):
        verify_archive(archive, lambda _: [torch.zeros(2, 5)] * 2, [inputs], NAMES, APPROXIMATE)


def test_an_archive_that_does_not_load(tmp_path, input_sets):
    (tmp_path / "graph.nnef").write_text("version 1.0;\ngraph broken(x) -> (y) { y = nonsense(x); }\n")
    with pytest.raises(T2NErrorTract):
        verify_archive(tmp_path, model, input_sets, NAMES, APPROXIMATE)


def test_two_torch_models_are_compared_likewise(input_sets):
    def rounded(tensors):
        return [torch.round(output * 8) / 8 for output in model(tensors)]

    comparisons = compare_models(model, rounded, input_sets, NAMES, APPROXIMATE)
    assert [c.kind for c in comparisons] == ["quantization"] * 4
    for c, inputs in zip(comparisons, input_sets, strict=True):
        expected, actual = model(list(inputs.tensors))[0].numpy(), rounded(list(inputs.tensors))[0].numpy()
        assert c.outputs[0].max_abs == np.abs(expected.astype(np.float64) - actual).max() > 0
