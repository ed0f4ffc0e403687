"""Batch norms folded into 8-bit filters: the same function, one scale, and nothing changed when something fails."""

import pytest
import torch
from torch import nn

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.quantize.norms import Norm, folded


def net(bias=True, affine=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16, affine=affine), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
        if norm.affine:
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
    return model.eval()


def first_norm(bias=True, affine=True):
    return Norm(
        "0.weight", "0.bias" if bias else None, "1.weight" if affine else None, "1.running_mean", "1.running_var", 1e-5
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_changes_no_output(bias, affine):
    model, x = net(bias, affine), torch.randn(2, 3, 8, 8)
    before = model(x)
    with folded(model, [first_norm(bias, affine)]):
        pass
    # A few roundings to f32 of values of size one.
    torch.testing.assert_close(model(x), before, atol=2e-5, rtol=1e-5)
    slope = model[1].running_var.add(1e-5).rsqrt() * (model[1].weight if affine else 1)
    torch.testing.assert_close(slope, torch.ones(16))


def test_an_error_undoes_it():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), folded(model, [first_norm()]):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_one_scale_runs_in_the_kernel(bias, tmp_path):
    model, batches = net(bias), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "m.nnef"
    report = quantize_and_verify(
        model, batches[0], path, "int8_per_tensor", calibration=batches, dynamic_axes={"input": {0: "B"}}
    )
    assert report.ok
    assert report.arithmetic.integer_share == 1
    text = (path / "graph.nnef").read_text()
    # Both convolutions round in their kernels; the linear gives floats.
    assert text.count('output_dt = "i8"') == 2
    assert text.count("= t2n_rescale(") == 1
    assert (path / "graph.quant").read_text().count("\n") == 3
    assert all(output.snr_db > 25 for comparison in report.quantization for output in comparison.outputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_norm_of_what_others_read_stays(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    model, batches = Twice().eval(), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    before = model.norm.running_var.clone()
    report = quantize_and_verify(
        model, batches[0], tmp_path / "m.nnef", "int8_per_tensor", calibration=batches, inplace=True
    )
    assert report.ok
    assert torch.equal(model.norm.running_var, before)
