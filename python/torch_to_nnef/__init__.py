"""A PyTorch model to Q40, to NNEF, to tract: see `quantize_and_verify` and `export_model_to_nnef`."""

from importlib import import_module
from typing import Any

from torch_to_nnef._native import __version__

# name -> module; resolved on first use (PEP 562), so that importing this package does not import torch.
_LAZY = {
    "Report": "torch_to_nnef.report",
    "TractModel": "torch_to_nnef.tract_model",
    "TractNNEF": "torch_to_nnef.inference_target",
    "export_model_to_nnef": "torch_to_nnef.export",
    "export_tensors_from_disk_to_nnef": "torch_to_nnef.export_tensors",
    "export_tensors_to_nnef": "torch_to_nnef.export_tensors",
    "quantize_and_verify": "torch_to_nnef.api",
    "sensitivity": "torch_to_nnef.api",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
