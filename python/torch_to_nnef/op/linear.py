"""Matrix products. A weight keeps torch's [N, K] layout: Q40 groups run along K."""

from __future__ import annotations

import torch

from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

_AXES = "abcdefgh"


@lowers(aten.linear.default)
def linear(e: Emitter, input: Ref, weight: Ref, bias: Ref | None = None) -> Ref:
    """Input (*, K) @ weight (N, K)^T + bias (N): an einsum, for any rank and for packed weights.

    The weight comes first: where tract moves a reshape of the other operand into the einsum, K becomes several axes in the order
    of the first, and the second is transposed to it, which for packed blocks is silently wrong (tract-core 0.23.9,
    ops/einsum/einsum_matmul.rs).
    """
    batch = _AXES[: input.rank - 1]
    expr = f"nk,{batch}k->{batch}n"
    if bias is not None and e.out.dtype is torch.float32:
        lead = list(range(input.rank - 1))
        return e.op("t2n_linear", weight, input, bias, out=e.out.shape, expr=expr, lead=lead)
    result = e.product([weight, input], expr)
    return result if bias is None else e.binary("add", result, bias, result.dtype)


@lowers(aten.addmm.default)
def addmm(e: Emitter, x: Ref, mat1: Ref, mat2: Ref, beta: Scalar = 1, alpha: Scalar = 1) -> Ref:
    """Beta * x + alpha * (mat1 @ mat2)."""
    product = e.op("matmul", mat1, mat2, out=e.out.shape)
    if alpha != 1:
        product = e.binary("mul", product, alpha, product.dtype)
    if beta != 1:
        x = e.binary("mul", x, beta, x.dtype)
    return e.binary("add", product, x, product.dtype)


@lowers(aten.mm.default, aten.bmm.default)
def mm(e: Emitter, x: Ref, mat2: Ref) -> Ref:
    """Product of matrices, or of batches of them."""
    return e.op("matmul", x, mat2, out=e.out.shape)


@lowers(aten.matmul.default)
def matmul(e: Emitter, x: Ref, other: Ref) -> Ref:
    """Product of matrices with torch's rules for vectors and batches."""
    rank = max(x.rank, other.rank, 2)
    left = e.unsqueeze(x, [0]) if x.rank == 1 else x
    right = e.unsqueeze(other, [1]) if other.rank == 1 else other
    left, right = e.lift(left, rank), e.lift(right, rank)
    added = [rank - 2] * (x.rank == 1) + [rank - 1] * (other.rank == 1)
    shape = list(e.out.shape)
    for axis in added:
        shape.insert(axis, 1)
    product = e.op("matmul", left, right, out=tuple(shape), dtype=e.out.dtype)
    return e.squeeze(product, added)


@lowers(aten.einsum.default)
def einsum(e: Emitter, equation: str, tensors: list[Ref]) -> Ref:
    """Sum of products over named axes, for two tensors or one, without ellipsis."""
    if "." in equation:
        raise e.refuse("einsum with an ellipsis; name the axes")
    equation = equation.replace(" ", "")
    inputs, _, output = equation.partition("->")
    if "->" not in equation:
        output = "".join(sorted(c for c in set(inputs) if inputs.count(c) == 1 and c != ","))
    if any(len(set(term)) != len(term) for term in inputs.split(",")):
        raise e.refuse("einsum over a diagonal (a repeated axis in one term); use torch.diagonal")
    return e.product(tensors, f"{inputs}->{output}")
