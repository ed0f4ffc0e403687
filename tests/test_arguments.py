"""Arguments of the wrong kind, from the outside: an error of ours that names the argument, nothing written, the model as it was."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from torch_to_nnef import TractModel, TractNNEF, export_model_to_nnef, isolated, quantize_and_verify, sensitivity
from torch_to_nnef.compress import DEFAULT_COMPRESSION, Choice, dynamic_load_registry
from torch_to_nnef.exceptions import (
    T2NErrorDynamicShapeValue,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotImplemented,
)
from torch_to_nnef.export_tensors import export_tensors_from_disk_to_nnef, export_tensors_to_nnef
from torch_to_nnef.quantize import quantize_
from torch_to_nnef.tensor.quant import quantize_q40

X = torch.ones(2, 32)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU())


def export(model, path, *, args=X, target=None, **options):
    return export_model_to_nnef(model, args, path / "m.nnef", target or TractNNEF(), **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": None}, "model"),
        ({"model": torch.relu}, "model"),
        ({"model": nn.Linear}, "model"),
        ({"args": None}, "args"),
        ({"args": 3}, "args"),
        ({"args": X.numpy()}, "args"),
        ({"args": (X, None)}, "argument 1"),
        ({"target": "tract"}, "inference_target"),
        ({"target": TractNNEF}, "inference_target"),
        ({"input_names": "a"}, "input_names"),
        ({"input_names": {"a"}}, "input_names"),
        ({"input_names": (name for name in "a")}, "input_names"),
        ({"output_names": [1]}, "output_names"),
        ({"output_names": [b"a"]}, "output_names"),
        ({"custom_extensions": "tract_assert B <= 3"}, "custom_extensions"),
        ({"custom_extensions": [3]}, "custom_extensions"),
        ({"compression_level": "1"}, "compression_level"),
        ({"compression_level": 1.5}, "compression_level"),
        ({"log_level": None}, "log_level"),
        ({"log_level": "LOUD"}, "log_level"),
    ],
)
def test_export_says_which_argument(model, tmp_path, options, named):
    with pytest.raises(T2NErrorInvalidArgument, match=f"^{named}"):
        export(**{"model": model, "path": tmp_path, **options})
    assert not any(tmp_path.iterdir())


def test_inputs_are_dense(model, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=r"^argument 0 .* torch\.sparse_coo; .*to_dense"):
        export(model, tmp_path, args=X.to_sparse())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": lambda model: None}, "a method"),
        ({"method": 3}, "no quantization method 3"),
        ({"registry": None}, "registry"),
        ({"registry": ["q40"]}, "registry"),
        ({"registry": {"q40": 3}}, "method"),
        ({"overrides": [("0*", "f16")]}, "overrides"),
        ({"overrides": {3: "f16"}}, "a filter"),
        ({"include": 3}, "a filter"),
        ({"exclude": True}, "a filter"),
        ({"include": (glob for glob in ["1*", "0*"])}, "a filter"),  # it could be asked of the first weight only
        ({"target_bpw": "5"}, "target_bpw"),
        ({"progress": 3}, "progress"),
        ({"method": "q40_gptq", "calibration_cache": 3}, "calibration_cache"),
        ({"method": "q40_gptq", "calibration": ["a text"], "tokenizer": 3}, "tokenizer"),
        ({"dynamic_axes": "B"}, "dynamic_axes"),
        ({"dynamic_axes": [("input", {0: "B"})]}, "dynamic_axes"),
    ],
)
def test_quantize_and_verify_says_which_argument(model, tmp_path, options, named):
    before = dict(model.named_parameters())
    with pytest.raises(T2NErrorInvalidArgument, match=f"^{named}"):
        quantize_and_verify(model, X, tmp_path / "m.nnef", **options)
    assert not any(tmp_path.iterdir())
    assert all(now is before[name] for name, now in model.named_parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda path: export_model_to_nnef(nn.ReLU(), X, None, TractNNEF()),
        lambda path: export_model_to_nnef(nn.ReLU(), X, bytes(path / "m.nnef"), TractNNEF()),
        lambda path: quantize_and_verify(nn.ReLU(), X, 3),
        lambda path: sensitivity(None, [X]),
        lambda path: sensitivity(nn.Linear(32, 32), [X], measure="kld"),
        lambda path: Choice("q40", {"q40": None}),
        lambda path: dynamic_load_registry(None),
        lambda path: DEFAULT_COMPRESSION["q40"](None),
        lambda path: DEFAULT_COMPRESSION["min_max_q4_0"](nn.ReLU(), to_quantize_module_classes=nn.Linear),
        lambda path: DEFAULT_COMPRESSION["min_max_q4_0"](nn.ReLU(), to_quantize_module_classes=["Linear"]),
        lambda path: export_tensors_to_nnef([X], path),
        lambda path: export_tensors_to_nnef({"x": X}, None),
        lambda path: export_tensors_to_nnef({"x": torch.nested.nested_tensor([X, X], layout=torch.jagged)}, path),
        lambda path: export_tensors_from_disk_to_nnef(None, path),
        lambda path: export_tensors_from_disk_to_nnef(path / "x.pt", path, "x*"),
        lambda path: TractModel.load(None),
        lambda path: TractModel.load(bytes(path)),
        lambda path: TractModel.load_bytes("m.nnef"),
        lambda path: isolated.inspect(None),
        lambda path: isolated.run(path, [X]),
        lambda path: isolated.verify(path, sizes={"B": "8"}),
    ],
)
def test_other_calls_say_so_too(tmp_path, call):
    torch.save({"x": X}, tmp_path / "x.pt")
    with pytest.raises(T2NErrorInvalidArgument):
        call(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: TractModel.load(model, outputs="output"),
        lambda model: TractModel.load(model, threads=1_000_000),
        lambda model: TractModel.load(model).session(None),
        lambda model: TractModel.load(model).session({"input": 3}),
        lambda model: TractModel.load(model).run(X.to_sparse()),
        lambda model: TractModel.load(model).run(X.to("meta")),
        lambda model: isolated.verify(model, sizes={"Batch": 8}),
    ],
)
def test_calls_of_an_archive_say_so_too(tmp_path, call):
    path = export(nn.ReLU(), tmp_path, target=TractNNEF(dynamic_axes={"input": {0: "B"}}))
    with pytest.raises(T2NErrorInvalidArgument):
        call(path)


def test_one_file_of_arrays_needs_no_list(tmp_path):
    np.savez(tmp_path / "in.npz", input=X.numpy())
    assert isolated.verify(export(nn.ReLU(), tmp_path), tmp_path / "in.npz")["given"] == ["input"]


@pytest.mark.parametrize(
    ("model", "args", "error"),
    [
        (Calls(lambda x: None), X, T2NErrorNotImplemented),
        (Calls(lambda x: x + 1), X.bfloat16(), T2NErrorNotImplemented),
        (nn.Linear(32, 32, device="meta"), X, T2NErrorInvalidArgument),
    ],
    ids=["no output", "bfloat16", "no weights"],
)
def test_models_without_values_for_an_archive(tmp_path, model, args, error):
    with pytest.raises(error):
        export(model, tmp_path, args=args)
    with pytest.raises(error):
        quantize_and_verify(model, args, tmp_path / "m.nnef")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("names", [(["a", "b"], ["b", "a"]), (["a", "b"], ["c", "a"])])
def test_an_output_is_not_called_as_an_input_that_it_is_not(tmp_path, names):
    inputs, outputs = names
    options = {"input_names": inputs, "output_names": outputs, "allow_same_io_names": True}
    with pytest.raises(T2NErrorInvalidArgument, match=re.escape("has the name of an input")):
        export(Calls(lambda a, b: (a, b)), tmp_path, args=(X, X + 1), **options)


@pytest.mark.parametrize("axes", [{0: "B", -2: "C"}, {0: "inflow"}, {0: "true_rows"}])
def test_axes_that_tract_could_not_read_or_that_are_named_twice(model, tmp_path, axes):
    with pytest.raises(T2NErrorDynamicShapeValue):
        export(model, tmp_path, target=TractNNEF(dynamic_axes={"input": axes}))


def test_axes_of_the_call_are_added_to_those_of_the_target(tmp_path):
    path = tmp_path / "m.nnef"
    quantize_and_verify(
        nn.ReLU(),
        X,
        path,
        inference_target=TractNNEF(dynamic_axes={"input": {0: "B"}}),
        dynamic_axes={"input": {1: "S"}},
    )
    assert TractModel.load(path).inputs[0].shape == ("B", "S")


@pytest.mark.parametrize("made", [None, X, quantize_q40(torch.ones(32, 64))], ids=["nothing", "float", "other shape"])
def test_an_encoder_must_return_the_weight_packed(model, made):
    before = dict(model.named_parameters())
    with pytest.raises(T2NErrorInconsistentTensor, match=re.escape("`0.weight`")):
        quantize_(model, lambda weight, name: made, method="mine")
    assert all(now is before[name] for name, now in model.named_parameters())


def test_tensors_with_the_negative_bit_are_written(tmp_path):
    imaginary = torch.complex(X, X).conj().imag
    assert imaginary.is_neg()
    [path] = export_tensors_to_nnef({"x": imaginary}, tmp_path)
    assert np.fromfile(path, np.float32)[-1] == -1
