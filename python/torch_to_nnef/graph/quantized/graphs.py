"""Converted models that are graphs of torch.fx: FX graph mode, and what torchao makes of a torch.export (PT2E)."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["packed_weights", "rewrite"]


def packed_weights(module: fx.GraphModule) -> dict[int, Any]:
    """Id of each packed weight the graph reads -> what stands in for it."""
    return {}


def rewrite(module: fx.GraphModule) -> None:
    """Change the graph of `module` in place."""
