"""Determinants and inverses of matrices of up to 3 rows, by cofactors; tract factorizes none."""

from __future__ import annotations

import torch

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.product import matrix_product
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten._linalg_det.default)
def det(e: Emitter, A: Ref) -> list[Ref]:  # noqa: N803  # the schema's name
    """The first row times its cofactors; the factors that torch has beside it are not given."""
    return [e.squeeze(_determinant(e, A, _cofactors(e, A)), [A.rank - 2, A.rank - 1])]


@lowers(aten._linalg_slogdet.default)
def slogdet(e: Emitter, A: Ref) -> list[Ref]:  # noqa: N803
    """Its sign, and the logarithm of its magnitude."""
    (value,) = det(e, A)
    return [e.op("sign", value), e.op("log", e.op("abs", value))]


@lowers(aten.linalg_inv.default, aten.linalg_inv_ex.default)
def inv(e: Emitter, A: Ref) -> Ref:  # noqa: N803
    """The transposed cofactors over the determinant."""
    return _inverse(e, A)


@lowers(aten.inverse.default)
def inverse(e: Emitter, x: Ref) -> Ref:
    """The same under its old name."""
    return _inverse(e, x)


@lowers(aten.linalg_solve.default)
def solve(e: Emitter, A: Ref, B: Ref, left: bool = True) -> Ref:  # noqa: N803
    """The inverse of A times B, or B times it; B may be a vector, or a batch of them."""
    inverse, vector = _inverse(e, A), B.rank == 1 or B.shape == A.shape[:-1]
    right = e.unsqueeze(B, [B.rank]) if vector else B
    out = (*e.out.shape, 1) if vector else e.out.shape
    first, second = (e.lift(side, len(out)) for side in ((inverse, right) if left else (right, inverse)))
    product = matrix_product(e, first, second, out)
    return e.squeeze(product, [len(out) - 1]) if vector else product


def _inverse(e: Emitter, x: Ref) -> Ref:
    cofactors = _cofactors(e, x)
    order = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    adjugate = e.op("transpose", cofactors, out=x.shape, axes=order)
    return e.op("div", adjugate, _determinant(e, x, cofactors))


def _determinant(e: Emitter, x: Ref, cofactors: Ref) -> Ref:
    """Shape (..., 1, 1)."""
    first = e.op("mul", *(e.slice(side, x.rank - 2, 0, 1) for side in (x, cofactors)))
    return e.op("sum_reduce", first, out=(*x.shape[:-2], 1, 1), axes=[x.rank - 1])


def _cofactors(e: Emitter, x: Ref) -> Ref:
    """The determinant without each row and column, signed: of 3 rows, cyclic neighbours carry the sign."""
    size = x.shape[-1]
    if size == 3:
        after, before = (1, 2, 0), (2, 0, 1)
        straight = e.op("mul", _taken(e, x, after, after), _taken(e, x, before, before))
        return e.op("sub", straight, e.op("mul", _taken(e, x, after, before), _taken(e, x, before, after)))
    if size == 2:
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=x.dtype)
        return e.binary("mul", _taken(e, x, (1, 0), (1, 0)), e.constant(signs, "signs"), x.dtype)
    if size == 1:
        return e.broadcast_to(e.full(1.0, x.dtype), x.shape)
    raise e.refuse(
        f"a matrix of {size} rows: tract factorizes none, and up to 3 rows have a formula; "
        "compute it before the export, or outside of the archive"
    )


def _taken(e: Emitter, x: Ref, rows: tuple[int, ...], columns: tuple[int, ...]) -> Ref:
    for axis, positions in ((x.rank - 2, rows), (x.rank - 1, columns)):
        indices = e.constant(torch.tensor(positions), "positions")
        x = e.op("tract_core_gather", x, indices, out=x.shape, axis=axis)
    return x
