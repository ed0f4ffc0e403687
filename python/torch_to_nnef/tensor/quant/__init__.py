"""Quantized tensors: `QTensor` and its schemes, lossless codecs, Q40 for tract, 8-bit codes, safetensors files."""

import torch as _torch

from torch_to_nnef.tensor.quant.affine import Affine8, QParams
from torch_to_nnef.tensor.quant.base import QScalePerGroupF16, QScheme, QTensor, _build, stored_nbytes
from torch_to_nnef.tensor.quant.compressors import BitPacking, Huffman, Lzma, NibblePacking, U8Compressor
from torch_to_nnef.tensor.quant.half import F16, QTensorHalf, as_half
from torch_to_nnef.tensor.quant.int8 import QTensorInt8, quantize_int8
from torch_to_nnef.tensor.quant.padded import QTensorTractPadded
from torch_to_nnef.tensor.quant.qtract import (
    QTensorTract,
    QTensorTractScaleOnly,
    QTensorTractTransposed,
    fp_to_tract_q4_0_with_min_max_calibration,
    q40_shape_reason,
    qscale_per_group_f16_min_max_calibration,
    quantize_q40,
)
from torch_to_nnef.tensor.quant.serialize import load_safetensors, save_safetensors

__all__ = [
    "F16",
    "Affine8",
    "BitPacking",
    "Huffman",
    "Lzma",
    "NibblePacking",
    "QParams",
    "QScalePerGroupF16",
    "QScheme",
    "QTensor",
    "QTensorHalf",
    "QTensorInt8",
    "QTensorTract",
    "QTensorTractPadded",
    "QTensorTractScaleOnly",
    "QTensorTractTransposed",
    "U8Compressor",
    "as_half",
    "fp_to_tract_q4_0_with_min_max_calibration",
    "load_safetensors",
    "q40_shape_reason",
    "qscale_per_group_f16_min_max_calibration",
    "quantize_int8",
    "quantize_q40",
    "save_safetensors",
    "stored_nbytes",
]

# `torch.load(weights_only=True)`, torch's default, builds only classes on a list. These rebuild from bytes alone and
# check sizes; without them no checkpoint of a quantized model could be read. The list is only added to.
_torch.serialization.add_safe_globals(
    [
        _build,
        QTensor,
        QTensorTractScaleOnly,
        QTensorTractTransposed,
        QTensorTractPadded,
        QTensorHalf,
        QTensorInt8,
        F16,
        Affine8,
        QParams,
        QScalePerGroupF16,
        NibblePacking,
        BitPacking,
        Lzma,
        Huffman,
    ]
)
