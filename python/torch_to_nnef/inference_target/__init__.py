"""Inference targets: the options of an export and of its check. Importing this needs neither torch nor numpy."""

from torch_to_nnef.inference_target.base import InferenceTarget
from torch_to_nnef.inference_target.tract import Tolerance, TractCheckTolerance, TractNNEF

__all__ = ["InferenceTarget", "Tolerance", "TractCheckTolerance", "TractNNEF"]
