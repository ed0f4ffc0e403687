"""Models converted by torch.ao, and how their references are judged."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization as tq

from torch_to_nnef.graph.capture import capture
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.quantized import float_reference

MARKS = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*are deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share:UserWarning"),
    # Observers of torch.ao.
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams:UserWarning"),
    pytest.mark.usefixtures("engine"),
]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Wrapped(nn.Module):
    """A module between the stubs of eager mode, behind a relu that makes zero points differ."""

    def __init__(self, *modules):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.body = nn.Sequential(*modules)

    def forward(self, x):
        return self.dequant(self.body(self.quant(x)))


def eager(model, x, fuse=()):
    torch.manual_seed(0)
    model = model.eval()
    model = tq.fuse_modules(model, list(fuse)) if fuse else model
    model.qconfig = tq.get_default_qconfig(torch.backends.quantized.engine)
    prepared = tq.prepare(model)
    for seed in range(3):
        prepared(noise(*x.shape, seed=seed))
    return tq.convert(prepared)


def steps_off(found, expected):
    """Differences in codes, the step being the smallest difference between two outputs."""
    levels = expected.unique().double().diff()
    step = levels[levels > levels.max() * 1e-3].min() if len(levels) else torch.tensor(1.0)
    return ((found.double() - expected.double()) / step).abs().round()


# Products in floats are summed in another order, and now and then one lies between two codes.
TIES = 0.005


def assert_reference(model, x, share=TIES):
    """The reference of `model` is within one code of it, and differs in at most `share` of the outputs."""
    before = {name: id(p) for name, p in model.named_parameters()}
    expected = model(x)
    reference = float_reference(model)
    off = steps_off(reference(x), expected)
    assert off.max() <= 1
    assert (off > 0).float().mean() <= share
    assert torch.equal(copy.deepcopy(reference)(x), reference(x))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(model(x), expected)
    program = capture(reference, prepare(reference, (x,), None, {})).program
    assert not any(str(node.target).startswith("quantized.") for node in program.graph.nodes)
    return reference
