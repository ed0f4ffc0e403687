"""Tensors with more to them than values: quantized, named, replaced together."""

from torch_to_nnef.tensor.checkpoint import t2n_load_checkpoint_and_dispatch
from torch_to_nnef.tensor.named import NamedTensor, apply_name_to_tensor_in_module
from torch_to_nnef.tensor.offload import OffloadedTensor
from torch_to_nnef.tensor.quant import QScalePerGroupF16, QScheme, QTensor, U8Compressor
from torch_to_nnef.tensor.updater import ModTensorUpdater

__all__ = [
    "ModTensorUpdater",
    "NamedTensor",
    "OffloadedTensor",
    "QScalePerGroupF16",
    "QScheme",
    "QTensor",
    "U8Compressor",
    "apply_name_to_tensor_in_module",
    "t2n_load_checkpoint_and_dispatch",
]
