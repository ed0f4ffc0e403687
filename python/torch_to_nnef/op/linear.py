"""Matrix products. A weight keeps torch's [N, K] layout: Q40 groups run along K."""

from __future__ import annotations

import torch

from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.half import in_half
from torch_to_nnef.op.product import AXES, contract, matrix_product
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.linear.default)
def linear(e: Emitter, input: Ref, weight: Ref, bias: Ref | None = None) -> Ref:
    """Input (*, K) @ weight (N, K)^T + bias (N)."""
    return affine(e, input, weight, bias)


def affine(e: Emitter, input: Ref, weight: Ref, bias: Ref | None) -> Ref:
    """The same, in any handler whose output has the dtype of `input`: an einsum, for any rank and for packed weights.

    The weight comes first: where tract moves a reshape of the other operand into the einsum, K becomes several axes in the order
    of the first, and the second is transposed to it, which for packed blocks is silently wrong (tract-core 0.23.9,
    ops/einsum/einsum_matmul.rs).
    """
    shape = (*input.shape[:-1], *weight.shape[:-1])
    repeated = e.before_broadcast(input)
    if repeated.shape != input.shape:
        return e.broadcast_to(affine(e, repeated, weight, bias), shape)
    weight, zeros = e.with_padding(weight)
    if zeros:
        input = e.zeros_behind(input, zeros)
    input = e.beside(weight, input)
    batch = AXES[: input.rank - 1]
    row = "n" if weight.rank == 2 else ""
    expr = f"{row}k,{batch}k->{batch}{row}"
    in_single = e.out.dtype in (torch.float16, torch.float32) and not in_half(e)
    if bias is not None and in_single and bias.rank == 1 and row:
        lead, bias = list(range(input.rank - 1)), e.cast(bias, torch.float32)
        total = e.op("t2n_linear", weight, input, bias, out=shape, dtype=torch.float32, expr=expr, lead=lead)
        return e.cast(total, e.out.dtype)
    result = contract(e, [weight, input], expr, shape)
    return result if bias is None else e.binary("add", result, bias, result.dtype)


def _product(e: Emitter, a: Ref, b: Ref) -> Ref:
    """`a @ b` of matrices, of batches of them, or of any `a` with a packed matrix: that is a linear with its transpose."""
    if e.is_quantized(b) and b.rank == 2:
        return affine(e, a, e.transpose(b, [1, 0]), None)
    return matrix_product(e, a, b, e.out.shape)


@lowers(aten.bilinear.default)
def bilinear(e: Emitter, input1: Ref, input2: Ref, weight: Ref, bias: Ref | None = None) -> Ref:
    """input1 (*, I) @ weight (N, I, J) @ input2 (*, J), plus bias (N)."""
    batch, lead = AXES[: input1.rank - 1], input1.shape[:-1]
    partial = contract(e, [weight, input1], f"nxy,{batch}x->{batch}ny", (*lead, weight.shape[0], weight.shape[2]))
    result = contract(e, [partial, input2], f"{batch}ny,{batch}y->{batch}n", e.out.shape)
    return result if bias is None else e.binary("add", result, bias, result.dtype)


@lowers(aten.mm.default, aten.bmm.default)
def mm(e: Emitter, x: Ref, mat2: Ref) -> Ref:
    """Product of matrices, or of batches of them."""
    return _product(e, x, mat2)


@lowers(aten.mv.default)
def mv(e: Emitter, x: Ref, vec: Ref) -> Ref:
    """Matrix times vector."""
    return contract(e, [x, vec], "nk,k->n", e.out.shape)


@lowers(aten.dot.default)
def dot(e: Emitter, x: Ref, tensor: Ref) -> Ref:
    """Sum of the products of two vectors."""
    return contract(e, [x, tensor], "k,k->", ())


@lowers(aten.vdot.default)
def vdot(e: Emitter, x: Ref, other: Ref) -> Ref:
    """The same: of real numbers, the conjugate is the number."""
    return dot(e, x, other)


@lowers(aten.addmm.default)
def addmm(e: Emitter, x: Ref, mat1: Ref, mat2: Ref, beta: Scalar = 1, alpha: Scalar = 1) -> Ref:
    """Beta * x + alpha * (mat1 @ mat2)."""
    if e.is_quantized(mat2) and beta == alpha == 1:
        return affine(e, mat1, e.transpose(mat2, [1, 0]), x)
    return _add(e, x, _product(e, mat1, mat2), beta, alpha)


@lowers(aten.baddbmm.default)
def baddbmm(e: Emitter, x: Ref, batch1: Ref, batch2: Ref, beta: Scalar = 1, alpha: Scalar = 1) -> Ref:
    """Beta * x + alpha * (batch1 @ batch2)."""
    return _add(e, x, matrix_product(e, batch1, batch2, e.out.shape), beta, alpha)


@lowers(aten.addbmm.default)
def addbmm(e: Emitter, x: Ref, batch1: Ref, batch2: Ref, beta: Scalar = 1, alpha: Scalar = 1) -> Ref:
    """Beta * x + alpha * the sum of the products of a batch."""
    return _add(e, x, contract(e, [batch1, batch2], "bik,bkj->ij", e.out.shape), beta, alpha)


@lowers(aten.addmv.default)
def addmv(e: Emitter, x: Ref, mat: Ref, vec: Ref, beta: Scalar = 1, alpha: Scalar = 1) -> Ref:
    """Beta * x + alpha * (mat @ vec)."""
    return _add(e, x, contract(e, [mat, vec], "nk,k->n", e.out.shape), beta, alpha)


@lowers(aten.addr.default)
def addr(e: Emitter, x: Ref, vec1: Ref, vec2: Ref, beta: Scalar = 1, alpha: Scalar = 1) -> Ref:
    """Beta * x + alpha * the products of all elements of two vectors."""
    dtype = e.out.dtype
    if dtype is torch.bool:
        raise e.refuse("a product of booleans; use `&` and `|`")
    return _add(e, x, e.binary("mul", e.unsqueeze(vec1, [1]), e.unsqueeze(vec2, [0]), dtype), beta, alpha)


def _add(e: Emitter, x: Ref, product: Ref, beta: Scalar, alpha: Scalar) -> Ref:
    """The sum, weighted: as in torch, x does not count if beta is 0, whatever it holds."""
    dtype = product.dtype
    if alpha == 0:
        product = e.op("sub", product, product)  # NaN * 0 is NaN; tract's is 0
    elif alpha != 1:
        product = e.binary("mul", product, alpha, dtype)
    if beta == 0:
        return product
    if beta != 1:
        x = e.binary("mul", x, beta, dtype)
    return e.binary("add", product, x, dtype)


@lowers(aten.matmul.default)
def matmul(e: Emitter, x: Ref, other: Ref) -> Ref:
    """Product of matrices with torch's rules for vectors and batches."""
    if e.is_quantized(other):
        return _product(e, x, other)
    rank = max(x.rank, other.rank, 2)
    left = e.unsqueeze(x, [0]) if x.rank == 1 else x
    right = e.unsqueeze(other, [1]) if other.rank == 1 else other
    left, right = e.lift(left, rank), e.lift(right, rank)
    added = [rank - 2] * (x.rank == 1) + [rank - 1] * (other.rank == 1)
    shape = list(e.out.shape)
    for axis in added:
        shape.insert(axis, 1)
    return e.squeeze(matrix_product(e, left, right, tuple(shape)), added)


@lowers(aten.linalg_matrix_power.default)
def matrix_power(e: Emitter, x: Ref, n: int) -> Ref:
    """The product of `n` times `x`, by squaring."""
    if n < 0:
        raise e.refuse("a negative power of a matrix: tract has no inverse; compute it before the export")
    if n == 0:
        size = x.shape[-1]
        row, column = (e.unsqueeze(e.arange(0, 1, size, torch.int64), [a]) for a in (1, 0))
        return e.broadcast_to(e.cast(e.op("eq", row, column, dtype=torch.bool), x.dtype), e.out.shape)
    result = x
    for bit in format(n, "b")[1:]:
        result = matrix_product(e, result, result, e.out.shape)
        result = matrix_product(e, result, x, e.out.shape) if bit == "1" else result
    return result


@lowers(aten.linalg_cross.default)
def cross(e: Emitter, x: Ref, other: Ref, dim: int = -1) -> Ref:
    """The cross product of vectors of 3 along one axis: x[1] y[2] - x[2] y[1] and its turns."""
    axis, shape = e.axis(dim), e.out.shape
    sides = [e.lift(side, len(shape)) for side in (x, other)]

    def turned(side: Ref, *positions: int) -> Ref:
        indices = e.constant(torch.tensor(positions), "positions")
        return e.op("tract_core_gather", side, indices, out=side.shape, axis=axis)

    first, second = (
        e.op("mul", turned(sides[0], *left), turned(sides[1], *right))
        for left, right in (((1, 2, 0), (2, 0, 1)), ((2, 0, 1), (1, 2, 0)))
    )
    return e.op("sub", first, second)
