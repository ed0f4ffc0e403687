"""Sums of products over named axes, in every dtype tract can do exactly enough."""

from __future__ import annotations

import torch

from torch_to_nnef.graph.ir import Shape
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.half import in_half
from torch_to_nnef.op.statement import Ref

AXES = "abcdefghijklmnopqrstuvwxyz"


def contract(e: Emitter, operands: list[Ref], expr: str, out: Shape) -> Ref:
    """The einsum `expr` of two operands: floats are summed in f32 (but see `in_half`), integers multiplied and summed as they are.

    A packed weight has to be the first operand.
    """
    dtype = e.out.dtype
    if dtype is torch.float64:
        raise e.refuse("tract multiplies matrices in f32 and f16 only; use model.float()")
    # tract multiplies f16 by f32: a weight that is kept in f16 stays so.
    kept = torch.float16 if dtype is torch.float32 else dtype
    operands = [operand if operand.dtype is kept else e.cast(operand, dtype) for operand in operands]
    if dtype.is_floating_point:
        sums = torch.float16 if in_half(e) else torch.float32
        total = e.op(
            "tract_core_einsum", operands, out=out, dtype=sums, expr=expr, acc=tract_dtype(sums, e.node.where())
        )
        return e.cast(total, dtype)
    inputs, _, output = expr.partition("->")
    axes = output + "".join(sorted(set(inputs) - set(output) - {","}))
    terms = [arranged(e, operand, term, axes) for operand, term in zip(operands, inputs.split(","), strict=True)]
    return total_over(e, e.op("mul", *terms), list(range(len(output), len(axes))))


def total_over(e: Emitter, x: Ref, axes: list[int]) -> Ref:
    """The sum over `axes`, which are dropped; of integers as the end of a running sum, since tract adds them up in 32 bits."""
    if x.dtype.is_floating_point and axes:
        x = e.op("sum_reduce", x, out=tuple(1 if i in axes else d for i, d in enumerate(x.shape)), axes=axes)
    elif not x.dtype.is_floating_point:
        for axis in axes:
            x = e.op("tract_core_cumsum", x, axis=axis, exclusive=False, reverse=True)
            x = e.slice(x, axis, 0, 1)
    return e.squeeze(x, axes)


def arranged(e: Emitter, x: Ref, axes: str, order: str) -> Ref:
    """`x` with its named `axes` in `order`; those it does not have get size 1."""
    present = [a for a in order if a in axes]
    permutation = [axes.index(a) for a in present]
    if permutation != sorted(permutation):
        x = e.op("transpose", x, out=tuple(x.shape[i] for i in permutation), axes=permutation)
    return e.unsqueeze(x, [i for i, a in enumerate(order) if a not in axes])


def matrix_product(e: Emitter, a: Ref, b: Ref, out: Shape) -> Ref:
    """`a @ b` of equal ranks, the leading axes broadcast."""
    if e.out.dtype is torch.float32:
        return e.op("matmul", a, b, out=out)
    batch = AXES[: a.rank - 2]
    return contract(e, [a, b], f"{batch}xy,{batch}yz->{batch}xz", out)
