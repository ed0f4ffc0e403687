"""The rules of the op table."""

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.graph.ir import Node
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import OpTable, table

aten = torch.ops.aten


def test_a_second_handler_is_refused():
    ops = OpTable()
    ops.lowers(aten.relu.default)(lambda e, x: x)
    with pytest.raises(T2NErrorInvalidArgument, match=r"aten\.relu\.default has a handler"):
        ops.lowers(aten.relu.default)(lambda e, x: x)


def test_a_parameter_that_the_schema_does_not_have_is_refused():
    with pytest.raises(T2NErrorInvalidArgument, match="alhpa"):
        OpTable().lowers(aten.add.Tensor)(lambda e, x, other, alhpa=1: x)


def test_every_handler_is_documented():
    undocumented = [
        str(op) for op in table() if not table()[op].lower.__doc__ and table()[op].lower.__name__ != "lower"
    ]
    assert undocumented == []


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_what_a_handler_does_not_read_is_refused_never_ignored():
    ops = OpTable()
    ops.lowers(aten.gelu.default)(lambda e, x: x)
    node = Node("gelu", aten.gelu.default, (), {}, (), "model.act", "")
    assert ops.lower(None, node, ("x",), {"approximate": "none"}) == "x"
    with pytest.raises(T2NErrorNotImplemented, match=r"approximate='tanh' at model\.act"):
        ops.lower(None, node, ("x",), {"approximate": "tanh"})


def test_a_refused_operator_is_refused_with_all_arguments():
    ops = OpTable()
    ops.refuses([aten.gelu.default], "too smooth")
    with pytest.raises(T2NErrorInvalidArgument, match="has a handler"):
        ops.refuses([aten.gelu.default], "twice")
    node = Node("gelu", aten.gelu.default, (), {}, (), "model.act", "")
    emitter = Emitter(None, {}, None)
    emitter.node = node
    with pytest.raises(T2NErrorNotImplemented, match="too smooth"):
        ops.lower(emitter, node, ("x",), {"approximate": "tanh"})


def test_a_size_that_depends_on_the_data_is_refused(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match="depends on the data"):
        export_model_to_nnef(Call(lambda x: x[x > 0]), torch.randn(2, 4, 8), tmp_path / "m.nnef", TractNNEF.latest())
