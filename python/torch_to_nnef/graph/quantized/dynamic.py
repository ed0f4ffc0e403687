"""Dynamic quantization: inputs rounded to codes that their own range asks for, while the model runs."""

from __future__ import annotations

import torch

# Steps are not smaller than this.
_SMALLEST_STEP = 6.1e-5


def run_time(x: torch.Tensor, reduce_range: bool) -> torch.Tensor:
    """`x` rounded to the unsigned codes that its own range asks for, as `quantized::linear_dynamic` does.

    From `ChooseQuantizationParams` in aten/src/ATen/native/quantized/cpu/QuantUtils.h.
    """
    largest = 127 if reduce_range else 255
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = (high - low) / largest
    zero_point = torch.round(-low / torch.where(step > 0, step, 1.0))
    scale = step.clamp(min=_SMALLEST_STEP)
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, largest)
    return (codes - zero_point) * scale
