"""Every model of the zoo: exported in f32, Q40 and f16, run in tract at the traced and at other sizes, against torch."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from zoo import ZOO

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.exceptions import T2NError
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.quantize.targets import DEFAULT_CLASSES


def marks(case):
    waiting = [pytest.mark.xfail(reason=case.waits, raises=T2NError)] if case.waits else []
    return [*waiting, *([] if case.quick else [pytest.mark.slow])]


PARAMS = [pytest.param(case, id=case.name, marks=marks(case)) for case in ZOO]


def outputs(model, inputs):
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if leaf is not None]


def in_dtype(tensors, dtype):
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def distance(actual, reference):
    """RMSE over the RMS of the reference."""
    error = actual.double() - reference.double()
    return (error.square().mean() / reference.double().square().mean()).sqrt().item()


def packable(model):
    """Weights that a layer of the four classes holds, in rows of whole groups, not depthwise: those must be in Q40."""
    for module in model.modules():
        if type(module) not in DEFAULT_CLASSES or "weight" not in module._parameters:
            continue
        depthwise = getattr(module, "groups", 1) > 1 and module.weight.shape[1] == 1
        if module.weight[0].numel() % 32 == 0 and not depthwise:
            yield module.weight


def settled(case):
    model = case.model()
    for result in outputs(model, case.inputs()):
        assert 0.05 < result.std() < 20, "activations vanish or explode: a comparison would say nothing"
    return model


@pytest.mark.parametrize("case", PARAMS)
@pytest.mark.parametrize("method", [None, "min_max_q4_0_all"])
def test_single_precision(case, method, tmp_path):
    model = settled(case)
    report = quantize_and_verify(model, case.inputs(), tmp_path / "net.nnef", method, dynamic_axes=case.axes)
    assert report.ok
    assert len([c for c in report.archive if c.refused is None]) >= (3 if case.axes else 1)
    if method:
        done = [row for row in report.rows if row.quantized or row.reason == "the graph does not use it"]
        assert {id(model.get_parameter(row.fqn)) for row in done} >= {id(weight) for weight in packable(model)}
        assert any(row.quantized for row in done)


@pytest.mark.parametrize("case", [param for param in PARAMS if param.values[0].half])
def test_half_precision_is_as_near_as_torch_is(case, tmp_path):
    """Sums in f32, one rounding an operator: both are as far from the model in f32, so the square root of 2 of that apart."""
    single = settled(case)
    half, inputs = copy.deepcopy(single).half(), in_dtype(case.inputs(), torch.float16)
    # `approximate` allows two roundings of a value near 1; behind dozens of them, values near 0 differ by more.
    target = TractNNEF.latest(dynamic_axes=case.axes, check_io_tolerance="very")
    path = tmp_path / "net.nnef"
    assert quantize_and_verify(half, inputs, path, None, inference_target=target).ok
    results = TractModel.load(path).run(*inputs).values()
    exact = outputs(single, in_dtype(inputs, torch.float32))
    for actual, reference, best in zip(results, outputs(half, inputs), exact, strict=True):
        assert distance(torch.from_numpy(actual), reference) <= 2 * distance(reference, best) + 2**-20
