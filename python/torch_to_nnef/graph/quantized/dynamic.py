"""Dynamic quantization: inputs rounded to codes that their own range asks for, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_to_nnef.graph.integer_ops import dequantize_chosen
from torch_to_nnef.torch_internals import quantized_decomposed

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
    return _values(codes, scale, zero_point, 0)


def _values(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, low: int) -> torch.Tensor:
    values: torch.Tensor = dequantize_chosen(codes, scale, zero_point, low)
    return values


# -- what PT2E writes; here codes are held as floats until a product reads them.


def _choose(x: torch.Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    smallest, largest = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((largest - smallest) / (high - low)).clamp(min=eps)
    return scale, (low - torch.round(smallest / scale)).clamp(low, high)


def _choose_symmetric(
    x: torch.Tensor, low: int, high: int, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.abs().amax() / ((high - low) / 2)).clamp(min=eps)
    return scale, torch.full_like(scale, 128.0 if dtype == torch.uint8 else 0.0)


def _quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int, *_: Any
) -> torch.Tensor:
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, low, high)


def _dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    low: int,
    high: int,
    dtype: torch.dtype,
    **_: Any,
) -> torch.Tensor:
    return _values(codes, scale, zero_point, 0 if dtype == torch.uint8 else -128)


RUN_TIME: Mapping[Any, Callable[..., Any]] = {
    quantized_decomposed.choose_qparams.tensor: _choose,
    quantized_decomposed.choose_qparams_symmetric.tensor: _choose_symmetric,
    quantized_decomposed.quantize_per_tensor.tensor: _quantize,
    quantized_decomposed.dequantize_per_tensor.tensor: _dequantize,
}
