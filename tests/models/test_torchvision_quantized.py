"""Networks that torchvision converts itself, by eager mode: the archive gives the codes that torch's engine gives."""

import pytest
import torch
from torchvision.models import quantization as models

from torch_to_nnef import TractModel, quantize_and_verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*are deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams:UserWarning"),
]


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "googlenet"])
def test_codes_are_torchs(name, tmp_path):
    torch.manual_seed(0)
    options = {"init_weights": True} if name == "googlenet" else {}
    model = getattr(models, name)(quantize=True, **options).eval()
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "net.nnef"
    report = quantize_and_verify(model, (x,), path, method=None)
    assert {row.storage for row in report.rows} == {"int8"}
    expected = model(x)
    found = torch.from_numpy(TractModel.load(path).run(x.numpy())["output"])
    step = float(expected.unique().diff().min())
    off = ((found - expected) / step).abs().round()
    assert len(expected.unique()) > 50
    # Now and then a sum lies between two codes, which moves many of those behind it by one.
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.2
