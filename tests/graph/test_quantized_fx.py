"""FX graph mode: functions with packed weights, reference models, dynamic layers, what onednn joins, training with rounding."""

import pytest
import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.nn.functional as F
from converted import MARKS, assert_reference, noise
from torch import nn
from torch.ao import quantization as tq
from torch.ao.quantization.backend_config import get_onednn_backend_config
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx

from torch_to_nnef.graph.quantized import float_reference
from torch_to_nnef.tensor.quant.int8 import QTensorInt8

pytestmark = MARKS


class Traced(nn.Module):
    """For FX graph mode: weights of functions, numbers, what stays float."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.hs = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Hardswish()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 5)
        self.w, self.cw, self.cb = (nn.Parameter(noise(*s)) for s in ((8, 8), (8, 8, 3, 3), (8,)))
        self.kw = nn.Parameter(noise(8, 8, 3, seed=4))

    def forward(self, x):
        y = F.relu(self.b1(self.c1(x)))
        y = F.max_pool2d(y + self.hs(self.c2(y)), 2)
        z = F.conv2d(y, self.cw, self.cb, [1, 1], [1, 1], [1, 1], 1).flatten(2)
        z = F.conv1d(z, self.kw, self.cb, [1], [1], [1], 1)
        z = torch.cat([z, F.relu(z)], -1)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        y = F.relu(F.linear(y, self.w))
        y = self.fc2(F.relu(self.fc1(y * torch.sigmoid(y)))) + 1
        return torch.cat([y, F.layer_norm(z, (z.shape[-1],)).mean(-1)], 1)


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"], indirect=True)
@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_fx_graph_mode(engine, convert):
    torch.manual_seed(0)
    x = noise(4, 3, 8, 8, seed=9)
    prepared = prepare_fx(Traced().eval(), tq.get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    model = convert(prepared)
    reference = assert_reference(model, x, share=0.1)
    packed = {name for name, p in reference.named_parameters() if isinstance(p, QTensorInt8)}
    assert len(packed) == 7
    assert {"c2.weight", "fc2.weight"} <= packed


def test_fx_dynamic():
    x = noise(4, 3, 8, 8, seed=9)
    mapping = tq.QConfigMapping().set_global(tq.default_dynamic_qconfig)
    model = convert_fx(prepare_fx(Traced().eval(), mapping, (x,)))
    torch.testing.assert_close(float_reference(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_quantization_aware_training():
    torch.manual_seed(0)
    x = noise(4, 3, 8, 8, seed=9)
    prepared = prepare_qat_fx(Traced().train(), tq.get_default_qat_qconfig_mapping("fbgemm"), (x,))
    for _ in range(2):
        prepared(x).sum().backward()  # a step of the observers
    assert_reference(convert_fx(prepared.eval()), x, share=0.1)


class Joined(nn.Module):
    """What onednn joins: a sum into a convolution, an activation into a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.ReLU()
        self.c, self.d = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.leaky, self.tanh = nn.LeakyReLU(0.17), nn.Tanh()
        self.e, self.f = nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x):
        y = self.relu(torch.add(self.a(x), self.b(x)))
        y = torch.add(self.c(y), self.d(y))
        return self.tanh(self.f(self.leaky(self.e(y))))


@pytest.mark.parametrize("engine", ["onednn"], indirect=True)
def test_what_onednn_joins(engine):
    x = noise(2, 4, 9, 9, seed=9)
    torch.manual_seed(1)
    config = get_onednn_backend_config()
    mapping = tq.QConfigMapping().set_global(tq.get_default_qconfig(engine))
    prepared = prepare_fx(Joined().eval(), mapping, (x,), backend_config=config)
    prepared(x)
    model = convert_fx(prepared, backend_config=config)
    found = {type(module) for module in model.modules()}
    assert {nniq.ConvAdd2d, nniq.ConvAddReLU2d, nniq.LinearLeakyReLU, nniq.LinearTanh} <= found
    assert_reference(model, x)


@pytest.mark.parametrize("engine", ["qnnpack"], indirect=True)
@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
@pytest.mark.parametrize(("cls", "shape"), [(nn.ConvTranspose1d, (2, 4, 9)), (nn.ConvTranspose2d, (2, 4, 9, 9))])
def test_transposed_convolutions(engine, convert, cls, shape):
    torch.manual_seed(0)
    x = noise(*shape, seed=9)
    model = nn.Sequential(cls(4, 6, 3, stride=2, padding=1, output_padding=1)).eval()
    prepared = prepare_fx(model, tq.get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    assert_reference(convert(prepared), x)
