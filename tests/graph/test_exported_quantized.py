"""PT2E: what torchao makes of an exported model is captured again, its weights as 8-bit parameters under their own names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.graph.capture import capture
from torch_to_nnef.graph.convert import to_graph
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.quantized import float_reference
from torch_to_nnef.tensor.quant.int8 import QTensorInt8

pytestmark = [
    pytest.mark.filterwarnings("ignore:XNNPACKQuantizer is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized:UserWarning"),
]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.hs = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Hardswish()
        # The two have the same shape: names are told apart by values.
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        y = F.relu(self.b1(self.c1(x)))
        y = F.max_pool2d(y + self.hs(self.c2(y)), 2)
        return self.block(F.adaptive_avg_pool2d(y, 1).flatten(1))


def xnnpack_quantizer(per_channel):
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=per_channel)
    return xnnpack.XNNPACKQuantizer().set_global(config)


QUANTIZERS = {
    "xnnpack": lambda: xnnpack_quantizer(False),
    "xnnpack per channel": lambda: xnnpack_quantizer(True),
    "x86": lambda: x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config()),
}


def converted(name):
    torch.manual_seed(0)
    x = noise(4, 3, 8, 8)
    exported = torch.export.export(Net().eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    prepared = prepare_pt2e(exported.module(), QUANTIZERS[name]())
    for seed in range(3):
        prepared(noise(4, 3, 8, 8, seed=seed))
    return convert_pt2e(prepared)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_captured_again(name):
    model, x = converted(name), noise(4, 3, 8, 8, seed=9)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    reference = float_reference(model)
    assert torch.equal(reference(x), expected)
    packed = {key: p for key, p in reference.named_parameters() if isinstance(p, QTensorInt8)}
    assert sorted(packed) == ["block.0.weight", "block.2.weight", "c1.weight", "c2.weight"]
    assert all((p.axis is None) == (name == "xnnpack") for p in packed.values())
    for key, weight in packed.items():  # batch norm is folded into what torchao leaves of the float weights
        torch.testing.assert_close(weight.decompress(), state[key], rtol=0, atol=float(weight.qscheme.scale.max()))
    captured = capture(reference, prepare(reference, (x,), None, {"x": {0: "B"}}))
    ops = [str(node.target) for node in captured.program.graph.nodes if node.op == "call_function"]
    assert not any("dequantize_per_channel" in op for op in ops)
    assert sorted(captured.fqns().values()) == sorted(key for key in state if key[0] in "cb")
    places = {node.module_path for node in to_graph(captured).nodes}
    assert {"c1", "c2", "block.0", "block.2"} <= places
    # The model stays torchao's.
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_in_tract(name, tmp_path):
    x = noise(4, 3, 8, 8, seed=9)
    report = quantize_and_verify(
        converted(name), (x,), tmp_path / "net.nnef", method=None, dynamic_axes={"x": {0: "B"}}
    )
    assert {row.fqn for row in report.rows} == {"block.0.weight", "block.2.weight", "c1.weight", "c2.weight"}


DYNAMIC = {
    "xnnpack": lambda: xnnpack.XNNPACKQuantizer().set_global(
        xnnpack.get_symmetric_quantization_config(is_dynamic=True)
    ),
    "x86": lambda: x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config(is_dynamic=True)
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic(name, tmp_path):
    torch.manual_seed(0)
    x = noise(5, 8)
    exported = torch.export.export(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (x,))
    prepared = prepare_pt2e(exported.module(), DYNAMIC[name]())
    prepared(x)
    model = convert_pt2e(prepared)
    for values in (x, x.abs(), 0 * x):
        torch.testing.assert_close(float_reference(model)(values), model(values), rtol=1e-5, atol=1e-6)
    report = quantize_and_verify(model, (x,), tmp_path / "net.nnef", method=None)
    assert {row.fqn for row in report.rows} == {"0.weight", "2.weight"}
    assert report.arithmetic.integer_share == 1


def test_arguments_by_name(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, pair, *, scale):
            return self.linear(pair["a"] * scale + pair["b"])

    torch.manual_seed(0)
    args, kwargs = ({"a": noise(3, 8), "b": noise(3, 8, seed=1)},), {"scale": noise(8, seed=2)}
    exported = torch.export.export(Sum(), args, kwargs)
    prepared = prepare_pt2e(exported.module(), QUANTIZERS["xnnpack"]())
    prepared(*args, **kwargs)
    model = convert_pt2e(prepared)
    assert torch.equal(float_reference(model)(*args, **kwargs), model(*args, **kwargs))
