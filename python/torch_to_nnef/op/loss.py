"""Losses that have no decomposition with a lowering."""

from __future__ import annotations

from functools import partial

import torch

from torch_to_nnef.op.elementwise import compare, select
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.reduce import reduced
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# torch.nn.functional's reductions, as ATen numbers them.
_REDUCTIONS = {1: "mean_reduce", 2: "sum_reduce"}
# What ATen adds to squared lengths before it divides by them.
_LENGTH_FLOOR = 1e-12


def _over_examples(e: Emitter, losses: Ref, reduction: int) -> Ref:
    return reduced(e, _REDUCTIONS[reduction], losses, None, keepdim=False) if reduction in _REDUCTIONS else losses


@lowers(aten.hinge_embedding_loss.default)
def hinge_embedding_loss(e: Emitter, x: Ref, target: Ref, margin: float = 1.0, reduction: int = 1) -> Ref:
    """X where target is 1, max(0, margin - x) where it is -1."""
    below = e.op("max", e.binary("sub", margin, x, x.dtype), e.scalar(0, x.dtype))
    near = select(e, compare(e, "ne", target, -1), x, 0)
    far = select(e, compare(e, "ne", target, 1), below, 0)
    return _over_examples(e, e.binary("add", near, far, x.dtype), reduction)


@lowers(aten.cosine_embedding_loss.default)
def cosine_embedding_loss(
    e: Emitter, input1: Ref, input2: Ref, target: Ref, margin: float = 0.0, reduction: int = 1
) -> Ref:
    """1 - cos where target is 1, max(0, cos - margin) where it is -1; cosines are along the axis after target's."""
    dtype, arithmetic = e.out.dtype, partial(e.binary, dtype=e.out.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = (e.cast(side, wide) for side in (input1, input2))
    along = partial(reduced, e, "sum_reduce", dim=target.rank, keepdim=False)
    dot = along(e.binary("mul", a, b, wide))
    squares = [e.binary("add", along(e.op("square", side)), _LENGTH_FLOOR, wide) for side in (a, b)]
    cosine = e.cast(e.op("mul", dot, e.op("rsqrt", e.op("mul", squares[0], squares[1]))), dtype)
    above = e.op("max", arithmetic("sub", cosine, margin), e.scalar(0, dtype))
    near = select(e, compare(e, "eq", target, 1), arithmetic("sub", 1, cosine), 0)
    far = select(e, compare(e, "eq", target, -1), above, 0)
    return _over_examples(e, arithmetic("add", near, far), reduction)
