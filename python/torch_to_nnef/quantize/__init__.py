"""Quantize a model's weights in place: what is asked for, what is legal, the methods, rows that say what happened."""

from torch_to_nnef.quantize.apply import quantize_
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.quantize.rows import TensorRow, record, recording, weight_error
from torch_to_nnef.quantize.targets import Selection, Use, q40_reason

__all__ = [
    "Selection",
    "TensorRow",
    "Use",
    "as_calibration",
    "q40_reason",
    "quantize_",
    "quantize_calibrated_",
    "record",
    "recording",
    "weight_error",
]
