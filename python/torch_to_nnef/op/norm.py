"""Normalizations, with trained statistics or over the tensor itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref
from torch_to_nnef.torch_internals import since

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
    if weight is not None and bias is not None and input.dtype is torch.float32:
        affine = [e.lift(parameter, input.rank) for parameter in (weight, bias)]
        return e.op("t2n_layer_norm_affine", input, *affine, out=input.shape, axes=axes, eps=float(eps))
    return _affine(e, _normal(e, input, axes, eps), weight, bias)


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    e: Emitter,
    input: Ref,
    normalized_shape: Sequence[int],
    weight: Ref | None,
    bias: Ref | None,
    eps: float,
) -> list[Ref]:
    """Layer norm as decompositions leave it, with the mean and the inverse deviation."""
    axes = list(range(input.rank - len(normalized_shape), input.rank))
    return [layer_norm(e, input, normalized_shape, weight, bias, eps), *_statistics(e, input, axes, eps)]


@lowers(aten.rms_norm.default)
def rms_norm(
    e: Emitter, input: Ref, normalized_shape: Sequence[int], weight: Ref | None = None, eps: float | None = None
) -> Ref:
    """X / sqrt(mean(x^2) + eps) over the last axes, times weight; eps defaults to the epsilon of the dtype torch computes in."""
    computed = torch.float32 if input.dtype is torch.float16 else input.dtype
    eps = float(torch.finfo(computed).eps if eps is None else eps)
    axes = list(range(input.rank - len(normalized_shape), input.rank))
    if len(axes) > 1:
        wide = e.op("t2n_rms_norm", e.cast(input, torch.float32), axes=axes, eps=eps)
        return _affine(e, e.cast(wide, input.dtype), weight, None)
    return _affine(e, e.op("tract_core_rms_norm", input, axis=axes[0], eps=eps), weight, None)


@lowers(*since("2.8", "_fused_rms_norm.default"))
def fused_rms_norm(
    e: Emitter, input: Ref, normalized_shape: Sequence[int], weight: Ref | None, eps: float | None
) -> list[Ref]:
    """RMS norm as decompositions leave it; only the values are given."""
    return [rms_norm(e, input, normalized_shape, weight, eps)]


def _normal(e: Emitter, x: Ref, axes: Sequence[int], eps: float) -> Ref:
    """(x - mean) / sqrt(var + eps) over `axes`; the squares, which may be beyond f16, in f32: tract's RMS norm does so by itself."""
    if x.dtype is torch.float16 and len(axes) == 1:
        mean = e.op("mean_reduce", x, out=tuple(1 if i in axes else d for i, d in enumerate(x.shape)), axes=list(axes))
        return e.op("tract_core_rms_norm", e.op("sub", x, mean, hint="centered"), axis=axes[0], eps=float(eps))
    wide = e.op("t2n_layer_norm", e.cast(x, torch.float32), axes=list(axes), eps=float(eps))
    return e.cast(wide, x.dtype)


def _statistics(e: Emitter, x: Ref, axes: Sequence[int], eps: float) -> list[Ref]:
    """Mean and 1 / sqrt(var + eps) over `axes`, which keep size 1."""
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    mean = e.op("mean_reduce", x, out=shape, axes=list(axes))
    squares = e.op("square", e.op("sub", x, mean, hint="centered"))
    variance = e.op("mean_reduce", squares, out=shape, axes=list(axes))
    return [mean, e.op("rsqrt", e.binary("add", variance, float(eps), x.dtype))]


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
    """(x - mean) / sqrt(var + eps) * weight + bias, a channel each (axis 1); of the batch where no statistics were kept."""
    if running_mean is None or running_var is None:
        axes = [a for a in range(input.rank) if a != 1]
        return _per_channel(e, _normal(e, input, axes, eps), weight, bias)
    if training:
        raise e.refuse("batch_norm in training mode, which updates its statistics; call model.eval()")
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


@lowers(aten._native_batch_norm_legit.no_stats)
def native_batch_norm_of_batch(
    e: Emitter, input: Ref, weight: Ref | None, bias: Ref | None, training: bool, eps: float
) -> list[Ref]:
    """The same with the statistics of the batch, which are results as well."""
    axes = [a for a in range(input.rank) if a != 1]
    statistics = [e.squeeze(s, axes) for s in _statistics(e, input, axes, eps)]
    return [batch_norm(e, input, weight, bias, None, None, training, eps), *statistics]


@lowers(aten.instance_norm.default)
def instance_norm(
    e: Emitter,
    input: Ref,
    weight: Ref | None = None,
    bias: Ref | None = None,
    running_mean: Ref | None = None,
    running_var: Ref | None = None,
    use_input_stats: bool = True,
    eps: float = 1e-5,
) -> Ref:
    """Layer norm over the positions of each channel; input (N, C, *)."""
    if not use_input_stats:
        return batch_norm(e, input, weight, bias, running_mean, running_var, eps=eps)
    return _per_channel(e, _normal(e, input, range(2, input.rank), eps), weight, bias)


@lowers(aten.group_norm.default)
def group_norm(
    e: Emitter, input: Ref, num_groups: int, weight: Ref | None = None, bias: Ref | None = None, eps: float = 1e-5
) -> Ref:
    """Layer norm over each group of channels and all positions; input (N, C, *)."""
    normal = _normal(e, _grouped(e, input, num_groups), [2], eps)
    return _per_channel(e, e.reshape(normal, input.shape), weight, bias)


@lowers(aten.native_group_norm.default)
def native_group_norm(
    e: Emitter,
    input: Ref,
    weight: Ref | None,
    bias: Ref | None,
    group: int,
    eps: float,
) -> list[Ref]:
    """Group norm as decompositions leave it, with the mean and the inverse deviation of each group."""
    statistics = _statistics(e, _grouped(e, input, group), [2], eps)
    return [group_norm(e, input, group, weight, bias, eps), *(e.squeeze(s, [2]) for s in statistics)]


def _grouped(e: Emitter, x: Ref, groups: int) -> Ref:
    batch, channels, *positions = x.shape
    if not isinstance(channels, int):
        raise e.refuse("the number of channels is dynamic")
    return e.reshape(x, (batch, groups, math.prod([channels // groups, *positions])))


def _per_channel(e: Emitter, x: Ref, weight: Ref | None, bias: Ref | None) -> Ref:
    around = [0, *range(2, x.rank)]
    if weight is not None:
        x = e.op("mul", x, e.unsqueeze(weight, around), hint="scaled")
    return x if bias is None else e.op("add", x, e.unsqueeze(bias, around), hint="biased")


@lowers(aten._weight_norm.default)
def weight_norm(e: Emitter, v: Ref, g: Ref, dim: int = 0) -> Ref:
    """Filter g * v / |v|, the norm over all axes but `dim`; of constants, so tract computes it when it loads the archive."""
    axes = [axis for axis in range(v.rank) if axis != e.axis(dim)]
    squares = e.op("sum_reduce", e.op("square", v), out=g.shape, axes=axes)
    return e.op("mul", v, e.op("mul", g, e.op("rsqrt", squares)))
