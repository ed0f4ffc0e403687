"""Operators that tract has no form for, each with the reason and what to do instead."""

from __future__ import annotations

import torch

from torch_to_nnef.op.registry import OPS
from torch_to_nnef.torch_internals import since

aten = torch.ops.aten

_FACTORIZATION = "tract factorizes no matrices; compute it before the export, or outside of the archive"
_SERIES = "tract has no matrix functions; compute it before the export, or outside of the archive"
_WINDOWS = "its windows are random, and an archive gives the same output every time; use adaptive_max_pool"
_ITERATION = "its value takes as many steps as the numbers say, which tract cannot run; compute it before the export"
_BITS = "it reads the bits of floats, which tract has no operator for"
_NUMBERS = "random numbers: tract has none, and numbers drawn at export would be the same in every run; pass them as an input of the model"

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
    _WINDOWS: (aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default),
    _ITERATION: (
        aten.igamma.default,
        aten.igammac.default,
        aten.special_zeta.default,
        aten.special_chebyshev_polynomial_t.default,
        aten.special_chebyshev_polynomial_u.default,
        aten.special_chebyshev_polynomial_v.default,
        aten.special_chebyshev_polynomial_w.default,
        aten.special_hermite_polynomial_h.default,
        aten.special_hermite_polynomial_he.default,
        aten.special_laguerre_polynomial_l.default,
        aten.special_legendre_polynomial_p.default,
        aten.special_shifted_chebyshev_polynomial_t.default,
        aten.special_shifted_chebyshev_polynomial_u.default,
        aten.special_shifted_chebyshev_polynomial_v.default,
        aten.special_shifted_chebyshev_polynomial_w.default,
    ),
    _BITS: (aten.nextafter.default, *since("2.8", "hash_tensor.default")),
}
# Drawn from a generator: every overload.
_RANDOM = (
    aten.bernoulli,
    aten.binomial,
    aten.cauchy,
    aten.exponential,
    aten.geometric,
    aten.log_normal,
    aten.multinomial,
    aten.native_dropout,
    aten.normal,
    aten.normal_functional,
    aten.poisson,
    aten.rand,
    aten.rand_like,
    aten.randint,
    aten.randint_like,
    aten.randn,
    aten.randn_like,
    aten.randperm,
    aten.rrelu_with_noise,
    aten.rrelu_with_noise_functional,
    aten.uniform,
    aten._sample_dirichlet,
    aten._standard_gamma,
)

for _reason, _ops in _REASONS.items():
    OPS.refuses(_ops, _reason)
for _packet in _RANDOM:
    _names = _packet.overloads()  # type: ignore[no-untyped-call]
    OPS.refuses([getattr(_packet, name) for name in _names if not name.endswith("out")], _NUMBERS)
