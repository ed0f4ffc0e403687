"""What an element-wise operator is given: tensors, numbers and dimensions, brought to one dtype and one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.statement import Ref

Operand: TypeAlias = Ref | Scalar | Dim


def promoted(a: Operand, b: Operand) -> torch.dtype:
    """The dtype torch computes `a op b` in: dimensioned tensors win over scalars and rank-0 tensors of the same category."""
    return torch.result_type(_stand_in(a), _stand_in(b))


def _stand_in(side: Operand) -> torch.Tensor | Scalar:
    if isinstance(side, Ref):
        return torch.empty([1] * side.rank, dtype=side.dtype)
    return side if isinstance(side, (bool, int, float)) else 0


def as_ref(e: Emitter, side: Operand, dtype: torch.dtype) -> Ref:
    """`side` as a tensor of `dtype`; numbers are stored."""
    if isinstance(side, Ref):
        return e.cast(side, dtype)
    if isinstance(side, (bool, int, float)):
        return e.full(side, dtype)
    return e.op("tract_core_cast", side, out=(), dtype=dtype, hint="size", to=tract_dtype(dtype, e.node.where()))


def elementwise(
    e: Emitter,
    operator: str,
    *sides: Operand,
    dtype: torch.dtype | None = None,
    result: torch.dtype | None = None,
    **attrs: Any,
) -> Ref:
    """`operator(*sides)` computed as `dtype` (the output's by default) with torch's broadcasting, given as `result`."""
    dtype = dtype or e.out.dtype
    return e.op(operator, *aligned(e, [as_ref(e, side, dtype) for side in sides]), dtype=result or dtype, **attrs)


def aligned(e: Emitter, refs: Sequence[Ref]) -> list[Ref]:
    """`refs` at the highest rank among them; tract aligns rank 0 itself."""
    rank = max(ref.rank for ref in refs)
    return [e.lift(ref, rank) if ref.rank else ref for ref in refs]
