"""ScriptModules of every make, as the model and inside one: the archive computes what they do, at other sizes too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_to_nnef import export_model_to_nnef, quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.graph.torchscript import eager
from torch_to_nnef.inference_target import TractNNEF

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Branches on shapes and flags, loops, lists, dicts, optional values, methods, functions: what scripting keeps."""

    def __init__(self, wide: bool = True):
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.register_buffer("scale", torch.full((32,), 0.5))
        self.wide = wide
        self.steps = 3

    def mix(self, x, bias: torch.Tensor | None = None):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 2 == 0:
                x = F.gelu(x)
        return x if bias is None else x + bias

    def forward(self, x):
        if x.dim() == 2:
            x = x.unsqueeze(0)
        y = self.norm(self.conv(x)).transpose(1, 2)
        parts: list[torch.Tensor] = []
        for i in range(self.steps):
            parts.append(y * float(i + 1))  # noqa: PERF401 - a loop is what is tested
        y = torch.stack(parts).sum(0)
        table = {"scale": self.scale}
        if self.wide and y.size(-1) == 32:  # noqa: SIM108
            y = self.mix(y, table["scale"])
        else:
            y = self.mix(y)
        half = y.shape[1] // 2
        return F.interpolate(y.transpose(1, 2), scale_factor=2.0), y[:, :half], torch.zeros(y.shape[0], 2) + y.mean()


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.first(x.transpose(1, 2)).transpose(1, 2))


MAKES = {
    "scripted": torch.jit.script,
    "traced": lambda module: torch.jit.trace(module, noise(2, 8, 6), check_trace=False),
    "frozen": lambda module: torch.jit.freeze(torch.jit.script(module)),
    "frozen trace": lambda module: torch.jit.freeze(torch.jit.trace(module, noise(2, 8, 6), check_trace=False)),
}
AXES = {0: "B", 2: "T"}


@pytest.fixture(params=sorted(MAKES))
def make(request):
    return MAKES[request.param]


def test_as_the_model(make, tmp_path):
    model = make(Block().eval())
    target = TractNNEF.latest(dynamic_axes={"x": AXES})
    export_model_to_nnef(model, noise(2, 8, 6), tmp_path / "m.nnef", target, input_names=["x"], compression_level=None)
    if list(model.parameters()):
        assert (tmp_path / "m.nnef" / "layers.0.weight.dat").exists()


def test_inside_an_eager_model_that_stays_as_it_was(make, tmp_path):
    model = Outer(make(Block().eval()))
    inner = model.inner
    target = TractNNEF.latest(dynamic_axes={"x": AXES})
    export_model_to_nnef(model, noise(2, 8, 6), tmp_path / "m.nnef", target, compression_level=None)
    assert model.inner is inner
    assert model.training


def test_in_q40(make, tmp_path):
    report = quantize_and_verify(
        make(Block().eval()), noise(2, 8, 6), tmp_path / "m.nnef", input_names=["x"], dynamic_axes={"x": AXES}
    )
    assert report.ok
    stored = {row.fqn.removesuffix("_fused_bn"): row.storage for row in report.rows}
    # The convolution has 8 * 3 values a filter: no whole group of 32.
    assert stored == {"conv.weight": "f32", "layers.0.weight": "q40", "layers.1.weight": "q40"}


def test_a_scripted_function_in_eager_code(tmp_path):
    @torch.jit.script
    def halves(x):
        middle = x.shape[1] // 2
        if x.shape[1] > 1:
            return x[:, :middle] * 2.0
        return x

    class Model(nn.Module):
        def forward(self, x):
            return halves(x) + 1.0

    target = TractNNEF.latest(dynamic_axes={"x": {0: "B"}})
    export_model_to_nnef(Model(), noise(2, 8), tmp_path / "m.nnef", target, compression_level=None)


def test_tied_weights_stay_tied():
    inner = nn.Linear(4, 4)
    model = torch.jit.script(nn.Sequential(inner, inner, nn.Linear(4, 4)))
    stand_in = eager(model)
    assert stand_in.get_parameter("0.weight") is stand_in.get_parameter("1.weight")
    assert copy.deepcopy(stand_in)(noise(2, 4)).equal(model(noise(2, 4)))


def test_a_model_without_scripts_is_itself():
    model = nn.Sequential(nn.Linear(2, 2))
    assert eager(model) is model


class Containers(nn.Module):
    """Values that are no tensors, and sizes computed with."""

    def forward(self, x, y: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for i, name in enumerate(["a", "b"]):
            found[name] = x + i
        if y is not None:
            found["y"] = y
        numbers: list[int] = [5, 1, 3]
        numbers.sort()
        numbers = [n * 2 for n in numbers[1:]] + [len(numbers)]
        assert x.dim() == 3, f"rank {x.dim()}"
        pieces = [x, x * 2, x * 3]
        shape = list(x.size()[2:])
        found["sum"] = torch.cat(pieces[1:] + pieces[:1], 1) * float(sum(numbers)) * (x.size(0) if shape[0] > 2 else 1)
        if "y" not in found and not torch.jit.is_scripting():
            found.pop("a")
        count = 0
        while count < x.size(1):
            found["b"] = found["b"] * 0.5 + x[:, count : count + 1]
            count += 1
        return found


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 8, batch_first=True)

    def forward(self, x):
        y, state = self.lstm(x)
        return self.gru(y)[0], state[1]


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
    )


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("model", "name", "x", "axes"),
    [
        (Containers, "x", noise(2, 4, 3), {0: "B"}),
        (Recurrent, "x", noise(2, 5, 8), {0: "B"}),
        (convolutions, "input", noise(2, 3, 8, 8), {0: "B", 2: "H"}),
        (encoder, "src", noise(2, 7, 32), {0: "B", 1: "T"}),
    ],
    ids=["containers", "recurrent", "convolutions", "encoder"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["scripted", "frozen"])
def test_models(model, name, x, axes, freeze, tmp_path):
    script = torch.jit.script(model().eval())
    target = TractNNEF.latest(dynamic_axes={name: axes})
    model = torch.jit.freeze(script) if freeze else script
    export_model_to_nnef(model, x, tmp_path / "m.nnef", target, compression_level=None)


class Decides(nn.Module):
    def forward(self, x):
        if bool(x.sum() > 0):
            return x
        return -x


def test_a_branch_on_a_value_is_refused_with_the_scripts_line(tmp_path):
    with pytest.raises(
        T2NErrorNotImplemented, match=r"(?s)test_torchscript.py:\d+ \(module `inner`\).*if bool\(x\.sum"
    ):
        export_model_to_nnef(
            Outer(torch.jit.script(Decides())), noise(2, 8, 6), tmp_path / "m.nnef", TractNNEF.latest()
        )


class Bounded(nn.Module):
    def forward(self, x):
        if x.shape[0] > 4:
            return x * 2
        return x + 1


def test_a_branch_on_a_size_is_asserted(tmp_path, caplog):
    target = TractNNEF.latest(dynamic_axes={"x": {0: "B"}})
    export_model_to_nnef(torch.jit.script(Bounded()), noise(2, 3), tmp_path / "m.nnef", target, compression_level=None)
    assert "extension tract_assert B <= 4;" in (tmp_path / "m.nnef" / "graph.nnef").read_text()
    assert "if x.shape[0] > 4:" in caplog.text


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x):
        self.state = self.state + x  # the line
        return self.state


def test_state_in_attributes_is_refused_with_its_line(tmp_path):
    with pytest.raises(
        T2NErrorNotImplemented, match=r"(?s)`state`.*test_torchscript.py:\d+.*self\.state = self\.state"
    ):
        export_model_to_nnef(torch.jit.script(Counter()), noise(4), tmp_path / "m.nnef", TractNNEF.latest())


def test_quantizing_in_place_is_refused(tmp_path):
    with pytest.raises(T2NErrorInvalidArgument, match="inplace"):
        quantize_and_verify(torch.jit.script(nn.Linear(32, 32)), noise(2, 32), tmp_path / "m.nnef", inplace=True)
