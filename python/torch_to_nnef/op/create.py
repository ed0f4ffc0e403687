"""Tensors from nothing, and casts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref

aten = torch.ops.aten


def _filled(e: Emitter, value: Scalar) -> Ref:
    return e.broadcast_to(e.full(value), e.out.shape)


@lowers(aten.full.default)
def full(e: Emitter, fill_value: Scalar) -> Ref:
    """One value everywhere."""
    return _filled(e, fill_value)


@lowers(aten.full_like.default, aten.new_full.default)
def full_like(e: Emitter, x: Ref, fill_value: Scalar) -> Ref:
    """One value, with the shape or the dtype of another tensor."""
    return _filled(e, fill_value)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(e: Emitter, s: Scalar) -> Ref:
    """A rank-0 tensor."""
    return _filled(e, s)


def _constant(value: int) -> tuple[Lowering, Lowering]:
    def sized(e: Emitter) -> Ref:
        """One value everywhere."""
        return _filled(e, value)

    def like(e: Emitter, x: Ref) -> Ref:
        """One value, with the shape or the dtype of another tensor."""
        return _filled(e, value)

    return sized, like


for _value, _sized_op, _like_ops in (
    (0, aten.zeros.default, (aten.zeros_like.default, aten.new_zeros.default)),
    (1, aten.ones.default, (aten.ones_like.default, aten.new_ones.default)),
):
    _sized, _like = _constant(_value)
    lowers(_sized_op)(_sized)
    lowers(*_like_ops)(_like)


def _found(e: Emitter) -> Ref:
    if e.gives_result:
        raise e.refuse("memory as it is found, given out as a result; use torch.zeros")
    return _filled(e, 0)


@lowers(aten.empty.memory_format)
def empty(e: Emitter) -> Ref:
    """What a model will write into: zeros."""
    return _found(e)


@lowers(aten.empty_permuted.default)
def empty_permuted(e: Emitter, physical_layout: Sequence[int]) -> Ref:
    """What a model will write into, however it lies in memory: zeros."""
    return _found(e)


@lowers(aten.empty_strided.default)
def empty_strided(e: Emitter, stride: Sequence[Dim]) -> Ref:
    """What a model will write into, however it lies in memory: zeros."""
    return _found(e)


@lowers(aten.empty_like.default, aten.new_empty.default)
def empty_like(e: Emitter, x: Ref) -> Ref:
    """What a model will write into, with the shape or the dtype of another tensor: zeros."""
    return _found(e)


@lowers(aten.new_empty_strided.default)
def new_empty_strided(e: Emitter, x: Ref, stride: Sequence[Dim]) -> Ref:
    """What a model will write into, with the dtype of another tensor: zeros."""
    return _found(e)


@lowers(aten.arange.default)
def arange(e: Emitter, end: Dim) -> Ref:
    """0, 1, ... before end."""
    return arange_step(e, 0, end, 1)


@lowers(aten.arange.start)
def arange_start(e: Emitter, start: Dim, end: Dim) -> Ref:
    """Start, start + 1, ... before end."""
    return arange_step(e, start, end, 1)


@lowers(aten.arange.start_step)
def arange_step(e: Emitter, start: Dim, end: Dim, step: Dim = 1) -> Ref:
    """Start, start + step, ... before end; integers or dimensions."""
    if any(isinstance(v, float) for v in (start, end, step)):
        values = (start, end, step)
        if not all(isinstance(v, (int, float)) for v in values):
            raise e.refuse("a float range over a dynamic size; make integers and scale them")
        return e.constant(torch.arange(*values, dtype=e.out.dtype), "arange")
    return e.arange(start, step, e.out.shape[0], e.out.dtype)


def _triangle_indices(upper: bool) -> Lowering:
    def lower(e: Emitter, row: int, col: int, offset: int = 0) -> Ref:
        """Rows and columns of the elements of one triangle."""
        make = torch.triu_indices if upper else torch.tril_indices
        return e.constant(make(row, col, offset, dtype=e.out.dtype), "indices")

    return lower


lowers(aten.tril_indices.default)(_triangle_indices(upper=False))
lowers(aten.triu_indices.default)(_triangle_indices(upper=True))


@lowers(aten._to_copy.default, aten.to.dtype_layout, aten.to.dtype, aten.to.device)
def to(e: Emitter, x: Ref) -> Ref:
    """Cast to the output's dtype; devices and layouts mean nothing in an archive."""
    if e.out.dtype is torch.bool and x.dtype is not torch.bool:
        return e.binary("ne", x, 0, x.dtype, result=torch.bool)
    return e.cast(x, e.out.dtype)


@lowers(aten.copy.default)
def copy(e: Emitter, x: Ref, src: Ref) -> Ref:
    """What stands in a tensor after another was copied into it."""
    return e.broadcast_to(to(e, src), e.out.shape)


@lowers(aten.to.other, aten.type_as.default)
def to_other(e: Emitter, x: Ref, other: Ref) -> Ref:
    """Cast to another tensor's dtype."""
    return to(e, x)


@lowers(torch.ops.prims.convert_element_type.default)
def convert_element_type(e: Emitter, a: Ref, dtype: torch.dtype) -> Ref:
    """Cast, as decompositions write it."""
    return to(e, a)


def _triangle(upper: bool) -> Lowering:
    def lower(e: Emitter, x: Ref, diagonal: int = 0) -> Ref:
        """One triangle of the last two axes, zeros elsewhere."""
        return e.op("tract_core_trilu", x, k=diagonal, upper=upper)

    return lower


lowers(aten.tril.default)(_triangle(upper=False))
lowers(aten.triu.default)(_triangle(upper=True))
