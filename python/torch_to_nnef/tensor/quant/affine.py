"""8-bit affine codes: `value = (code - zero_point) * scale`, as `torch.ops.quantized_decomposed` defines it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant.base import QScheme
from torch_to_nnef.torch_internals import quantized_decomposed

if TYPE_CHECKING:
    from typing_extensions import Self

RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
"""Codes that each dtype holds."""


@dataclass(frozen=True)
class QParams:
    """Meaning of the codes of an activation, one scale for the whole tensor.

    Attributes:
        scale: Step between two codes.
        zero_point: The code that means 0.
        dtype: `torch.int8` or `torch.uint8`.
        quant_min: Smallest code.
        quant_max: Largest code.

    Raises:
        T2NErrorInvalidArgument: No such codes: another dtype, codes it does not hold, a scale that is not positive and finite.

    """

    scale: float
    zero_point: int
    dtype: torch.dtype
    quant_min: int
    quant_max: int

    def __post_init__(self) -> None:
        low, high = RANGES.get(self.dtype, (0, -1))
        ordered = low <= self.quant_min <= self.zero_point <= self.quant_max <= high
        if not ordered or not 0 < self.scale < float("inf"):
            raise T2NErrorInvalidArgument(f"not the parameters of 8-bit codes: {self}")

    @classmethod
    def of_range(cls, low: float, high: float, dtype: torch.dtype) -> QParams:
        """Parameters under which all codes of `dtype` are used for [low, high], widened to hold 0, which is exact.

        Raises:
            T2NErrorImpossibleQuantization: A bound that is NaN or infinite.

        """
        quant_min, quant_max = RANGES[dtype]
        low, high = min(low, 0.0), max(high, 0.0)
        # Engines hold scales in f32.
        scale = float(torch.tensor((high - low) / (quant_max - quant_min), dtype=torch.float32))
        if not scale < float("inf"):
            raise T2NErrorImpossibleQuantization(f"values between {low} and {high} have no 8-bit scale")
        scale = scale if scale >= torch.finfo(torch.float32).tiny else 1.0
        zero_point = min(max(quant_min - round(low / scale), quant_min), quant_max)
        return cls(scale, zero_point, dtype, quant_min, quant_max)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (`dtype`) of `x` (any float dtype): round half to even, saturating."""
        codes: torch.Tensor = quantized_decomposed.quantize_per_tensor(x.to(torch.float32), *self._arguments())
        return codes

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Values (f32) of `codes` (`dtype`)."""
        values: torch.Tensor = quantized_decomposed.dequantize_per_tensor(codes, *self._arguments())
        return values

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the nearest values that have codes; shape and dtype are kept."""
        return self.dequantize(self.quantize(x)).to(x.dtype)

    def _arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        return self.scale, self.zero_point, self.quant_min, self.quant_max, self.dtype


@dataclass(frozen=True, eq=False)
class Affine8(QScheme):
    """Codes of 8 bits with one scale and zero point a tensor, or one for each index of an axis.

    Codes are kept as bytes (uint8); where `quant_min` is negative, those of int8.

    Attributes:
        scale: f32, `(1,)` or `(n,)`.
        zero_point: int32, or f32 for the tables of `torch.ao.nn.quantized.Embedding`; shape of `scale`.
        axis: Axis of the `n` scales; None if there is one.
        quant_min: Smallest code.
        quant_max: Largest code.
        input_qparams: Codes of what the weight is multiplied with; None if that stays float.

    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    axis: int | None
    quant_min: int
    quant_max: int
    input_qparams: QParams | None = None

    tensor_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return torch.int8 if self.quant_min < 0 else torch.uint8

    def along(self, parameter: torch.Tensor, rank: int) -> torch.Tensor:
        """`parameter` (`scale` or `zero_point`) in a shape that broadcasts over tensors of `rank` axes."""
        return parameter.reshape([-1 if axis == self.axis else 1 for axis in range(rank)])

    def quantize_as_u8(self, fp_tensor: torch.Tensor) -> torch.Tensor:
        """Codes (as bytes) of `fp_tensor`, in its shape.

        Raises:
            T2NErrorImpossibleQuantization: NaN or Inf.

        """
        if not bool(torch.isfinite(fp_tensor).all()):
            raise T2NErrorImpossibleQuantization(f"tensor of shape {tuple(fp_tensor.shape)} has NaN or infinite values")
        scale, zero_point = (self.along(p, fp_tensor.dim()) for p in (self.scale, self.zero_point))
        steps = fp_tensor.float() * (1.0 / scale)
        steps = (steps + zero_point).round() if zero_point.is_floating_point() else steps.round() + zero_point
        return steps.clamp(self.quant_min, self.quant_max).to(self.dtype).view(torch.uint8)

    def dequantize(self, u8_tensor: torch.Tensor, target_dtype: torch.dtype) -> torch.Tensor:
        """Values of the codes, rounded once from f32 to `target_dtype`."""
        scale, zero_point = (self.along(loaded(p), u8_tensor.dim()) for p in (self.scale, self.zero_point))
        codes = loaded(u8_tensor).view(self.dtype)
        return codes.float().sub_(zero_point).mul_(scale).to(target_dtype)

    def as_plain(self) -> dict[str, Any]:
        """As `QScheme.as_plain`."""
        qparams = self.input_qparams and {**asdict(self.input_qparams), "dtype": str(self.input_qparams.dtype)[6:]}
        return {**super().as_plain(), "input_qparams": qparams}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> Self:
        """As `QScheme.from_plain`."""
        qparams = state["input_qparams"]
        qparams = qparams and QParams(**{**qparams, "dtype": getattr(torch, qparams["dtype"])})
        return super().from_plain({**state, "input_qparams": qparams})
