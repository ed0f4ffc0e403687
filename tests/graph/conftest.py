"""Torch's engine for quantized tensors, put back after each test that chooses one."""

import pytest
import torch


@pytest.fixture
def engine(request):
    if getattr(request, "param", "") == "onednn" and not torch.cpu._is_vnni_supported():
        pytest.skip("without VNNI its sums of 8-bit products saturate at 16 bits")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = getattr(request, "param", "fbgemm")
    yield torch.backends.quantized.engine
    torch.backends.quantized.engine = before
