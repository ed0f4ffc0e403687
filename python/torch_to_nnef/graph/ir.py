"""The captured computation as plain data: what handlers read, independent of torch.fx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch

from torch_to_nnef.torch_internals import OpOverload

# A dimension: a number, or an expression over the user's axis names ("B", "S + P").
Dim: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the graph. `name` is torch's node name, unique in the graph.

    `dense` says that in torch it fills its storage from the start in row-major order: only `as_strided` can tell.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    dense: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """One ATen call. `args`/`kwargs` hold `Value`s, `Dim`s and literals, in lists as the schema has them."""

    name: str
    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    module_path: str
    source: str

    def where(self) -> str:
        """Module path and the user's line, for messages."""
        return f"{self.module_path or '<root module>'}{f' ({self.source})' if self.source else ''}"


@dataclass(frozen=True, slots=True)
class Graph:
    """Inputs, weights and nodes in topological order. `input_names` are the user's, one an input.

    `weights` maps a value name to the fqn whose tensor it holds; `tensors` maps that fqn to the tensor (a `QTensor` stays packed).
    `symbols` are the axis names in use, in order of appearance. `scales` says of a tensor of 8-bit codes that only integer products read
    what one code means, if that is one number.
    """

    inputs: tuple[Value, ...]
    input_names: tuple[str, ...]
    weights: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    symbols: tuple[str, ...]
    scales: Mapping[str, float] = field(default_factory=dict)
