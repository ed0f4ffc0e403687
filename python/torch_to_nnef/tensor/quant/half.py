"""A weight kept in f16 in a model that computes in another dtype: 2 bytes a weight, no codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInconsistentTensor
from torch_to_nnef.tensor.quant.base import QScheme, QTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch_to_nnef.tensor.quant.compressors import U8Compressor

WIDE = (torch.float32, torch.float64)
"""Dtypes of weights that f16 makes smaller."""


@dataclass(frozen=True)
class F16(QScheme):
    """Codes are the two bytes of each value rounded to f16, half to even."""

    def quantize_as_u8(self, fp_tensor: torch.Tensor) -> torch.Tensor:
        """Bytes (uint8), two for each value: one axis more than `fp_tensor`."""
        return fp_tensor.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)

    def dequantize(self, u8_tensor: torch.Tensor, target_dtype: torch.dtype) -> torch.Tensor:
        """Values of the bytes (..., 2), as `target_dtype`."""
        return u8_tensor.contiguous().view(torch.float16).squeeze(-1).to(target_dtype)


class QTensorHalf(QTensor):
    """Values rounded to f16. In an archive it is a plain f16 tensor, cast to the dtype of the model where tract loads it.

    Raises:
        T2NErrorImpossibleQuantization: A value beyond the range of f16, or NaN.

    """

    storage_name = "f16"

    @classmethod
    def encode(cls, fp_tensor: torch.Tensor, qscheme: QScheme, compressors: Sequence[U8Compressor]) -> torch.Tensor:
        """Blob of `fp_tensor`."""
        if not bool(torch.isfinite(fp_tensor.to(torch.float16)).all()):
            raise T2NErrorImpossibleQuantization(
                f"tensor of shape {tuple(fp_tensor.shape)}: it has values beyond the range of f16 (65504), or NaN"
            )
        return super().encode(fp_tensor, qscheme, compressors)

    def check_layout(self) -> None:
        """Raise `T2NErrorInconsistentTensor` unless there are two bytes for each value."""
        super().check_layout()
        if not isinstance(self.qscheme, F16) or (not self.u8_compressors and self.u8_blob.numel() != 2 * self.numel()):
            raise T2NErrorInconsistentTensor(f"{self.u8_blob.numel()} bytes are not f16 of shape {tuple(self.shape)}")

    def decompress_to_u8(self) -> torch.Tensor:
        """Bytes (uint8) in the logical shape, with an axis of two more."""
        blob = self.u8_blob
        for compressor in reversed(self.u8_compressors):
            blob = compressor.decompress(blob)
        return blob.reshape(*self.shape, 2)

    def halves(self) -> torch.Tensor:
        """The values, a plain f16 tensor."""
        return self.qscheme.dequantize(self.decompress_to_u8(), torch.float16)


def as_half(weight: torch.Tensor, name: str = "") -> QTensorHalf:
    """`weight` in f16, shown and computed with in its own dtype."""
    half = QTensorHalf(weight, F16(), weight.dtype)
    half.nnef_name = name or None
    return half
