"""Operators that tract has no form for, each with the reason and what to do instead."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any

import torch

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import OPS, Lowering, parameter

aten = torch.ops.aten

_FACTORIZATION = "tract factorizes no matrices; compute it before the export, or outside of the archive"
_SERIES = "tract has no matrix functions; compute it before the export, or outside of the archive"
_RANDOM = "its windows are random, and an archive gives the same output every time; use adaptive_max_pool"

_REASONS = {
    _FACTORIZATION: (
        aten.cholesky_inverse.default,
        aten.linalg_cholesky.default,
        aten.linalg_ldl_factor.default,
        aten.linalg_lu_factor.default,
        aten.linalg_solve_ex.default,
        aten.linalg_tensorinv.default,
        aten.linalg_tensorsolve.default,
        aten.cholesky_solve.default,
        aten.geqrf.default,
        aten.linalg_cholesky_ex.default,
        aten.linalg_eig.default,
        aten.linalg_eigvals.default,
        aten._linalg_eigvals.default,
        aten._linalg_eigh.default,
        aten.linalg_householder_product.default,
        aten.linalg_ldl_factor_ex.default,
        aten.linalg_ldl_solve.default,
        aten.linalg_lstsq.default,
        aten.linalg_lu.default,
        aten.linalg_lu_factor_ex.default,
        aten.linalg_lu_solve.default,
        aten.linalg_pinv.atol_rtol_tensor,
        aten.linalg_qr.default,
        aten.linalg_solve_triangular.default,
        aten._linalg_solve_ex.default,
        aten._linalg_svd.default,
        aten.lu_unpack.default,
        aten.ormqr.default,
        aten.triangular_solve.default,
    ),
    _SERIES: (aten.linalg_matrix_exp.default,),
    _RANDOM: (aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default),
}


def _refusal(op: torch._ops.OpOverload, reason: str) -> Lowering:
    def lower(e: Emitter, **_: Any) -> list[Any]:
        raise e.refuse(reason)

    # It "reads" every argument: the reason is told whatever they are.
    names = ["e", *(parameter(a.name) for a in op._schema.arguments)]
    lower.__signature__ = Signature([Parameter(n, Parameter.KEYWORD_ONLY) for n in names])  # type: ignore[attr-defined]
    return lower


for _reason, _ops in _REASONS.items():
    for _op in _ops:
        OPS.lowers(_op)(_refusal(_op, _reason))
