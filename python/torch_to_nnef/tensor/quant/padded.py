"""Q40 of a matrix whose rows are no multiple of 32: stored with zeros behind them, which its readers take away or multiply with zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization
from torch_to_nnef.tensor.quant.compressors import GROUP
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch_to_nnef.tensor.quant.base import QScheme
    from torch_to_nnef.tensor.quant.compressors import U8Compressor


def row_padding(width: int) -> int:
    """Zeros that make `width` a multiple of 32."""
    return -width % GROUP


class QTensorTractPadded(QTensorTractScaleOnly):
    """Q40 of a weight [N, K]: shape and values are those of the weight, planes and file have rows of the next multiple of 32.

    Raises:
        T2NErrorImpossibleQuantization: no matrix, or what `QTensorTractScaleOnly` raises for the padded one.

    """

    @classmethod
    def of(cls, packed: QTensorTractScaleOnly, width: int) -> QTensorTractPadded:
        """The first `width` columns of a packed matrix; shares its planes.

        Raises:
            T2NErrorImpossibleQuantization: Other columns than zeros would be left out.

        """
        if bool(packed.decompress()[:, width:].any()):
            raise T2NErrorImpossibleQuantization(f"`{packed.nnef_name}`: its padding is not packed as zeros")
        shape = (packed.shape[0], width)
        return cls.from_packed(
            packed.u8_blob, shape, packed.qscheme, packed.dtype, packed.u8_compressors, packed.nnef_name
        )

    @classmethod
    def encode(cls, fp_tensor: torch.Tensor, qscheme: QScheme, compressors: Sequence[U8Compressor]) -> torch.Tensor:
        """Blob of `fp_tensor`, padded, on the grid of `qscheme`."""
        if fp_tensor.dim() != 2:
            raise T2NErrorImpossibleQuantization(f"tensor of shape {tuple(fp_tensor.shape)}: only matrices are padded")
        return super().encode(padded(fp_tensor), qscheme, compressors)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file, whose rows are divided into groups."""
        rows, width = self.shape
        return rows, width + row_padding(width)

    @property
    def stored(self) -> QTensorTractScaleOnly:
        """The tensor in the file; it shares the planes."""
        return QTensorTractScaleOnly.from_packed(
            self.u8_blob, self.stored_shape, self.qscheme, self.dtype, self.u8_compressors, self.nnef_name
        )

    def decompress(self) -> torch.Tensor:
        """Float values: plain tensor in `dequant_to_dtype` and the logical shape."""
        return super().decompress()[:, : self.shape[1]].contiguous()

    def decompress_to_u8(self) -> torch.Tensor:
        """Codes (uint8) in the logical shape."""
        return self.stored.decompress_to_u8()[:, : self.shape[1]].contiguous()

    def decompress_slice(self, start: int, stop: int) -> torch.Tensor:
        """`decompress().flatten()[start:stop]`; rows do not begin where groups of the slice would, so all are read."""
        return self.decompress().reshape(-1)[start:stop]

    def squared_error(self, exact: torch.Tensor) -> tuple[float, float]:
        """As `QTensor.squared_error`; zeros add nothing."""
        return self.stored.squared_error(padded(exact))


def padded(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [N, K] with zeros up to the next multiple of 32."""
    return functional.pad(rows, (0, row_padding(rows.shape[-1])))
