"""What handlers produce: statements of graph.nnef over references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from torch_to_nnef.graph.ir import Shape

# Signature and assignments of an NNEF fragment.
Fragment: TypeAlias = tuple[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Ref:
    """An identifier of graph.nnef with what is known of its tensor; `fqn` if it is a weight.

    `transposed` says that the identifier holds the transpose: packed weights stay as they are stored.
    """

    id: str
    shape: Shape
    dtype: torch.dtype
    fqn: str | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A result that has no lowering: whoever uses it is refused with `reason`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Statement:
    """`results = operator(args, attrs)`. Values are `Ref`s, dimensions, literals, and lists or tuples of those."""

    results: tuple[str, ...]
    operator: str
    args: tuple[Any, ...]
    attrs: tuple[tuple[str, Any], ...]
    node_name: str
    module_path: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A tensor of the archive: identifier, label (its `.dat` file without suffix) and where the values are."""

    id: str
    label: str
    tensor: torch.Tensor


# What a handler returns, and handlers.
Result: TypeAlias = Ref | Sequence[Ref | Unavailable]
Lowering: TypeAlias = Callable[..., Result]
