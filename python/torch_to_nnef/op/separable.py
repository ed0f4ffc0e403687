"""Linear maps of one axis, given as the matrix that torch's own operator makes of the unit vectors."""

from __future__ import annotations

import torch

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Ref

_AXES = "abcdefgh"


def along(e: Emitter, x: Ref, axis: int, matrix: torch.Tensor | Ref) -> Ref:
    """`x` with its `axis` (in) replaced by the products with the rows of `matrix` (out, in); computed and given in f32."""
    axes = _AXES[: x.rank]
    expr = f"z{axes[axis]},{axes}->{axes.replace(axes[axis], 'z')}"
    shape = (*x.shape[:axis], matrix.shape[0], *x.shape[axis + 1 :])
    weights = matrix if isinstance(matrix, Ref) else e.constant(matrix.contiguous(), "weights")
    return e.op(
        "tract_core_einsum", [weights, e.cast(x, torch.float32)], out=shape, dtype=torch.float32, expr=expr, acc="f32"
    )
