"""Verification: the same inputs through torch and through tract, at several sizes, compared within a tolerance."""

from torch_to_nnef.verify.compare import Comparison, OutputComparison, compare
from torch_to_nnef.verify.localize import Candidate, Divergence, first_divergence
from torch_to_nnef.verify.resize import InputSet, resized_input_sets
from torch_to_nnef.verify.run import compare_models, raise_on_mismatch, verify_archive

__all__ = [
    "Candidate",
    "Comparison",
    "Divergence",
    "InputSet",
    "OutputComparison",
    "compare",
    "compare_models",
    "first_divergence",
    "raise_on_mismatch",
    "resized_input_sets",
    "verify_archive",
]
