"""Activations: tract's own operator where it has one, else a fragment (see `fragments.py`)."""

from __future__ import annotations

import torch

from torch_to_nnef.op.elementwise import clamp, compare, select
from torch_to_nnef.op.emitter import Emitter, Scalar
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Lowering, Ref

aten = torch.ops.aten

# NNEF operator or fragment of ours -> ATen op without parameters.
_PLAIN = {
    "relu": aten.relu.default,
    "tract_core_silu": aten.silu.default,
    "t2n_hardsigmoid": aten.hardsigmoid.default,
    "t2n_hardswish": aten.hardswish.default,
    "t2n_mish": aten.mish.default,
    "t2n_relu6": aten.relu6.default,
    "t2n_selu": aten.selu.default,
    "t2n_log_sigmoid": aten.log_sigmoid.default,
}


def _plain(operator: str) -> Lowering:
    def lower(e: Emitter, x: Ref) -> Ref:
        return e.op(operator, x)

    return lower


for _operator, _op in _PLAIN.items():
    lowers(_op)(_plain(_operator))


@lowers(aten.gelu.default)
def gelu(e: Emitter, x: Ref, approximate: str = "none") -> Ref:
    """X * Phi(x), with erf or with its tanh approximation (Hendrycks and Gimpel 2016)."""
    if approximate == "tanh":
        return e.op("tract_core_gelu_approx", x, fast_impl=False)
    return e.op("t2n_gelu", x)


@lowers(aten.leaky_relu.default)
def leaky_relu(e: Emitter, x: Ref, negative_slope: float = 0.01) -> Ref:
    """x, or negative_slope * x below zero."""
    return e.op("leaky_relu", x, alpha=float(negative_slope))


@lowers(aten.elu.default)
def elu(e: Emitter, x: Ref, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Ref:
    """Scale * (x, or alpha * (exp(input_scale * x) - 1) below zero)."""
    return e.op("t2n_elu", x, alpha=float(alpha), scale=float(scale), input_scale=float(input_scale))


@lowers(aten.celu.default)
def celu(e: Emitter, x: Ref, alpha: float = 1) -> Ref:
    """x, or alpha * (exp(x / alpha) - 1) below zero."""
    return e.op("t2n_elu", x, alpha=float(alpha), scale=1.0, input_scale=1 / alpha)


@lowers(aten.hardtanh.default)
def hardtanh(e: Emitter, x: Ref, min_val: float = -1, max_val: float = 1) -> Ref:
    """Clamp to [min_val, max_val]."""
    return e.op("clamp", x, float(min_val), float(max_val))


@lowers(aten.softplus.default)
def softplus(e: Emitter, x: Ref, beta: float = 1, threshold: float = 20) -> Ref:
    """log(1 + exp(beta * x)) / beta, linear above threshold."""
    return e.op("t2n_softplus", x, beta=float(beta), threshold=float(threshold))


@lowers(aten.threshold.default)
def threshold(e: Emitter, x: Ref, threshold: Scalar, value: Scalar) -> Ref:
    """X above threshold, else `value`."""
    return select(e, compare(e, "gt", x, threshold), x, value)


@lowers(aten.hardshrink.default)
def hardshrink(e: Emitter, x: Ref, lambd: Scalar = 0.5) -> Ref:
    """0 between -lambd and lambd, else x."""
    inside = e.binary("and", compare(e, "ge", x, -lambd), compare(e, "le", x, lambd), torch.bool)
    return select(e, inside, 0, x)


@lowers(aten.softshrink.default)
def softshrink(e: Emitter, x: Ref, lambd: Scalar = 0.5) -> Ref:
    """0 between -lambd and lambd, else x moved by lambd towards 0."""
    return e.op("sub", x, clamp(e, x, -lambd, lambd))


@lowers(aten.rrelu.default)
def rrelu(e: Emitter, x: Ref, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Ref:
    """Out of training, leaky_relu with the mean of both slopes."""
    if training:
        raise e.refuse("random slopes; put the model in eval mode")
    return leaky_relu(e, x, (lower + upper) / 2)


@lowers(aten.prelu.default)
def prelu(e: Emitter, x: Ref, weight: Ref) -> Ref:
    """x, or weight * x below zero, one weight a channel (axis 1)."""
    if weight.shape == (1,):
        weight = e.squeeze(weight, [0])
    elif weight.rank and x.rank > 1:
        weight = e.unsqueeze(weight, [0, *range(2, x.rank)])
    return e.op("t2n_prelu", x, weight)


@lowers(aten.softmax.int, aten._softmax.default)
def softmax(e: Emitter, x: Ref, dim: int) -> Ref:
    """exp(x) / sum over one axis."""
    return e.op("softmax", e.cast(x, e.out.dtype), axes=[e.axis(dim)])


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(e: Emitter, x: Ref, dim: int) -> Ref:
    """X - log(sum(exp(x))) over one axis."""
    return e.op("tract_core_log_softmax", e.cast(x, e.out.dtype), axes=[e.axis(dim)])


@lowers(aten.glu.default)
def glu(e: Emitter, x: Ref, dim: int = -1) -> Ref:
    """First half times the sigmoid of the second, along one axis."""
    axis = e.axis(dim)
    half = e.out.shape[axis]
    return e.op("mul", e.slice(x, axis, 0, half), e.op("sigmoid", e.slice(x, axis, half, half)))
