"""The rules of the op table."""

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF
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


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.to(torch.int64) // 2, "rounded division of integers"),
        (lambda x: nn.functional.pad(x, (1, 1), mode="circular"), "circular"),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "dropout"),
    ],
)
def test_what_a_handler_does_not_read_is_refused_never_ignored(function, message, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=message):
        export_model_to_nnef(Call(function), torch.randn(2, 4, 8), tmp_path / "m.nnef", TractNNEF.latest())
    assert not any(tmp_path.iterdir())


def test_a_size_that_depends_on_the_data_is_refused(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match="depends on the data"):
        export_model_to_nnef(Call(lambda x: x[x > 0]), torch.randn(2, 4, 8), tmp_path / "m.nnef", TractNNEF.latest())
