"""Models converted by torch.ao: the reference computes what torch's integer engines compute, to the last code where they are exact."""

import pytest
import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.nn.functional as F
from converted import MARKS, Wrapped, assert_reference, eager, noise, steps_off
from torch import nn
from torch.ao import quantization as tq

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.graph.quantized import float_reference
from torch_to_nnef.tensor.quant import QTensorHalf, QTensorInt8
from torch_to_nnef.tract_model import TractModel

pytestmark = MARKS
ENGINES = ["fbgemm", "qnnpack", "onednn"]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.c1, self.b1, self.r1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.ff = nnq.FloatFunctional()
        self.hs = nn.Hardswish()
        self.fc1, self.r2, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x):
        y = self.r1(self.b1(self.c1(self.quant(x))))
        y = self.ff.add(y, self.hs(self.c2(y)))
        y = F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).flatten(1)
        return self.dequant(self.fc2(self.r2(self.fc1(y))))


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_chain(engine):
    x = noise(16, 3, 16, 16, seed=9)
    model = eager(Chain(), x, [["c1", "b1", "r1"], ["fc1", "r2"]])
    # One sum in tens of thousands lies between two codes, and moves all outputs behind it.
    reference = assert_reference(model, x, share=0.1)
    weights = {name: p for name, p in reference.named_parameters() if name.endswith("weight")}
    assert list(weights) == ["c1.weight", "c2.weight", "fc1.weight", "fc2.weight"]
    for name, weight in weights.items():
        packed = model.get_submodule(name.removesuffix(".weight")).weight()
        assert isinstance(weight, QTensorInt8)
        assert torch.equal(weight.codes, packed.int_repr())
        assert torch.equal(weight.decompress(), packed.dequantize())
        assert (weight.axis is None) == (engine == "qnnpack")


MODULES = {
    "linear": (lambda: [nn.Linear(8, 6)], (5, 8)),
    "linear without bias": (lambda: [nn.Linear(8, 6, bias=False)], (2, 5, 8)),
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3, stride=2, padding=1)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=2, bias=False)], (2, 4, 9, 9)),
    "conv2d reflected": (lambda: [nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")], (2, 4, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(2, 6, 3, padding=1)], (2, 2, 5, 5, 5)),
    "batch norm": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "batch norm 3d": (lambda: [nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6)], (2, 2, 5, 5, 5)),
    "layer norm": (lambda: [nn.LayerNorm(8)], (5, 8)),
    "group norm": (lambda: [nn.GroupNorm(2, 4)], (2, 4, 9)),
    "instance norm 1d": (lambda: [nn.InstanceNorm1d(4, affine=True)], (2, 4, 9)),
    "instance norm 2d": (lambda: [nn.InstanceNorm2d(4, affine=True)], (2, 4, 9, 9)),
    "instance norm 3d": (lambda: [nn.InstanceNorm3d(4, affine=True)], (2, 4, 5, 5, 5)),
    "relu6": (lambda: [nn.ReLU6()], (5, 8)),
    "hardswish": (lambda: [nn.Hardswish()], (5, 8)),
    "elu": (lambda: [nn.ELU(0.7)], (5, 8)),
    "leaky relu": (lambda: [nn.LeakyReLU(0.17)], (5, 8)),
    "sigmoid": (lambda: [nn.Sigmoid()], (5, 8)),
    "dropout": (lambda: [nn.Dropout(), nn.Linear(8, 6)], (5, 8)),
    "functions": (lambda: [nn.ReLU(inplace=True), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten()], (5, 4, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    make, shape = MODULES[name]
    x = noise(*shape, seed=9)
    torch.manual_seed(1)
    assert_reference(eager(Wrapped(*make()), x), x)


def prelu():
    module = nnq.PReLU(0.021, 77, 8)
    module.set_weight(torch.quantize_per_tensor(noise(8), 0.013, 120, torch.quint8))
    return module


@pytest.mark.parametrize("make", [prelu, lambda: nnq.Softmax(-1, 1 / 256, 0)])
def test_module_that_eager_mode_does_not_make(make):
    x = noise(5, 8, seed=9)
    assert_reference(nn.Sequential(nnq.Quantize(0.021, 77, torch.quint8), make(), nnq.DeQuantize()), x)


@pytest.mark.parametrize("engine", ["qnnpack"], indirect=True)
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (nn.ConvTranspose1d, (2, 4, 9)),
        (nn.ConvTranspose2d, (2, 4, 9, 9)),
        (nn.ConvTranspose3d, (2, 4, 5, 5, 5)),
    ],
)
def test_transposed_convolution(engine, cls, shape):
    x = noise(*shape, seed=9)
    torch.manual_seed(1)
    if cls is nn.ConvTranspose3d:  # which only fbgemm has
        torch.backends.quantized.engine = "fbgemm"
        model = Wrapped(cls(4, 6, 3, stride=2, padding=1, output_padding=1))
        qconfig = tq.QConfig(activation=tq.default_observer, weight=tq.default_weight_observer)
        model.body.qconfig = qconfig
    else:
        model = Wrapped(cls(4, 6, 3, stride=2, padding=1, output_padding=1))
    # qnnpack rounds biases to steps of the sums.
    assert_reference(eager(model, x), x, share=0.005)


@pytest.mark.parametrize(
    ("modules", "shape", "fused", "cls"),
    [
        (lambda: [nn.Conv1d(4, 6, 3), nn.ReLU()], (2, 4, 9), ["0", "1"], nniq.ConvReLU1d),
        (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], (2, 4, 9, 9), ["0", "1", "2"], nniq.ConvReLU2d),
        (lambda: [nn.Conv3d(4, 6, 3), nn.ReLU()], (2, 4, 5, 5, 5), ["0", "1"], nniq.ConvReLU3d),
        (lambda: [nn.Linear(8, 6), nn.ReLU()], (5, 8), ["0", "1"], nniq.LinearReLU),
        (lambda: [nn.BatchNorm2d(4), nn.ReLU()], (2, 4, 9, 9), ["0", "1"], nniq.BNReLU2d),
        (lambda: [nn.BatchNorm3d(4), nn.ReLU()], (2, 4, 5, 5, 5), ["0", "1"], nniq.BNReLU3d),
    ],
)
def test_fused_module(modules, shape, fused, cls):
    x = noise(*shape, seed=9)
    torch.manual_seed(1)
    model = eager(Wrapped(*modules()), x, [[f"body.{name}" for name in fused]])
    assert type(model.body[0]) is cls
    assert_reference(model, x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.add, self.mul, self.cat, self.add_relu, self.matmul = (nnq.FloatFunctional() for _ in range(5))

    def forward(self, x):
        x = self.quant(x)
        a = self.add.add(x, F.relu(x))
        b = self.mul.mul(a, self.mul.mul_scalar(x, -0.7))
        c = self.add_relu.add_relu(a, self.add.add_scalar(b, 1.3))
        return self.dequant(self.matmul.matmul(self.cat.cat([b, c], 1), c.transpose(1, 2)))


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_functional_modules(engine):
    x = noise(3, 5, 7, seed=9)
    reference = assert_reference(eager(Functional(), x), x, share=0.02)  # a sum of products may lie between two codes
    assert not list(reference.parameters())


FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.7),
    "clamp": lambda x: x.clamp(-0.3, 0.7),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool padded": lambda x: F.avg_pool2d(x, 2, padding=1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 4),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "reflect": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "parts": lambda x: x.chunk(2, 1)[1][:, 1:, ::2],
    "shape": lambda x: x.reshape(x.size(0), -1).unsqueeze(1).expand(-1, 3, -1).transpose(1, 2).contiguous(),
    "permute": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "shuffle": lambda x: F.pixel_shuffle(x, 2),
    "fill": lambda x: x.masked_fill(torch.arange(8) > 3, 0.2),
    "mean": lambda x: x.mean([2, 3]),
}
# Outputs that may be one code off.
SHARES = {"mean": 0.05}  # torch computes it in floats


@pytest.mark.parametrize("zero_point", [120, 3])
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_functions(engine, zero_point):
    class Functions(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.quantize, self.function = nnq.Quantize(0.0371, zero_point, torch.quint8), function

        def forward(self, x):
            return self.function(self.quantize(x)).dequantize()

    # As convolutions leave it: where channels are not last, torch rounds means half to an even code instead of an even step.
    x = 2 * noise(2, 8, 8, 8, seed=9).contiguous(memory_format=torch.channels_last)
    # qnnpack's clamp takes the elements of such a layout in the wrong order (torch 2.15).
    broken = {"relu6", "hardtanh", "clamp"} if engine == "qnnpack" else set()
    for name, function in ((n, f) for n, f in FUNCTIONS.items() if n not in broken):
        model = Functions(function)
        expected, found = model(x), float_reference(model)(x)
        off = steps_off(found, expected)
        assert off.max() <= 1, name
        assert (off > 0).float().mean() <= SHARES.get(name, 0), name


def test_in_place_functions_write():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant, self.ff = tq.QuantStub(), tq.DeQuantStub(), nnq.FloatFunctional()

        def forward(self, x):
            x = self.quant(x)
            F.relu(x, inplace=True)
            return self.dequant(self.ff.add(x, torch.relu_(x)))

    x = noise(4, 8, seed=9)
    assert_reference(eager(Residual(), x), x)


@pytest.mark.filterwarnings("ignore:Currently, qnnpack incorrectly ignores reduce_range:UserWarning")
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("factor", [1.0, 1e-6, 0.0])
def test_dynamic_linear(engine, factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 7, bias=False))
    dynamic = tq.quantize_dynamic(model, {nn.Linear})
    x = factor * noise(5, 40)
    reference = float_reference(dynamic)
    # Sums in another order, of values that are on the same grid.
    torch.testing.assert_close(reference(x), dynamic(x), rtol=1e-5, atol=1e-6)
    assert [name for name, p in reference.named_parameters() if isinstance(p, QTensorInt8)] == ["0.weight", "2.weight"]
    assert not torch.allclose(model(x), dynamic(x)) or not factor


@pytest.mark.filterwarnings("ignore:Currently, qnnpack incorrectly ignores reduce_range:UserWarning")
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_dynamic_linear_in_integers(engine, tmp_path):
    """Sums of codes, whose scale and zero point are computed of their own range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 7, bias=False))
    dynamic, path = tq.quantize_dynamic(model, {nn.Linear}), tmp_path / "m.nnef"
    report = quantize_and_verify(dynamic, noise(5, 3, 40), path, None, dynamic_axes={"input": {0: "B", 1: "S"}})
    assert report.arithmetic.integer_share == 1
    tract = TractModel.load(path)
    for factor in (1.0, 30.0, 1e-3, 0.0):
        x = factor * noise(2, 9, 40, seed=3) + factor / 2
        torch.testing.assert_close(torch.from_numpy(tract.run(x)["output"]), dynamic(x), rtol=1e-4, atol=1e-5)


def test_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6))
    model[0].qconfig = tq.float_qparams_weight_only_qconfig
    model = tq.convert(tq.prepare(model))
    indices = torch.arange(11)
    reference = float_reference(model)
    torch.testing.assert_close(reference(indices), model(indices), rtol=0, atol=1e-6)
    assert isinstance(reference.get_parameter("0.weight"), QTensorInt8)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, mode="sum", include_last_offset=True)
        self.bag.qconfig = tq.float_qparams_weight_only_qconfig

    def forward(self, indices, offsets):
        return self.bag(indices, offsets)


def test_bags_of_embeddings():
    model = tq.convert(tq.prepare(Bags()))
    args = torch.arange(11), torch.tensor([0, 4, 9, 11])
    torch.testing.assert_close(float_reference(model)(*args), model(*args), rtol=0, atol=1e-6)


def test_dynamic_f16():
    model = tq.quantize_dynamic(nn.Sequential(nn.Linear(40, 30)), {nn.Linear}, dtype=torch.float16)
    reference, x = float_reference(model), noise(5, 40)
    assert isinstance(reference.get_parameter("0.weight"), QTensorHalf)
    torch.testing.assert_close(reference(x), model(x), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.attention(x, x, x, need_weights=False)[0])


def test_attention():
    x = noise(2, 5, 16, seed=9)
    reference = assert_reference(eager(Attention(), x), x)
    names = {name for name, p in reference.named_parameters() if isinstance(p, QTensorInt8)}
    assert names == {f"attention.{name}.weight" for name in ("linear_Q", "linear_K", "linear_V", "out_proj")}


def test_classes_keep_their_names():
    reference = float_reference(eager(Wrapped(nn.Conv1d(4, 6, 3), nn.Hardswish()), noise(2, 4, 9)))
    assert [type(module).__name__ for module in reference.body] == ["Conv1d", "Hardswish"]


def test_untouched_models_are_given_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert float_reference(model) is model
    traced = torch.fx.symbolic_trace(model)
    assert float_reference(traced) is traced
    prepared = Functional()  # has stubs and FloatFunctional, but is not converted
    assert float_reference(prepared) is prepared


def test_observers_are_refused():
    model = Wrapped(nn.Linear(4, 4)).eval()
    model.qconfig = tq.get_default_qconfig("fbgemm")
    with pytest.raises(
        T2NErrorNotImplemented, match=r"`quant.activation_post_process` is an observer.* call `convert`"
    ):
        float_reference(tq.prepare(model))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_scripts_of_converted_models_are_refused(tmp_path):
    x = noise(5, 4)
    script = torch.jit.script(eager(Wrapped(nn.Linear(4, 4)), x))
    with pytest.raises(T2NErrorNotImplemented, match="export the model that was scripted"):
        quantize_and_verify(script, (x,), tmp_path / "net.nnef", method=None)


def test_in_tract_with_other_weights_in_q40(tmp_path):
    """Convolutions by torch.ao, a linear layer behind them by us: the archive computes what the converted model does."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
            self.conv, self.relu, self.head = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Linear(32, 32)
            self.head.qconfig = None

        def forward(self, x):
            y = F.adaptive_avg_pool2d(self.relu(self.conv(self.quant(x))), 1)
            return self.head(self.dequant(y).flatten(1))

    x = noise(4, 3, 8, 8, seed=9)
    model = eager(Mixed(), x, [["conv", "relu"]])
    for method in (None, "q40"):
        path = tmp_path / f"{method}.nnef"
        report = quantize_and_verify(model, (x,), path, method=method, dynamic_axes={"x": {0: "B"}})
        stored = {row.fqn: (row.storage, row.method) for row in report.rows if row.quantized}
        assert stored.pop("conv.weight") == ("int8", None)
        assert len(stored) == (method is not None)
    with pytest.raises(T2NErrorInvalidArgument, match="inplace=True"):
        quantize_and_verify(model, (x,), tmp_path / "inplace.nnef", inplace=True)


@pytest.mark.filterwarnings("ignore:The current implementation of the DynamicQuantizedConv1d:UserWarning")
@pytest.mark.parametrize(
    ("make", "path", "cls"),
    [
        (lambda: tq.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4)), {nn.LSTM}), "0", "LSTM"),
        (lambda: tq.quantize_dynamic(nn.Sequential(nn.GRU(4, 4)), {nn.GRU}), "0", "GRU"),
        (lambda: tq.quantize_dynamic(nn.Sequential(nn.LSTMCell(4, 4)), {nn.LSTMCell}), "0", "LSTMCell"),
        (lambda: nn.Sequential(nn.ReLU(), nnqd.Conv1d(4, 4, 3)), "1", "Conv1d"),
    ],
)
def test_refused_by_name(make, path, cls):
    with pytest.raises(T2NErrorNotImplemented, match=rf"`{path}` is a torch\.ao\.\S+\.{cls}\b.*leave it float"):
        float_reference(make())


def test_other_codes_are_refused():
    bags = Bags()
    bags.bag.qconfig = tq.float_qparams_weight_only_qconfig_4bit
    with pytest.raises(T2NErrorNotImplemented, match=r"module `bag`: weights in torch\.quint4x2"):
        float_reference(tq.convert(tq.prepare(bags)))
    with pytest.raises(T2NErrorNotImplemented, match=r"module `0`: activations in torch\.qint32"):
        float_reference(nn.Sequential(nnq.Quantize(0.1, 0, torch.qint32)))


def test_unknown_functions_are_refused():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantize = nnq.Quantize(0.1, 3, torch.quint8)

        def forward(self, x):
            return self.quantize(x).topk(2)[0].dequantize()

    with pytest.raises(T2NErrorNotImplemented, match=r"`topk` of a quantized tensor"):
        float_reference(Unknown())(noise(2, 4))


def test_quantized_outputs_are_refused():
    model = nn.Sequential(nnq.Quantize(0.1, 3, torch.quint8))
    with pytest.raises(T2NErrorNotImplemented, match="returns a quantized tensor"):
        float_reference(model)(noise(2, 4))
