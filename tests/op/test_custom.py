"""Handlers from outside: operators and modules of the user's, where they are registered, and what goes wrong."""

import importlib
import sys
import textwrap

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import (
    T2NErrorConsistency,
    T2NErrorInvalidArgument,
    T2NErrorIOPytorchTractNotISO,
    T2NErrorMissingOpEmitter,
    T2NErrorNotImplemented,
    T2NErrorRuntime,
)
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.op import Ref, extensions, lowers, lowers_module
from torch_to_nnef.op.registry import OPS, OpTable, table

aten = torch.ops.aten


@torch.library.custom_op("t2n_tests::scaled_relu", mutates_args=())
def scaled_relu(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    return torch.relu(x) * scale


@scaled_relu.register_fake
def _(x, scale=2.0):
    return torch.empty_like(x)


@torch.library.custom_op("t2n_tests::halves", mutates_args=())
def halves(x: torch.Tensor) -> list[torch.Tensor]:
    return [part.clone() for part in x.split(x.shape[1] // 2, 1)]


@halves.register_fake
def _(x):
    return [torch.empty_like(part) for part in x.split(x.shape[1] // 2, 1)]


@torch.library.custom_op("t2n_tests::padded", mutates_args=())
def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.pad(x, (size, size))


@padded.register_fake
def _(x, size):
    return nn.functional.pad(x, (size, size))


@torch.library.custom_op("t2n_tests::unknown", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@unknown.register_fake
def _(x):
    return torch.empty_like(x)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def handlers():
    """What a test registers is gone behind it."""
    ops, modules = dict(table()._handlers), dict(OPS.modules)
    yield
    OPS._handlers, OPS.modules = ops, modules


@pytest.fixture
def export(tmp_path, handlers):
    def run(model, x, axes=None, **options):
        model = model if isinstance(model, nn.Module) else Call(model)
        target = TractNNEF.latest(dynamic_axes={"x": axes or {}})
        path = export_model_to_nnef(model, x, tmp_path / "m.nnef", target, compression_level=None, **options)
        return (path / "graph.nnef").read_text()

    return run


# -- operators


def test_a_custom_operator_with_a_handler_is_one_line(export):
    @lowers(torch.ops.t2n_tests.scaled_relu.default)
    def lower(e, x, scale=2.0):
        return e.binary("mul", e.op("relu", x), scale, x.dtype)

    text = export(lambda x: scaled_relu(x, 3.0) - scaled_relu(x), torch.randn(2, 5), {0: "B", 1: "S"})
    assert text.count("relu(") == 2
    assert "3.0" in text


def test_several_results_over_a_dynamic_axis(export):
    @lowers(torch.ops.t2n_tests.halves.default)
    def lower(e, x):
        half = e.node.outputs[0].shape[1]
        return [e.slice(x, 1, 0, half), e.slice(x, 1, half, half)]

    export(lambda x: halves(torch.cat([x, x], 1))[1], torch.randn(2, 4), {0: "B", 1: "S"})


def test_without_a_handler_the_report_says_how_to_write_one(export, tmp_path):
    with pytest.raises(T2NErrorMissingOpEmitter) as error:
        export(unknown, torch.randn(2))
    assert "t2n_tests.unknown.default (1 use)" in str(error.value)
    assert "@torch_to_nnef.op.lowers(torch.ops.t2n_tests.unknown.default)" in str(error.value)
    assert not any(tmp_path.iterdir())


def test_no_argument_of_a_custom_operator_is_ignored(export):
    lowers(torch.ops.t2n_tests.padded.default)(lambda e, x: x)
    with pytest.raises(T2NErrorNotImplemented, match="size=1"):
        export(lambda x: padded(x, 1), torch.randn(2, 5))


def test_a_handler_that_is_wrong_is_found_by_the_check(export):
    lowers(torch.ops.t2n_tests.scaled_relu.default)(lambda e, x, scale=2.0: e.op("relu", x))
    with pytest.raises(T2NErrorIOPytorchTractNotISO):
        export(scaled_relu, torch.randn(2, 5))


def test_a_handler_that_fails_is_named(export):
    @lowers(torch.ops.t2n_tests.scaled_relu.default)
    def broken(e, x, scale=2.0):
        return x.no_such_thing

    with pytest.raises(T2NErrorNotImplemented, match=r"broken failed: AttributeError.*no_such_thing") as error:
        export(scaled_relu, torch.randn(2, 5))
    assert isinstance(error.value.__cause__, AttributeError)


def test_a_handler_of_ours_is_replaced_when_asked(export):
    with pytest.raises(T2NErrorInvalidArgument, match="replace=True"):
        lowers(aten.relu.default)(lambda e, x: x)

    @lowers(aten.relu.default, replace=True)
    def relu(e, x):
        return e.op("max", x, 0.0)

    assert "max(x, 0.0)" in export(torch.relu, torch.randn(3))


@pytest.mark.parametrize(
    ("op", "message"),
    [(aten.add, "aten.add.Tensor"), ("aten::add", "is not an operator"), (scaled_relu, "is not an operator")],
)
def test_what_is_no_overload_is_refused(op, message):
    with pytest.raises(T2NErrorInvalidArgument, match=message):
        lowers(op)


# -- where handlers come from

SOURCE = """
import torch
from torch_to_nnef.op import lowers, lowers_module

@lowers(torch.ops.t2n_tests.{op}.default)
def lower(e, x):
    return e.op("{operator}", x)

def made():
    def lower(e, module, weights, x):
        return x
    return lower

class Same(torch.nn.Identity):
    pass

lowers_module(torch.nn.Dropout3d)(made())
"""


@pytest.fixture
def module(tmp_path_factory, monkeypatch, handlers):
    """A module on the path: `write(name, text)`."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)

    def write(name, text):
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return folder

    yield write
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_module_of_handlers_may_be_loaded_reloaded_and_loaded_anew(module, export):
    module("t2n_extra", SOURCE.format(op="unknown", operator="neg"))
    with pytest.raises(T2NErrorIOPytorchTractNotISO):
        export(unknown, torch.rand(2) + 1, load_extra_op_modules=["t2n_extra"])
    importlib.reload(sys.modules["t2n_extra"])
    del sys.modules["t2n_extra"]
    module(
        "t2n_extra",
        SOURCE.format(op="unknown", operator="t2n_expm1").replace(
            'e.op("t2n_expm1", x)', "e.binary('add', x, 1, x.dtype)"
        ),
    )
    export(unknown, torch.rand(2), load_extra_op_modules=["t2n_extra"])


def test_another_handler_of_the_same_name_in_one_import_is_refused(module):
    module("t2n_twice", SOURCE.format(op="unknown", operator="neg") * 2)
    with pytest.raises(
        T2NErrorInvalidArgument, match=r"importing 't2n_twice' failed.*has a handler already: t2n_twice.lower"
    ):
        extensions.load_modules(["t2n_twice"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t2n_absent", None, "'t2n_absent' does not exist"),
        ("t2n_needs", "import t2n_absent_too", "needs 't2n_absent_too', which is not installed"),
        ("t2n_broken", "1 / 0", "importing 't2n_broken' failed: ZeroDivisionError"),
        ("t2n_syntax", "def", "importing 't2n_syntax' failed: SyntaxError"),
    ],
)
def test_modules_that_cannot_be_loaded(module, name, text, message):
    if text is not None:
        module(name, text)
    with pytest.raises(T2NErrorInvalidArgument, match=message) as error:
        extensions.load_modules([name])
    assert error.value.__cause__ is not None


def test_one_name_is_not_a_list_of_letters():
    with pytest.raises(T2NErrorInvalidArgument, match="takes a list"):
        extensions.load_modules("t2n_extra")


def installed(folder, package, module):
    """A package with an entry point of ours."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torch_to_nnef.ops]\nhandlers = {module}\n")
    importlib.invalidate_caches()


@pytest.fixture
def anew():
    extensions.load_entry_points.cache_clear()
    yield
    extensions.load_entry_points.cache_clear()


def test_handlers_of_installed_packages_are_found(module, export, anew):
    folder = module("t2n_plugin", SOURCE.format(op="unknown", operator="neg"))
    installed(folder, "some-plugin", "t2n_plugin")
    assert torch.ops.t2n_tests.unknown.default in table()


def test_a_package_that_cannot_be_loaded_is_named(module, anew):
    folder = module("t2n_bad_plugin", "import t2n_absent")
    installed(folder, "bad-plugin", "t2n_bad_plugin")
    for _ in range(2):  # not forgotten after the first time
        with pytest.raises(T2NErrorRuntime, match=r"package 'bad-plugin'.*ModuleNotFoundError.*t2n_absent"):
            table()


# -- modules


class Block(nn.Module):
    def __init__(self, features=64):
        super().__init__()
        self.proj = nn.Linear(features, features, bias=False)
        self.unused = nn.Linear(features, features)
        self.scale = nn.Parameter(torch.rand(features))
        self.register_buffer("shift", torch.rand(features))

    def forward(self, x, mask=None, *, gain=1):
        y = (self.proj(x) * self.scale + self.shift) * gain
        if mask is not None:
            y = torch.where(mask, y, 0.0)
        return {"y": y, "none": None, "cat": torch.cat([x, y], 1), "gain": gain}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), nn.Sequential(Block())

    def forward(self, x):
        first = self.first(x)
        second = self.second[0](first["cat"], mask=first["cat"] > 0, gain=3)
        return second["y"] * second["gain"], self.first(x)["y"]


def lower_block(e, module, weights, x, mask=None, *, gain=1):
    y = e.op(
        "tract_core_einsum", [weights["proj.weight"], x], out=x.shape, dtype=x.dtype, expr="nk,bsk->bsn", acc="f32"
    )
    y = e.binary("add", e.binary("mul", y, weights["scale"], x.dtype), weights["shift"], x.dtype)
    y = e.binary("mul", y, gain, x.dtype)
    if mask is not None:
        y = e.op("select", mask, y, e.full(0.0, x.dtype), out=x.shape, dtype=x.dtype)
    batch, length, features = x.shape
    return [y, e.op("concat", [x, y], out=(batch, 2 * length, features), dtype=x.dtype, axis=1)]


AXES = {0: "B", 1: "S"}


def test_modules_are_kept_whole(export):
    lowers_module(Block)(lower_block)
    model = Net()
    text = export(model, torch.randn(2, 5, 64), AXES)
    assert text.count("tract_core_einsum") == 3  # one a call
    assert "unused" not in text
    assert "t2n_linear" not in text
    assert "forward" not in vars(model.first)


def test_the_model_itself_may_be_kept_whole(export):
    class Sum(Block):
        def forward(self, x):
            return Block.forward(self, x)["y"]

    lowers_module(Sum)(lambda e, module, weights, x: lower_block(e, module, weights, x)[0])
    assert export(Sum(), torch.randn(2, 5, 64), AXES).count("tract_core_einsum") == 1


def test_weights_are_packed_where_the_lowering_says_how_it_uses_them(tmp_path, handlers):
    lowers_module(Block, uses={"proj.*": "linear"})(lower_block)
    report = quantize_and_verify(Net(), torch.randn(2, 5, 64), tmp_path / "m.nnef", dynamic_axes={"x": AXES})
    packed = {row.fqn for row in report.rows if row.method == "q40"}
    assert packed == {"first.proj.weight", "second.0.proj.weight"}


def test_weights_stay_float_where_it_does_not(tmp_path, handlers):
    lowers_module(Block)(lower_block)
    report = quantize_and_verify(Net(), torch.randn(2, 5, 64), tmp_path / "m.nnef")
    assert {row.method for row in report.rows} == {None}


def test_a_use_that_is_not_true_is_refused(tmp_path, handlers):
    @lowers_module(Block, uses={"proj.*": "linear"})
    def lower(e, module, weights, x, mask=None, *, gain=1):
        weights["proj.weight"] = e.op("neg", e.op("neg", weights["proj.weight"]))
        return lower_block(e, module, weights, x, mask, gain=gain)

    with pytest.raises(T2NErrorConsistency, match=r"first\.proj\.weight.*no kernel"):
        quantize_and_verify(Net(), torch.randn(2, 5, 64), tmp_path / "m.nnef")


def test_a_wrong_lowering_of_packed_weights_is_located(tmp_path, handlers):
    @lowers_module(Block, uses={"proj.*": "linear"})
    def lower(e, module, weights, x, mask=None, *, gain=1):
        return lower_block(e, module, weights, x, mask)

    with pytest.raises(T2NErrorIOPytorchTractNotISO, match="first value that differs"):
        quantize_and_verify(Net(), torch.randn(2, 5, 64), tmp_path / "m.nnef")


def test_sizes_are_arguments_too(export):
    class Repeat(nn.Module):
        def forward(self, x, times):
            return x.unsqueeze(0).expand(times, *x.shape)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.repeat = Repeat()

        def forward(self, x):
            return self.repeat(x, x.shape[0] + 1)

    lowers_module(Repeat)(lambda e, module, weights, x, times: e.broadcast_to(x, (times, *x.shape)))
    export(Outer(), torch.randn(3, 2), {0: "B"})


@pytest.mark.parametrize(
    ("lower", "message"),
    [
        (lambda e, module, weights, x: x, "gives .* forward gives"),
        (lambda e, module, weights, x: [x, x], "gives .* forward gives"),
        (lambda e, module, weights, x: None, "gives .* forward gives"),
    ],
)
def test_results_that_are_not_those_of_forward(export, lower, message):
    class Wider(nn.Module):
        def forward(self, x):
            return torch.cat([x, x], 1)

    lowers_module(Wider)(lower)
    with pytest.raises(T2NErrorConsistency, match=message):
        export(Wider(), torch.randn(2, 3), AXES)


def test_what_cannot_be_kept_whole(export):
    class Writes(nn.Module):
        def forward(self, x):
            return x.add_(1)

    class Size(nn.Module):
        def forward(self, x):
            return x, x.shape[0]

    for cls, message in ((Writes, "writes into its arguments"), (Size, "returns a size")):
        lowers_module(cls)(lambda e, module, weights, x: x)
        with pytest.raises(T2NErrorNotImplemented, match=message):
            export(cls(), torch.randn(2, 3), AXES)


def test_only_the_class_itself_is_kept_whole(export):
    class Derived(Block):
        def forward(self, x):
            return self.proj(x)

    lowers_module(Block)(lower_block)
    assert "t2n_linear" not in export(Derived(), torch.randn(2, 5, 64), AXES)
    assert OPS.modules[Block].lower is lower_block


@pytest.mark.parametrize(
    ("classes", "uses", "message"),
    [
        ((torch.relu,), None, "is not a class of torch.nn.Module"),
        ((Block,), {"proj.weight": "linaer"}, "linaer"),
    ],
)
def test_registering_nonsense(classes, uses, message):
    with pytest.raises(T2NErrorInvalidArgument, match=message):
        lowers_module(*classes, uses=uses)


def test_a_second_lowering_of_a_class_is_refused():
    ops = OpTable()
    ops.lowers_module(Block)(lower_block)
    with pytest.raises(T2NErrorInvalidArgument, match="Block has a handler already"):
        ops.lowers_module(Block)(lambda e, module, weights, x: x)
    ops.lowers_module(Block, replace=True)(lambda e, module, weights, x: x)


def test_refs_are_public():
    assert Ref("x", (2,), torch.float32).rank == 1
