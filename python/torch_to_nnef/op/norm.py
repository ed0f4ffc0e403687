"""Normalizations, with trained statistics or over the tensor itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.layer_norm.default)
def layer_norm(
    e: Emitter,
    input: Ref,
    normalized_shape: Sequence[int],
    weight: Ref | None = None,
    bias: Ref | None = None,
    eps: float = 1e-5,
) -> Ref:
    """(x - mean) / sqrt(var + eps) over the last axes, times weight, plus bias."""
    axes = list(range(input.rank - len(normalized_shape), input.rank))
    if weight is not None and bias is not None:
        lead = list(range(axes[0]))
        return e.op("t2n_layer_norm_affine", input, weight, bias, out=input.shape, axes=axes, lead=lead, eps=float(eps))
    return _affine(e, e.op("t2n_layer_norm", input, axes=axes, eps=float(eps)), weight, bias)


@lowers(aten.rms_norm.default)
def rms_norm(
    e: Emitter, input: Ref, normalized_shape: Sequence[int], weight: Ref | None = None, eps: float | None = None
) -> Ref:
    """X / sqrt(mean(x^2) + eps) over the last axis, times weight; eps defaults to the dtype's epsilon."""
    if len(normalized_shape) != 1:
        raise e.refuse("rms_norm over several axes; flatten them first")
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(e, e.op("tract_core_rms_norm", input, axis=input.rank - 1, eps=float(eps)), weight, None)


def _affine(e: Emitter, x: Ref, weight: Ref | None, bias: Ref | None) -> Ref:
    if weight is not None:
        x = e.op("mul", x, e.lift(weight, x.rank), hint="scaled")
    return x if bias is None else e.op("add", x, e.lift(bias, x.rank), hint="biased")


@lowers(aten.batch_norm.default)
def batch_norm(
    e: Emitter,
    input: Ref,
    weight: Ref | None,
    bias: Ref | None,
    running_mean: Ref | None,
    running_var: Ref | None,
    training: bool = False,
    eps: float = 1e-5,
) -> Ref:
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias, a channel each (axis 1)."""
    if training or running_mean is None or running_var is None:
        raise e.refuse("batch_norm with the statistics of the batch; use eval mode and track_running_stats=True")
    ones = [torch.ones(1, dtype=input.dtype), torch.zeros(1, dtype=input.dtype)]
    scale = e.constant(ones[0], "scale") if weight is None else weight
    offset = e.constant(ones[1], "offset") if bias is None else bias
    around = [0, *range(2, input.rank)]
    mean, var, offset, scale = (e.unsqueeze(t, around) for t in (running_mean, running_var, offset, scale))
    return e.op("batch_normalization", input, mean, var, offset, scale, epsilon=float(eps))


@lowers(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm(
    e: Emitter,
    input: Ref,
    weight: Ref | None,
    bias: Ref | None,
    running_mean: Ref,
    running_var: Ref,
    eps: float,
) -> list[Ref]:
    """Batch norm as decompositions leave it: the saved statistics beside the result are empty in eval mode."""
    return [batch_norm(e, input, weight, bias, running_mean, running_var, training=False, eps=eps)]


@lowers(aten.instance_norm.default)
def instance_norm(
    e: Emitter,
    input: Ref,
    weight: Ref | None = None,
    bias: Ref | None = None,
    use_input_stats: bool = True,
    eps: float = 1e-5,
) -> Ref:
    """Layer norm over the positions of each channel; input (N, C, *)."""
    if not use_input_stats:
        raise e.refuse("instance_norm with running statistics; it is then a batch_norm")
    normal = e.op("t2n_layer_norm", input, axes=list(range(2, input.rank)), eps=float(eps))
    return _per_channel(e, normal, weight, bias)


@lowers(aten.group_norm.default)
def group_norm(
    e: Emitter, input: Ref, num_groups: int, weight: Ref | None = None, bias: Ref | None = None, eps: float = 1e-5
) -> Ref:
    """Layer norm over each group of channels and all positions; input (N, C, *)."""
    batch, channels, *positions = input.shape
    if not isinstance(channels, int):
        raise e.refuse("the number of channels is dynamic")
    grouped = e.reshape(input, (batch, num_groups, math.prod([channels // num_groups, *positions])))
    normal = e.reshape(e.op("t2n_layer_norm", grouped, axes=[2], eps=float(eps)), input.shape)
    return _per_channel(e, normal, weight, bias)


def _per_channel(e: Emitter, x: Ref, weight: Ref | None, bias: Ref | None) -> Ref:
    around = [0, *range(2, x.rank)]
    if weight is not None:
        x = e.op("mul", x, e.unsqueeze(weight, around), hint="scaled")
    return x if bias is None else e.op("add", x, e.unsqueeze(bias, around), hint="biased")
