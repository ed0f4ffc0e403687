"""Looking up: embeddings, gathers and advanced indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim, Value
from torch_to_nnef.op.emitter import Emitter, broadcast
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.embedding.default)
def embedding(e: Emitter, weight: Ref, indices: Ref, padding_idx: int = -1) -> Ref:
    """Rows of weight (V, D); ids must lie in [0, V), as torch wants too."""
    # tract has to be told the dtype of what comes out of packed blocks.
    unpacked: dict[str, Any] = {"datum_type": "f32"} if e.is_quantized(weight) else {}
    return e.op("tract_core_gather", weight, indices, out=e.out.shape, axis=0, **unpacked)


@lowers(aten.index_select.default)
def index_select(e: Emitter, x: Ref, dim: int, index: Ref) -> Ref:
    """Slices of one axis."""
    return e.op("tract_core_gather", x, index, out=e.out.shape, axis=dim % x.rank)


@lowers(aten.flip.default)
def flip(e: Emitter, x: Ref, dims: Sequence[int]) -> Ref:
    """Axes read backwards."""
    for axis in sorted({d % x.rank for d in dims}):
        positions = e.arange(0, 1, x.shape[axis], torch.int64)
        backwards = e.binary("sub", x.shape[axis] - 1, positions, torch.int64)
        x = e.op("tract_core_gather", x, backwards, out=x.shape, axis=axis)
    return x


@lowers(aten.gather.default)
def gather(e: Emitter, x: Ref, dim: int, index: Ref) -> Ref:
    """x[..., index[...], ...] along one axis; index may be shorter on the others."""
    axis = dim % x.rank
    for other, (size, wanted) in enumerate(zip(x.shape, index.shape, strict=True)):
        if other != axis and size != wanted:
            x = e.slice(x, other, 0, wanted)
    return e.op("tract_core_gather_elements", x, index, out=e.out.shape, axis=axis)


@lowers(aten.index.Tensor)
def index(e: Emitter, x: Ref, indices: list[Ref | None]) -> Ref:
    """x[i, j, ...] with tensors on consecutive axes; negative indices count from the end."""
    given = [(axis, ref) for axis, ref in enumerate(indices) if ref is not None]
    first = given[0][0]
    if [axis for axis, _ in given] != list(range(first, first + len(given))):
        raise e.refuse("index tensors on axes that are not neighbours; transpose first")
    if any(ref.dtype in (torch.bool, torch.uint8) for _, ref in given):
        raise e.refuse("indexing by a boolean mask gives a size that depends on the data; use torch.where")
    values: list[Value | None] = list(e.node.args[1])
    wrapped = [_wrap(e, ref, values[axis], x.shape[axis]) for axis, ref in given]
    if len(wrapped) == 1:
        return e.op("tract_core_gather", x, wrapped[0], out=e.out.shape, axis=first)
    if first:
        raise e.refuse("several index tensors behind a full axis; transpose the indexed axes to the front")
    rank = max(ref.rank for ref in wrapped)
    lifted = [e.lift(ref, rank) for ref in wrapped]
    common = broadcast([ref.shape for ref in lifted])
    columns = [e.unsqueeze(e.broadcast_to(ref, common), [rank]) for ref in lifted]
    table = e.op("concat", columns, out=(*common, len(columns)), dtype=torch.int64, hint="indices", axis=rank)
    return e.op("tract_core_gather_nd", x, table, out=e.out.shape, batch_dims=0)


def _wrap(e: Emitter, ref: Ref, value: Value | None, size: Dim) -> Ref:
    """Indices in [0, size): tract panics on negative ones."""
    ref = e.cast(ref, torch.int64)
    if value is None or e.is_non_negative(value):
        return ref
    from_end = e.binary("add", ref, size, torch.int64)
    negative = e.binary("lt", ref, 0, torch.int64, result=torch.bool)
    return e.op("select", negative, from_end, ref, out=ref.shape, dtype=torch.int64, hint="wrapped")
