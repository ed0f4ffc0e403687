"""Views and joins. Shapes come from what torch computed, symbols included: no shape arithmetic enters the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_to_nnef.graph.fold import IDENTITIES
from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(*IDENTITIES)
def same(e: Emitter, x: Ref) -> Ref:
    """The tensor itself."""
    return x


@lowers(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default
)
def dropout(e: Emitter, input: Ref, p: float = 0.5, train: bool = False) -> Ref:
    """Nothing, in eval mode."""
    if train and p:
        raise e.refuse("dropout that is active; put the model in eval mode")
    return input


@lowers(
    aten.view.default, aten.view_copy.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints
)
def reshape(e: Emitter, x: Ref) -> Ref:
    """Same elements, another shape."""
    return e.reshape(x, e.out.shape)


@lowers(aten.unflatten.int)
def unflatten(e: Emitter, x: Ref, dim: int) -> Ref:
    """One axis as several."""
    return e.reshape(x, e.out.shape)


@lowers(aten.permute.default, aten.permute_copy.default)
def permute(e: Emitter, x: Ref, dims: Sequence[int]) -> Ref:
    """Axes in another order."""
    return e.transpose(x, [d % x.rank for d in dims])


@lowers(aten.transpose.int)
def transpose(e: Emitter, x: Ref, dim0: int, dim1: int) -> Ref:
    """Two axes swapped."""
    order = list(range(x.rank))
    a, b = e.axis(dim0), e.axis(dim1)
    if a == b:
        return x
    order[a], order[b] = order[b], order[a]
    return e.transpose(x, order)


@lowers(aten.t.default)
def t(e: Emitter, x: Ref) -> Ref:
    """A matrix transposed."""
    return x if x.rank < 2 else e.transpose(x, [1, 0])


@lowers(aten.unsqueeze.default)
def unsqueeze(e: Emitter, x: Ref, dim: int) -> Ref:
    """A unit axis more."""
    return e.unsqueeze(x, [e.axis(dim)])


@lowers(aten.squeeze.default)
def squeeze(e: Emitter, x: Ref) -> Ref:
    """Without the unit axes."""
    return e.squeeze(x, [i for i, d in enumerate(x.shape) if d == 1])


@lowers(aten.squeeze.dim, aten.squeeze.dims)
def squeeze_dims(e: Emitter, x: Ref, dim: int | Sequence[int]) -> Ref:
    """Without these axes, where their size is 1."""
    dims = [dim] if isinstance(dim, int) else dim
    return e.squeeze(x, [d % x.rank for d in dims if x.rank and x.shape[d % x.rank] == 1])


@lowers(aten.expand.default, aten.broadcast_to.default)
def expand(e: Emitter, x: Ref) -> Ref:
    """Unit axes repeated."""
    return e.broadcast_to(x, e.out.shape)


@lowers(aten.expand_as.default)
def expand_as(e: Emitter, x: Ref, other: Ref) -> Ref:
    """Unit axes repeated up to another tensor's shape."""
    return e.broadcast_to(x, e.out.shape)


@lowers(aten.repeat.default)
def repeat(e: Emitter, x: Ref, repeats: Sequence[Dim]) -> Ref:
    """Tiled along every axis."""
    return e.op("tile", e.lift(x, len(repeats)), out=e.out.shape, repeats=list(repeats)) if repeats else x


@lowers(aten.cat.default, aten.concat.default)
def cat(e: Emitter, tensors: list[Ref], dim: int = 0) -> Ref:
    """Joined along one axis; empty parts are left out."""
    axis = e.axis(dim)
    filled = [part for part in tensors if part.shape != (0,) and part.shape[axis] != 0] or tensors[:1]
    parts = [e.cast(part, e.out.dtype) for part in filled]
    return parts[0] if len(parts) == 1 else e.op("concat", parts, out=e.out.shape, dtype=e.out.dtype, axis=axis)


@lowers(aten.stack.default)
def stack(e: Emitter, tensors: list[Ref], dim: int = 0) -> Ref:
    """Joined along a new axis."""
    parts = [e.cast(part, e.out.dtype) for part in tensors]
    return e.op("stack", parts, out=e.out.shape, dtype=e.out.dtype, axis=e.axis(dim))
