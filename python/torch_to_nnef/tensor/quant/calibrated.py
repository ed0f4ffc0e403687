"""Q40 by what a weight computes: encoders that know the second moments of its inputs."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.tensor.extents import own_memory
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant.base import FLOAT_DTYPES, QScalePerGroupF16
from torch_to_nnef.tensor.quant.compressors import GROUP, NibblePacking
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, _bytes, q40_shape_reason

__all__ = ["quantize_q40_hessian", "quantize_q40_weighted"]

SWEEPS = 16
_DOUBLINGS = 10


def quantize_q40_weighted(weight: torch.Tensor, importance: torch.Tensor, name: str = "") -> QTensorTractScaleOnly:
    """Quantize to the least sum of `importance * error^2` in each group of 32 among candidate scales.

    Never worse, by this measure, than the extreme over -8 (`signed_extreme`).

    Args:
        weight: Float [N, ...], seen as rows of K elements.
        importance: [K], or [G, K]: rows [i * N / G, (i + 1) * N / G) have importance[i]. Finite, not negative; where a
            whole group has none, its elements count the same.
        name: Named in errors, and kept as `nnef_name`.

    Raises:
        T2NErrorImpossibleQuantization: Shape, NaN or Inf in the weight, as `quantize_q40`.
        T2NErrorInvalidArgument: An importance that does not fit, is not finite or is negative.

    """
    importance = importance.detach().to("cpu", torch.float32).contiguous()
    if importance.dim() not in (1, 2):
        raise T2NErrorInvalidArgument(f"importance of `{name}` must be [K] or [G, K]: got {tuple(importance.shape)}")
    rows = _rows(weight, importance.shape[-1], name)
    codes, scales = _planes(rows)
    _native.q40_quantize_weighted(
        rows.numpy().reshape(-1), rows.shape[1], importance.numpy().reshape(-1), name, _bytes(codes), _bytes(scales)
    )
    return _packed(codes, scales, weight, name)


def quantize_q40_hessian(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    sweeps: int = SWEEPS,
    name: str = "",
) -> QTensorTractScaleOnly:
    """Quantize to little tr(E H E^T) of the error E [N, K]: GPTQ with static groups, then descent on codes and scales.

    GPTQ: Frantar et al. 2022, https://arxiv.org/abs/2210.17323. No row is worse, by this measure, than what `quantize_q40` makes of
    it; where `hessian` is all zeros, the result is what `quantize_q40_weighted` makes of equal importance.

    Args:
        weight: Float [N, ...], seen as rows of K elements.
        hessian: [K, K] or [G, K, K], symmetric positive semidefinite: the mean of `x x^T` over inputs x [K] of rows
            [i * N / G, (i + 1) * N / G). Any scale. Solved in f64 on the CPU. [G, P, K / P, K / P]: only P blocks on the
            diagonal of each.
        damping: Part of the mean of the diagonal that is added to it. Doubled, up to 1024 times, while the factorization
            fails.
        act_order: Round the columns with the largest diagonal first.
        sweeps: Passes of descent over each row, at most; it ends earlier where nothing changes.
        name: Named in errors, and kept as `nnef_name`.

    Raises:
        T2NErrorImpossibleQuantization: Shape, NaN or Inf in the weight, as `quantize_q40`.
        T2NErrorInvalidArgument: A Hessian that does not fit, is not finite or not positive semidefinite.

    """
    shapes = {2: (1, 1, *hessian.shape), 3: (len(hessian), 1, *hessian.shape[1:]), 4: hessian.shape}
    matrices, parts, width, columns = shapes.get(hessian.dim(), (0, 0, 0, 0))
    rows = _rows(weight, parts * width, name)
    if width != columns or width % GROUP or not matrices or len(rows) % matrices:
        raise T2NErrorInvalidArgument(
            f"Hessian of `{name}` must be [K, K], [G, K, K] or [G, P, K / P, K / P], G dividing {len(rows)} rows: "
            f"got {tuple(hessian.shape)}"
        )
    stack = hessian.detach().reshape(matrices, parts, width, width)
    if not (0 <= damping < float("inf") and sweeps >= 0):
        raise T2NErrorInvalidArgument(f"damping and sweeps must not be negative: got {damping} and {sweeps}")
    codes, scales = _planes(rows)
    by_part = [plane.view(matrices, -1, parts, plane.numel() // len(rows) // parts) for plane in (codes, scales)]
    for matrix, part in product(range(matrices), range(parts)):
        moments = _moments(stack[matrix, part], damping, act_order, name)
        piece = rows.view(matrices, -1, parts, width)[matrix, :, part].contiguous()
        planes = _planes(piece)
        _native.q40_quantize_hessian(
            piece.numpy().reshape(-1), width, _floats(moments.hessian), moments.ridge, _floats(moments.factor),
            moments.order.to(torch.int32).numpy().view("uint32"), _floats(moments.importance), sweeps, name,
            *map(_bytes, planes),
        )  # fmt: skip
        for whole, plane in zip(by_part, planes, strict=True):
            whole[matrix, :, part] = plane.view(len(piece), -1)
    return _packed(codes, scales, weight, name)


class _Moments(NamedTuple):
    """What `_native.q40_quantize_hessian` asks for; f64."""

    hessian: torch.Tensor
    ridge: float
    factor: torch.Tensor
    order: torch.Tensor
    importance: torch.Tensor


def _moments(hessian: torch.Tensor, damping: float, act_order: bool, name: str) -> _Moments:
    h = hessian.to("cpu", torch.float64)
    if not bool(torch.isfinite(h).all()):
        raise T2NErrorInvalidArgument(f"the Hessian of `{name}` holds NaN or Inf: the calibration went wrong")
    identity = torch.eye(len(h), dtype=torch.float64)
    if not bool(h.any()):  # no input was ever other than zero: every element counts the same
        h = identity
    if (mean := float(h.diagonal().mean())) <= 0:
        raise T2NErrorInvalidArgument(f"the Hessian of `{name}` is not positive semidefinite: a diagonal of {mean:.3g}")
    # Relative to its mean, so that f32 holds what follows whatever the scale of the inputs.
    h = (h + h.T) / (2 * mean)
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(h))
    ridge = max(damping, 1e-7)
    for _ in range(_DOUBLINGS + 1):
        damped = h + ridge * identity
        # A = R R^T with R upper triangular is a Cholesky of the reversed matrix; U = R^-1 gives U^T U = A^-1.
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order].flip(0, 1))
        if not failed:
            break
        ridge *= 2
    else:
        raise T2NErrorInvalidArgument(
            f"the Hessian of `{name}` is not positive semidefinite, even with {ridge / 2:.3g} of its mean on the diagonal"
        )
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    # What an error costs once all columns after it made up for it; better than the diagonal of H: 0.15 dB less error on SmolLM2.
    importance = torch.empty_like(h[0])
    importance[order] = 1 / factor.square().sum(0)
    return _Moments(damped, ridge, factor, order, importance)


def _rows(weight: torch.Tensor, width: int, name: str) -> torch.Tensor:
    """`weight` as contiguous f32 rows of `width` on the CPU."""
    what = f"tensor `{name}` of shape {tuple(weight.shape)}"
    if weight.dtype not in FLOAT_DTYPES or weight.is_meta:
        raise T2NErrorImpossibleQuantization(f"{what}: cannot quantize {weight.dtype} values on {weight.device}")
    if reason := q40_shape_reason(weight.shape):
        raise T2NErrorImpossibleQuantization(f"{what}: {reason}. Leave it out of the quantization")
    if width < GROUP or width % GROUP or weight.shape[1:].numel() % width:
        raise T2NErrorInvalidArgument(f"{what} has no rows of {width} elements: statistics of another tensor?")
    return loaded(weight.detach()).to("cpu", torch.float32).reshape(-1, width).contiguous()


def _planes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = own_memory((rows.numel() // 2,), torch.uint8)
    return codes, own_memory((rows.numel() // GROUP, 1), torch.float16)


def _packed(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, name: str) -> QTensorTractScaleOnly:
    scheme = QScalePerGroupF16(GROUP, scales.to(weight.device), n_bits=4)
    return QTensorTractScaleOnly.from_packed(
        codes.to(weight.device), weight.shape, scheme, weight.dtype, (NibblePacking(),), nnef_name=name or None
    )


def _floats(values: torch.Tensor) -> _native.Floats:
    return values.float().contiguous().numpy().reshape(-1)
