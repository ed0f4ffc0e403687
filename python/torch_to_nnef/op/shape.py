"""Views, joins and cuts. Shapes come from what torch computed, symbols included: no shape arithmetic enters the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
def same(e: Emitter, x: Ref) -> Ref:
    """The tensor itself."""
    return x


@lowers(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(e: Emitter, input: Ref, p: float = 0.5, train: bool = False) -> Ref:
    """Nothing, in eval mode."""
    if train and p:
        raise e.refuse("dropout that is active; put the model in eval mode")
    return input


@lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)
def reshape(e: Emitter, x: Ref) -> Ref:
    """Same elements, another shape."""
    return e.reshape(x, e.out.shape)


@lowers(aten.unflatten.int)
def unflatten(e: Emitter, x: Ref, dim: int) -> Ref:
    """One axis as several."""
    return e.reshape(x, e.out.shape)


@lowers(aten.permute.default)
def permute(e: Emitter, x: Ref, dims: Sequence[int]) -> Ref:
    """Axes in another order."""
    return e.op("transpose", x, out=e.out.shape, axes=[d % x.rank for d in dims])


@lowers(aten.transpose.int)
def transpose(e: Emitter, x: Ref, dim0: int, dim1: int) -> Ref:
    """Two axes swapped."""
    order = list(range(x.rank))
    a, b = e.axis(dim0), e.axis(dim1)
    order[a], order[b] = order[b], order[a]
    return e.op("transpose", x, out=e.out.shape, axes=order) if a != b else x


@lowers(aten.t.default)
def t(e: Emitter, x: Ref) -> Ref:
    """A matrix transposed."""
    return x if x.rank < 2 else e.op("transpose", x, out=e.out.shape, axes=[1, 0])


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


@lowers(aten.expand.default)
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
    return e.op("tile", e.lift(x, len(repeats)), out=e.out.shape, repeats=list(repeats))


@lowers(aten.cat.default, aten.concat.default)
def cat(e: Emitter, tensors: list[Ref], dim: int = 0) -> Ref:
    """Joined along one axis; torch lets empty vectors stand among the parts."""
    parts = [e.cast(part, e.out.dtype) for part in tensors if part.shape != (0,)]
    return parts[0] if len(parts) == 1 else e.op("concat", parts, out=e.out.shape, dtype=e.out.dtype, axis=e.axis(dim))


@lowers(aten.stack.default)
def stack(e: Emitter, tensors: list[Ref], dim: int = 0) -> Ref:
    """Joined along a new axis."""
    parts = [e.cast(part, e.out.dtype) for part in tensors]
    return e.op("stack", parts, out=e.out.shape, dtype=e.out.dtype, axis=e.axis(dim))


@lowers(aten.slice.Tensor)
def slice_(e: Emitter, x: Ref, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1) -> Ref:
    """x[start:end:step] on one axis; the length is the one torch computed."""
    axis = dim % x.rank
    size, length = x.shape[axis], e.out.shape[axis]
    if step == 1 and size == length:
        return x
    begin: Dim = 0 if start is None else start
    if isinstance(begin, int) and begin < 0:
        begin = max(size + begin, 0) if isinstance(size, int) else size + begin
    return e.slice(x, axis, begin, length, step)


@lowers(aten.roll.default)
def roll(e: Emitter, x: Ref, shifts: Sequence[int], dims: Sequence[int] = ()) -> Ref:
    """Static axes turned around: what leaves at the end comes back at the front."""
    if len(dims) != len(shifts):
        raise e.refuse("roll without dims; flatten first and give dims=0")
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % x.rank
        size = x.shape[axis]
        if not isinstance(size, int):
            raise e.refuse("roll over a dynamic axis; concatenate two slices")
        moved = shift % size
        if moved:
            parts = [e.slice(x, axis, size - moved, moved), e.slice(x, axis, 0, size - moved)]
            x = e.op("concat", parts, out=x.shape, dtype=x.dtype, axis=axis)
    return x


@lowers(aten.narrow.default)
def narrow(e: Emitter, x: Ref, dim: int, start: Dim, length: Dim) -> Ref:
    """`length` elements of one axis."""
    return e.slice(x, dim % x.rank, start, length)


@lowers(aten.select.int)
def select(e: Emitter, x: Ref, dim: int, index: Dim) -> Ref:
    """One element of an axis."""
    axis = dim % x.rank
    begin = x.shape[axis] + index if isinstance(index, int) and index < 0 else index
    return e.squeeze(e.slice(x, axis, begin, 1), [axis])


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(e: Emitter, x: Ref, dim: int = 0) -> list[Ref]:
    """Pieces along one axis, as long as torch computed them; `unbind` also drops the axis."""
    axis, begin, parts = dim % x.rank, 0, list[Ref]()
    for piece in e.node.outputs:
        unbound = len(piece.shape) < x.rank
        length = 1 if unbound else piece.shape[axis]
        part = e.slice(x, axis, begin, length)
        parts.append(e.squeeze(part, [axis]) if unbound else part)
        begin = begin + length
    return parts


@lowers(aten.constant_pad_nd.default)
def constant_pad(e: Emitter, x: Ref, pad: Sequence[Dim], value: Scalar = 0) -> Ref:
    """Padded with a constant; `pad` starts at the last axis."""
    return pad_mode(e, x, pad, "constant", value)


@lowers(aten.pad.default)
def pad_mode(e: Emitter, x: Ref, pad: Sequence[Dim], mode: str = "constant", value: Scalar | None = None) -> Ref:
    """Padded by torch.nn.functional.pad's rules; negative amounts cut."""
    borders = {"constant": "constant", "reflect": "reflect", "replicate": "replicated"}  # as tract spells them
    if mode not in borders:
        raise e.refuse(f"pad mode {mode!r}; tract has {sorted(borders)}")
    amounts = [(0, 0)] * x.rank
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        if mode == "constant" and not (isinstance(before, int) and isinstance(after, int)):
            x = _joined(e, x, x.rank - 1 - i, (before, after), value or 0)
            continue
        if not isinstance(before, int) or not isinstance(after, int) or before < 0 or after < 0:
            raise e.refuse(f"padding {list(pad)}: amounts must be static and non-negative; slice instead")
        amounts[x.rank - 1 - i] = (before, after)
    if not any(map(any, amounts)):
        return x
    filled: dict[str, Any] = {"value": float(value or 0)} if mode == "constant" else {}
    return e.op("pad", x, out=e.out.shape, padding=amounts, border=borders[mode], **filled)


def _joined(e: Emitter, x: Ref, axis: int, amounts: tuple[Dim, Dim], value: Scalar) -> Ref:
    """Padded by dynamic amounts on one axis, which tract's `pad` does not take: joined with constants."""

    def side(amount: Dim) -> list[Ref]:
        shape = (*x.shape[:axis], amount, *x.shape[axis + 1 :])
        return [] if amount == 0 else [e.broadcast_to(e.full(value), shape)]

    before, after = amounts
    shape = (*x.shape[:axis], before + x.shape[axis] + after, *x.shape[axis + 1 :])
    return e.op("concat", [*side(before), x, *side(after)], out=shape, dtype=x.dtype, axis=axis)
