"""Causal language models of Hugging Face transformers: checkpoint to archive, and the archive in use."""

from importlib import import_module
from typing import Any

# name -> module; resolved on first use (PEP 562), since the archive in use needs no torch, and making it does.
_LAZY = {"TractLLM": "torch_to_nnef.llm_tract.model"}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
