"""The contract of `export_model_to_nnef`: forms, names, determinism, errors, and the user's model left alone."""

import hashlib
import os

import pytest
import torch
from torch import nn

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.exceptions import (
    T2NErrorDynamicShapeValue,
    T2NErrorInvalidArgument,
    T2NErrorIOPytorchTractNotISO,
    T2NErrorIoQuantity,
    T2NErrorMissingOpEmitter,
    T2NErrorNotImplemented,
    T2NErrorRuntime,
)
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 8))


def export(model, args, path, axes=None, **options):
    return export_model_to_nnef(model, args, path, TractNNEF.latest(dynamic_axes=axes), **options)


@pytest.mark.parametrize(
    ("name", "level", "written"),
    [
        ("m.nnef", None, "m.nnef"),
        ("m.nnef", 0, "m.nnef.tar"),
        ("m.nnef", 9, "m.nnef.tgz"),
        ("m.nnef.tar", 0, "m.nnef.tar"),
        ("m.nnef.tgz", 0, "m.nnef.tgz"),
    ],
)
def test_suffix_and_level_choose_the_form(tmp_path, name, level, written):
    path = export(mlp(), torch.randn(2, 32), tmp_path / name, compression_level=level)
    assert path == tmp_path / written
    assert [p.name for p in tmp_path.iterdir()] == [written]
    assert (path / "graph.nnef").is_file() == (level is None)
    assert TractModel.load(path).run(torch.zeros(2, 32))["output"].shape == (2, 8)


@pytest.mark.parametrize(("name", "level"), [("m.tar", 0), ("m.onnx", None), ("m.nnef", 10), ("nnef", 0)])
def test_other_paths_are_refused(tmp_path, name, level):
    with pytest.raises(T2NErrorInvalidArgument):
        export(mlp(), torch.randn(2, 32), tmp_path / name, compression_level=level)
    assert not any(tmp_path.iterdir())


def test_graph_text_is_for_people(tmp_path):
    path = export(
        mlp(),
        torch.randn(2, 32),
        tmp_path / "m.nnef",
        {"features": {0: "B"}},
        input_names=["features"],
        output_names=["scores"],
        compression_level=None,
        custom_extensions=["tract_assert B >= 1"],
    )
    assert (path / "graph.nnef").read_text() == GRAPH
    assert sorted(p.name for p in path.iterdir()) == [
        "0.bias.dat",
        "0.weight.dat",
        "3.bias.dat",
        "3.weight.dat",
        "graph.nnef",
    ]


GRAPH = """version 1.0;

extension KHR_enable_fragment_definitions;
extension KHR_enable_operator_expressions;
extension tract_registry tract_core;
extension tract_symbol B;
extension tract_assert B >= 1;

fragment t2n_linear(filter: tensor<scalar>, x: tensor<scalar>, bias: tensor<scalar>, expr: string, lead: integer[]) -> (y: tensor<scalar>)
{
    y = tract_core_einsum([filter, x], expr = expr, acc = "f32") + unsqueeze(bias, axes = lead);
}

fragment tract_core_properties() -> (properties: (string, tensor<scalar>)[])
{
    properties = [("tract_target_version", "0.23.9")];
}

graph Sequential(features) -> (scores)
{
    features = external<scalar>(shape = [B, 32]);
    _0_bias = variable<scalar>(label = "0.bias", shape = [64]);
    _0_weight = variable<scalar>(label = "0.weight", shape = [64, 32]);
    _3_bias = variable<scalar>(label = "3.bias", shape = [8]);
    _3_weight = variable<scalar>(label = "3.weight", shape = [8, 64]);
    _0_linear = t2n_linear(_0_weight, features, _0_bias, expr = "nk,ak->an", lead = [0]);
    _1_relu = relu(_0_linear);
    scores = t2n_linear(_3_weight, _1_relu, _3_bias, expr = "nk,ak->an", lead = [0]);
}
"""


@pytest.mark.parametrize("scheme", ["raw", "natural_verbose", "natural_verbose_camel", "numeric"])
def test_every_naming_scheme_runs(tmp_path, scheme):
    export(mlp(), torch.randn(2, 32), tmp_path / "m.nnef.tar", nnef_variable_naming_scheme=scheme)


def test_equal_exports_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        export(mlp(), torch.randn(2, 32), tmp_path / f"{name}.nnef.tgz", {"input": {0: "B"}})
    digests = {hashlib.sha256((tmp_path / f"{name}.nnef.tgz").read_bytes()).hexdigest() for name in ("a", "b")}
    assert len(digests) == 1


@torch.library.custom_op("t2n_tests::first", mutates_args=())
def first(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("t2n_tests::second", mutates_args=())
def second(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


first.register_fake(torch.empty_like)
second.register_fake(torch.empty_like)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return second(first(self.inner(x)))


@pytest.mark.parametrize("model", [mlp(), Fails()], ids=["success", "error"])
def test_the_model_leaves_as_it_came(tmp_path, model):
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    modes = [m.training for m in model.modules()]
    size = 4 if isinstance(model, Fails) else 32
    try:
        export(model, torch.randn(2, size), tmp_path / "m.nnef")
    except T2NErrorMissingOpEmitter:
        assert isinstance(model, Fails)
    assert before == [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    assert modes == [m.training for m in model.modules()]


def test_all_missing_ops_are_listed_with_their_modules(tmp_path):
    with pytest.raises(T2NErrorMissingOpEmitter) as error:
        export(nn.Sequential(Fails(), Fails()), torch.randn(2, 4), tmp_path / "m.nnef")
    text = str(error.value)
    assert "t2n_tests.first" in text
    assert "t2n_tests.second" in text
    assert "2 uses" in text
    assert "0, 1" in text
    assert not any(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_archive(tmp_path):
    path = export(mlp(), torch.randn(2, 32), tmp_path / "m.nnef.tar")
    before = path.read_bytes()
    with pytest.raises(T2NErrorNotImplemented):
        export(Fails(), torch.randn(2, 4), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"input_names": ["a", "b"]}, T2NErrorIoQuantity),
        ({"output_names": []}, T2NErrorIoQuantity),
        ({"input_names": ["a.b"]}, T2NErrorInvalidArgument),
        ({"input_names": ["graph"]}, T2NErrorInvalidArgument),
        ({"input_names": ["info"]}, T2NErrorInvalidArgument),
        ({"output_names": ["true_scores"]}, T2NErrorInvalidArgument),
        ({"input_names": ["same"], "output_names": ["same"]}, T2NErrorInvalidArgument),
        ({"nnef_variable_naming_scheme": "pretty"}, T2NErrorInvalidArgument),
        ({"axes": {"nobody": {0: "B"}}}, T2NErrorDynamicShapeValue),
        ({"axes": {"input": {2: "B"}}}, T2NErrorDynamicShapeValue),
        ({"axes": {"input": {-3: "B"}}}, T2NErrorDynamicShapeValue),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, options, error):
    with pytest.raises(error):
        export(mlp(), torch.randn(2, 32), tmp_path / "m.nnef", **options)
    assert not any(tmp_path.iterdir())


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def test_names_may_be_too_few_or_too_many_when_allowed(tmp_path):
    options = {"check_io_names_qte_match": False, "input_names": ["first"], "output_names": ["y", "z", "rest"]}
    path = export(Sum(), (torch.randn(2, 3), torch.randn(2, 3)), tmp_path / "m.nnef", **options)
    archive = TractModel.load(path)
    assert [fact.name for fact in archive.inputs] == ["first", "b"]
    assert [fact.name for fact in archive.outputs] == ["y"]


def test_a_dimension_that_the_model_fixes_is_reported(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match="fixed a dimension"):
        export(mlp(), torch.randn(2, 32), tmp_path / "m.nnef", {"input": {1: "F"}})


def test_a_sample_of_size_one_is_traced_as_dynamic(tmp_path):
    path = export(mlp(), torch.randn(1, 32), tmp_path / "m.nnef", {"input": {-2: "B"}})
    assert TractModel.load(path).run(torch.zeros(7, 32))["output"].shape == (7, 8)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_data_dependent_control_flow_gets_a_hint(tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=r"torch\.where"):
        export(Branches(), torch.randn(2, 3), tmp_path / "m.nnef")


class Nested(nn.Module):
    def forward(self, pair, *, scale):
        first, second = pair["a"], pair["b"]
        return {"sum": first + second, "product": first * scale}, first


def test_nested_inputs_and_outputs(tmp_path):
    args = {"pair": {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}, "scale": torch.randn(3)}
    path = export(Nested(), args, tmp_path / "m.nnef", {"pair_a": {0: "B"}, "pair_b": {0: "B"}})
    model = TractModel.load(path)
    assert [fact.name for fact in model.inputs] == ["pair_a", "pair_b", "scale"]
    assert [fact.name for fact in model.outputs] == ["output_0", "output_1", "output_2"]


class PassThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = x + 1
        return x, self.weight, y, y


def test_inputs_weights_and_repeated_values_as_outputs(tmp_path):
    path = export(PassThrough(), torch.randn(2, 3), tmp_path / "m.nnef", {"x": {0: "B"}})
    outputs = TractModel.load(path).run(torch.zeros(1, 3))
    assert (outputs["output_2"] == outputs["output_3"]).all()


def test_an_input_may_keep_its_name_as_output_when_allowed(tmp_path):
    names = {"input_names": ["x"], "output_names": ["x", "w", "y", "z"], "allow_same_io_names": True}
    path = export(PassThrough(), torch.randn(2, 3), tmp_path / "m.nnef", **names)
    assert [fact.name for fact in TractModel.load(path).outputs] == ["x", "w", "y", "z"]


def test_tied_weights_are_written_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 32)
            self.head = nn.Linear(32, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    path = export(Tied(), torch.tensor([[1, 2]]), tmp_path / "m.nnef", {"ids": {1: "S"}}, compression_level=None)
    assert [p.name for p in path.glob("*.dat")] == ["embedding.weight.dat"]


class Wrong(nn.Module):
    """A module that computes something else while it is captured."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) + (0.0 if torch.compiler.is_exporting() else 10.0)


def test_a_mismatch_names_output_index_and_values_and_writes_nothing(tmp_path):
    with pytest.raises(T2NErrorIOPytorchTractNotISO, match="output") as error:
        export(Wrong(), torch.randn(2, 4), tmp_path / "m.nnef", debug_bundle_path=tmp_path / "bundle")
    assert "every value in between" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert {"error.txt", "inputs_0.npz", "torch_0.npz", "tract_0.npz", "m.nnef.tar"} == {
        p.name for p in (tmp_path / "bundle").iterdir()
    }


class Unseen(nn.Module):
    def forward(self, x):
        raise AssertionError("captured in vain")


@pytest.mark.parametrize(
    ("name", "there", "error"),
    [
        ("m.nnef", "m.nnef/thesis.tex", r"holds more than an archive \(thesis.tex\)"),
        ("m.nnef", "m.nnef/graph.nnef m.nnef/a/w.dat m.nnef/a/notes", r"\(a/notes\)"),
        ("m.nnef", "m.nnef/graph.nnef m.nnef/link", r"\(link\)"),
        ("m.nnef", "m.nnef", "is not a folder"),
        ("m.nnef.tgz", "m.nnef.tgz/x", "is not a file"),
    ],
)
def test_what_is_no_archive_is_not_replaced_and_that_is_said_at_once(tmp_path, name, there, error):
    for path in there.split():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(tmp_path) if path.endswith("link") else (tmp_path / path).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(T2NErrorInvalidArgument, match=error):
        export(Unseen(), torch.ones(1), tmp_path / name, compression_level=None)
    with pytest.raises(T2NErrorInvalidArgument, match=error):
        quantize_and_verify(Unseen(), torch.ones(1), tmp_path / name, method=None, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    path = tmp_path / "m.nnef.tar"
    os.mkfifo(path)
    with pytest.raises(T2NErrorInvalidArgument, match="is not a file"):
        export(mlp(), torch.randn(2, 32), path)
    assert path.is_fifo()


def test_a_link_to_an_archive_that_is_a_folder_is_not_replaced(tmp_path):
    there = export(mlp(), torch.randn(2, 32), tmp_path / "m.nnef", compression_level=None)
    (tmp_path / "link.nnef").symlink_to(there)
    with pytest.raises(T2NErrorInvalidArgument, match="is not a folder"):
        export(Unseen(), torch.ones(1), tmp_path / "link.nnef", compression_level=None)


def test_a_name_the_system_does_not_take_is_said_at_once(tmp_path):
    with pytest.raises(T2NErrorRuntime, match="too long"):
        export(Unseen(), torch.ones(1), tmp_path / f"{'m' * 300}.nnef")


class WrongFile(Wrong):
    """Its input has a name that `numpy.savez` takes for itself."""

    def forward(self, file):
        return super().forward(file)


@pytest.mark.parametrize("there", ["", "bundle", "bundle/error.txt bundle/mine.txt"])
def test_what_becomes_of_the_bundle_does_not_hide_why_it_is_written(tmp_path, there):
    for path in there.split():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    with pytest.raises(T2NErrorIOPytorchTractNotISO):
        export(WrongFile(), torch.randn(2, 4), tmp_path / "m.nnef", debug_bundle_path=tmp_path / "bundle")
    assert (tmp_path / "bundle/inputs_0.npz").exists() == (not there)
    assert all((tmp_path / path).read_text() == "mine" for path in there.split())


def test_an_archive_property_says_the_tract_version_and_what_the_user_adds(tmp_path):
    target = TractNNEF.latest(specific_properties={"owner": 'a "quoted" name'})
    path = export_model_to_nnef(mlp(), torch.randn(2, 32), tmp_path / "m.nnef", target)
    properties = TractModel.load(path).properties
    assert (properties["tract_target_version"], properties["owner"]) == ("0.23.9", 'a "quoted" name')


class Misread(nn.Module):
    """Module names that tract would take for literals."""

    def __init__(self):
        super().__init__()
        self.inflow, self.true_mask, self.falsework = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.falsework(self.true_mask(self.inflow(x)))


@pytest.mark.parametrize("scheme", ["natural_verbose", "natural_verbose_camel"])
def test_module_names_that_start_like_a_literal(tmp_path, scheme):
    export(Misread(), torch.randn(2, 4), tmp_path / "m.nnef", nnef_variable_naming_scheme=scheme)


def encoder(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4), nn.Softmax(-1)).to(dtype)


def test_half_precision(tmp_path):
    path = export(encoder(torch.float16), torch.randn(2, 32).half(), tmp_path / "m.nnef", {"input": {0: "B"}})
    assert TractModel.load(path).outputs[0].dtype == "float16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_tract_does_not_compute_in_are_refused(tmp_path, dtype):
    with pytest.raises(T2NErrorNotImplemented, match=r"model\.float\(\)"):
        export(encoder(dtype), torch.randn(2, 32).to(dtype), tmp_path / "m.nnef")
    assert not any(tmp_path.iterdir())
