"""Products of matrices and tensors, of floats and integers; distances; what tract has no form for."""

import pytest
import torch
import torch.nn.functional as F
from rows import Row, check, ids, x

from torch_to_nnef.exceptions import T2NErrorNotImplemented

_B = {0: "B"}
_BIG = 2**40  # products of integers this large are exact in no float


def einsum(equation, *inputs, axes=None, name=None):
    return Row(name or equation, lambda *args: torch.einsum(equation, *args), inputs, axes or {})


ROWS = [
    Row("mv", torch.mv, (x(3, 4), x(4)), {"args_0": _B}),
    Row("dot", torch.dot, (x(4), x(4, seed=1)), {"args_0": _B, "args_1": _B}),
    Row("outer", torch.outer, (x(3), x(4)), {"args_0": _B}),
    Row("kron", torch.kron, (x(3, 2), x(2, 4))),
    Row("addmv", lambda a, m, v: torch.addmv(a, m, v, beta=0.5, alpha=2), (x(3), x(3, 4), x(4)), {"args_0": _B, "args_1": _B}),
    Row("addr", lambda a, u, v: torch.addr(a, u, v, beta=0.5, alpha=2), (x(3, 4), x(3), x(4)), {"args_0": _B, "args_1": _B}),
    Row("addbmm", lambda a, b, c: torch.addbmm(a, b, c, beta=0, alpha=2), (x(3, 5), x(2, 3, 4), x(2, 4, 5)), {"args_1": _B, "args_2": _B}),
    Row("baddbmm", torch.baddbmm, (x(2, 3, 5), x(2, 3, 4), x(2, 4, 5)), {f"args_{i}": _B for i in range(3)}),
    Row("matmul_half", torch.matmul, (x(3, 200).half(), x(200, 4).half()), {"args_0": _B}),
    Row("matmul_int", torch.matmul, (ids(2, 3, 4) * _BIG, ids(4, 5) + 1), {"args_0": {0: "B", 1: "S"}}),
    Row("linear_vector_weight", lambda a, w: F.linear(a, w), (x(3, 4), x(4)), {"args_0": _B}),
    Row("bilinear", F.bilinear, (x(2, 3, 4), x(2, 3, 5), x(6, 4, 5), x(6)), {f"args_{i}": {0: "B", 1: "S"} for i in range(2)}),
    Row("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 2])), (x(2, 3, 4), x(3, 5, 4)), {"args_0": _B}),
    Row("multi_dot", lambda a, b, c: torch.linalg.multi_dot([a, b, c]), (x(2, 3), x(3, 4), x(4, 5))),
    Row("matrix_power", lambda a: torch.linalg.matrix_power(a, 3), (x(2, 3, 3),), {"args_0": _B}),
    Row("cross", lambda a, b: torch.linalg.cross(a, b, dim=1), (x(2, 3, 4), x(1, 3, 4)), {"args_0": _B}),
    Row("vecdot", torch.linalg.vecdot, (x(2, 3), x(2, 3, seed=1)), {"args_0": _B, "args_1": _B}),
    einsum("i,j", x(3), x(4), axes={"args_0": _B}),
    einsum("ij->ji", x(3, 4), axes={"args_0": _B}),
    einsum("ij->", x(3, 4), axes={"args_0": _B}),
    einsum("ii->i", x(4, 4), axes={"args_0": {0: "N", 1: "N"}}),
    einsum("bii->b", ids(2, 4, 4), axes={"args_0": _B}, name="trace_int"),
    einsum("...ij,...jk->...ik", x(2, 3, 4, 5), x(5, 6), axes={"args_0": {0: "B", 2: "S"}}),
    einsum("b...,b...", x(2, 3, 4), x(2, 3, 4, seed=1), axes={"args_0": _B, "args_1": _B}),
    einsum("ij,jk,kl->il", x(2, 3), x(3, 4), x(4, 5), axes={"args_0": _B}),
    einsum("bn,anm,bm->ba", x(2, 3), x(5, 3, 4), x(2, 4), axes={"args_0": _B, "args_2": _B}),
    einsum("ij,j->i", x(3, 4), x(1), axes={"args_0": _B}, name="stretched"),
    einsum("ij,kj->ik", ids(3, 4) * _BIG, ids(2, 4), axes={"args_0": _B}, name="einsum_int"),
    Row("cdist", torch.cdist, (x(2, 3, 4), x(2, 5, 4)), {"args_0": {0: "B", 1: "P"}, "args_1": {0: "B", 1: "R"}}),
    Row("cdist_1", lambda a, b: torch.cdist(a, b, p=1), (x(3, 4), x(2, 5, 4)), {"args_1": _B}),
    Row("cdist_many", torch.cdist, (x(30, 4), x(5, 4)), {"args_1": _B}),
    *[Row(f"pdist_{p}", lambda a, p=p: F.pdist(a, p), (x(5, 4),)) for p in (0, 1.5, 2, float("inf"))],
    *[Row(f"det_{n}", torch.linalg.det, (x(5, n, n),), {"args_0": _B}) for n in (1, 2, 3)],
    Row("slogdet", torch.linalg.slogdet, (x(5, 3, 3),), {"args_0": _B}),
    *[Row(f"inv_{n}", torch.linalg.inv, (x(5, n, n) + 2 * torch.eye(n),), {"args_0": _B}) for n in (1, 2, 3)],
    Row("solve", torch.linalg.solve, (x(5, 3, 3) + 2 * torch.eye(3), x(5, 3, 2)), {"args_0": _B, "args_1": _B}),
    Row("solve_vector", torch.linalg.solve, (x(3, 3) + 2 * torch.eye(3), x(3))),
    Row("pairwise_distance", F.pairwise_distance, (x(3, 4), x(3, 4, seed=1)), {"args_0": _B, "args_1": _B}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_products_give_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


@pytest.mark.parametrize(
    ("function", "inputs", "axes", "reason"),
    [
        (torch.mm, (x(3, 4).double(), x(4, 5).double()), {}, "f32 and f16 only"),
        (torch.linalg.inv, (x(4, 4),), {}, "factorizes none"),
        (lambda a: torch.linalg.matrix_power(a, -2), (x(3, 3),), {}, "no inverse"),
        (torch.linalg.svd, (x(3, 4),), {}, "factorizes no matrices"),
        (torch.linalg.eigh, (x(3, 3),), {}, "factorizes no matrices"),
        (torch.linalg.solve, (x(4, 4), x(4)), {}, "factorizes none"),
        (torch.linalg.qr, (x(3, 3),), {}, "factorizes no matrices"),
        (torch.linalg.matrix_exp, (x(3, 3),), {}, "no matrix functions"),
        (F.pdist, (x(3, 4),), {"args_0": _B}, "number of rows is dynamic"),
    ],
    ids=["f64", "inv", "negative_power", "svd", "eigh", "solve", "qr", "matrix_exp", "pdist_dynamic"],
)
def test_products_that_tract_cannot_do_are_refused(function, inputs, axes, reason, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=reason):
        check(Row("refused", function, inputs, axes), tmp_path)
