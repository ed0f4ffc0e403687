"""What a quantized tensor of torch is in a reference model, and what each function does with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn import functional

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph.quantized.dynamic import run_time
from torch_to_nnef.tensor.quant.affine import RANGES, QParams
from torch_to_nnef.torch_internals import operator_name, pytree, quantized_decomposed

CODES = {torch.quint8: torch.uint8, torch.qint8: torch.int8}
"""Dtype of a quantized tensor -> dtype of its codes."""


class Quantized:
    """Codes of 8 bits, and what they mean.

    It is no tensor: torch's functions give calls with one to `__torch_function__`, so the forward of a converted model runs as it is
    written. Whatever has no rule here is refused.
    """

    def __init__(self, codes: torch.Tensor, qparams: QParams) -> None:
        self.codes = codes
        self.qparams = qparams

    @cached_property
    def value(self) -> torch.Tensor:
        """The float values."""
        return self.steps(self.qparams.scale)

    def steps(self, scale: float = 1.0) -> torch.Tensor:
        """The values in steps of `scale`; in steps of 1 they are integers, which sums keep exact."""
        q = self.qparams
        value: torch.Tensor = quantized_decomposed.dequantize_per_tensor(
            self.codes, scale, q.zero_point, q.quant_min, q.quant_max, q.dtype
        )
        return value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.codes, name)
        method = getattr(torch.Tensor, name)
        if callable(method):
            return partial(call, method, self)
        raise AttributeError(name)

    def __getitem__(self, index: Any) -> Quantized:
        return onto(self.value[index], self.qparams)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the quantized tensor this stands for."""
        return torch.qint8 if self.qparams.dtype == torch.int8 else torch.quint8

    @property
    def is_quantized(self) -> bool:
        """True: modules of torch ask."""
        return True

    def q_scale(self) -> float:
        """As of a quantized tensor."""
        return self.qparams.scale

    def q_zero_point(self) -> int:
        """As of a quantized tensor."""
        return self.qparams.zero_point


def onto(value: torch.Tensor, qparams: QParams) -> Quantized:
    """`value` rounded to `qparams`; always written out, so that every operator stands between a dequantize and a quantize."""
    return Quantized(_codes(value, qparams, qparams.scale), qparams)


def _codes(value: torch.Tensor, q: QParams, scale: float) -> torch.Tensor:
    codes: torch.Tensor = quantized_decomposed.quantize_per_tensor(
        value, scale, q.zero_point, q.quant_min, q.quant_max, q.dtype
    )
    return codes


def per_tensor(scale: Any, zero_point: Any, dtype: torch.dtype) -> QParams:
    """The parameters of `torch.quantize_per_tensor(_, scale, zero_point, dtype)`.

    Raises:
        T2NErrorNotImplemented: `dtype` has no 8-bit codes.

    """
    if dtype not in CODES:
        raise T2NErrorNotImplemented(f"activations in {dtype}: quantize them to torch.quint8 or torch.qint8")
    return QParams(float(scale), int(zero_point), CODES[dtype], *RANGES[CODES[dtype]])


def quantize_per_tensor(x: torch.Tensor, scale: Any, zero_point: Any, dtype: torch.dtype) -> Quantized:
    """As `torch.quantize_per_tensor`."""
    return onto(x, per_tensor(scale, zero_point, dtype))


def call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`func`, a function, method or operator of torch, with a `Quantized` or a packed weight among its arguments."""
    name = operator_name(func) or func.__name__
    base = name.removesuffix("_")
    if name in OPERATORS:
        return OPERATORS[name](*args, **kwargs)
    if name in _FACTS:
        return func(args[0].codes, *args[1:], **kwargs)
    if base not in _SAME and base not in _FIXED and base not in _AVERAGES:
        raise T2NErrorNotImplemented(
            f"`{name}` of a quantized tensor has no reference form: put a DeQuantStub before it (and a QuantStub behind), "
            "or leave it to a module that is converted"
        )
    inplace = name != base or kwargs.get("inplace", False)
    if inplace:
        func, kwargs = _out_of_place(func, base), {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
    first = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Quantized))
    qparams = _FIXED[base](first.qparams) if base in _FIXED else first.qparams
    if base in _AVERAGES:
        return Quantized(_codes(func(first.steps(), *args[1:], **kwargs), qparams, 1.0), qparams)
    args, kwargs = pytree.tree_map_only(Quantized, lambda q: q.value, (args, kwargs))
    result = pytree.tree_map_only(torch.Tensor, lambda value: onto(value, qparams), func(*args, **kwargs))
    if not inplace:
        return result
    first.__dict__.update(result.__dict__)
    first.__dict__.pop("value", None)
    return first


def _out_of_place(func: Any, base: str) -> Any:
    if func.__name__ == base:
        return func
    return next(getattr(home, base) for home in (torch, functional) if hasattr(home, base))


# Answered by the codes.
_FACTS = frozenset(("device", "dim", "is_contiguous", "ndim", "ndimension", "numel", "shape", "size", "stride"))
# Means of codes often lie in the middle between two codes. In integers they are rounded as torch rounds them where channels are last in
# memory, as quantized convolutions leave them; for other layouts torch adds the zero point before it rounds half to even.
_AVERAGES = frozenset((
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "interpolate", "upsample",
))  # fmt: skip
# Results keep the scale and zero point of the (first) input. What selects or compares values, or moves them, changes no code; what
# bends them is rounded.
_SAME = frozenset((
    "cat", "channel_shuffle", "chunk", "clamp", "clip", "clone", "concat", "contiguous", "detach", "dropout",
    "expand", "expand_as", "flatten", "flip", "gelu", "hardtanh", "index_select", "leaky_relu", "masked_fill",
    "max_pool1d", "max_pool2d", "max_pool3d", "mean", "movedim", "narrow", "pad", "permute", "pixel_shuffle",
    "pixel_unshuffle", "relu", "relu6", "repeat", "reshape", "select", "split", "squeeze", "stack", "swapaxes", "t",
    "to", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view",
))  # fmt: skip
# Results have a scale and zero point of their own: from aten/src/ATen/native/quantized/cpu/{qsigmoid,qhardsigmoid,qtanh}.cpp.
_FIXED: Mapping[str, Callable[[QParams], QParams]] = {
    "hardsigmoid": lambda q: _like(q, 1 / 256, q.quant_min),
    "sigmoid": lambda q: _like(q, 1 / 256, q.quant_min),
    "tanh": lambda q: _like(q, 2 / 256, q.quant_min + 128),
}


def _like(qparams: QParams, scale: Any, zero_point: Any) -> QParams:
    return QParams(float(scale), int(zero_point), qparams.dtype, qparams.quant_min, qparams.quant_max)


def _as_is(x: torch.Tensor) -> torch.Tensor:
    return x


# -- operators of `torch.ops.quantized`; those not here have no rule.


def _weighted(
    after: Callable[..., torch.Tensor], x: Quantized, weight: Any, scale: Any, zero: Any, *more: Any
) -> Quantized:
    return onto(after(weight.product(x.value), *more), _like(x.qparams, scale, zero))


def _conv_add(
    after: Callable[..., torch.Tensor], x: Quantized, other: Quantized, weight: Any, scale: Any, zero: Any
) -> Quantized:
    return onto(after(weight.product(x.value) + other.value), _like(x.qparams, scale, zero))


def _pair(
    function: Callable[..., torch.Tensor],
    after: Callable[..., torch.Tensor],
    a: Quantized,
    b: Quantized,
    scale: Any,
    zero_point: Any,
) -> Quantized:
    return onto(after(function(a.value, b.value)), _like(a.qparams, scale, zero_point))


def _unary(
    function: Callable[..., torch.Tensor], x: Quantized, output_scale: Any, output_zero_point: Any, *more: Any
) -> Quantized:
    return onto(function(x.value, *more), _like(x.qparams, output_scale, output_zero_point))


def _cat(
    after: Callable[..., torch.Tensor],
    values: Sequence[Quantized],
    dim: int = 0,
    scale: Any = None,
    zero_point: Any = None,
) -> Quantized:
    own = values[0].qparams
    qparams = own if scale is None else _like(own, scale, zero_point)
    return onto(after(torch.cat([x.value for x in values], dim)), qparams)


def _batch_norm(
    after: Callable[..., torch.Tensor],
    x: Quantized,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    eps: float,
    scale: Any,
    zero: Any,
) -> Quantized:
    return onto(after(functional.batch_norm(x.value, mean, var, weight, bias, eps=eps)), _like(x.qparams, scale, zero))


def _layer_norm(
    x: Quantized, shape: Any, weight: Any, bias: Any, eps: float, output_scale: Any, output_zero_point: Any
) -> Quantized:
    value = functional.layer_norm(x.value, shape, weight, bias, eps)
    return onto(value, _like(x.qparams, output_scale, output_zero_point))


def _group_norm(
    x: Quantized, groups: int, weight: Any, bias: Any, eps: float, output_scale: Any, output_zero_point: Any
) -> Quantized:
    value = functional.group_norm(x.value, groups, weight, bias, eps)
    return onto(value, _like(x.qparams, output_scale, output_zero_point))


def _instance_norm(
    x: Quantized, weight: Any, bias: Any, eps: float, output_scale: Any, output_zero_point: Any
) -> Quantized:
    value = functional.instance_norm(x.value, weight=weight, bias=bias, eps=eps)
    return onto(value, _like(x.qparams, output_scale, output_zero_point))


def _softmax(x: Quantized, dim: int, scale: Any, zero_point: Any) -> Quantized:
    return onto(functional.softmax(x.value, dim), _like(x.qparams, scale, zero_point))


def _leaky_relu(x: Quantized, slope: float, inplace: bool, scale: Any, zero_point: Any) -> Quantized:
    return onto(functional.leaky_relu(x.value, slope), _like(x.qparams, scale, zero_point))


def _prelu(x: Quantized, weight: torch.Tensor, scale: Any, zero_point: Any) -> Quantized:
    return onto(functional.prelu(x.value, weight), _like(x.qparams, scale, zero_point))


def _elu(x: Quantized, scale: Any, zero_point: Any, alpha: float = 1.0, *_: Any) -> Quantized:
    return onto(functional.elu(x.value, alpha), _like(x.qparams, scale, zero_point))


def _add_scalar(after: Callable[..., torch.Tensor], x: Quantized, number: float) -> Quantized:
    """The number is counted in steps, and moves the zero point: aten/src/ATen/native/quantized/cpu/BinaryOps.cpp."""
    own = x.qparams
    steps = round(number / own.scale)
    zero = own.zero_point - steps
    nearest = min(max(zero, own.quant_min), own.quant_max)
    width = own.quant_max - own.quant_min
    # Where the zero point would leave the codes, the step grows instead.
    scale = own.scale * (width + abs(zero - nearest)) / width
    return onto(after(x.value + steps * own.scale), _like(own, scale, nearest))


def _mul_scalar(after: Callable[..., torch.Tensor], x: Quantized, number: float) -> Quantized:
    """The number goes into the scale; a negative one turns the codes around: aten/src/ATen/native/quantized/cpu/BinaryOps.cpp."""
    own = x.qparams
    if number == 0:
        qparams = _like(own, 1.0, 0)
    elif number > 0:
        qparams = _like(own, own.scale * number, own.zero_point)
    else:
        qparams = _like(own, own.scale * -number, own.quant_max + own.quant_min - own.zero_point)
    return onto(after(x.value * number), qparams)


def _either(scalar: Callable[..., Quantized], pair: Callable[..., Quantized]) -> Callable[..., Quantized]:
    """The overload that fits: a number or a tensor as the second argument."""
    return lambda a, b, *rest, **named: (pair if isinstance(b, Quantized) else scalar)(a, b, *rest, **named)


_AFTER: Mapping[str, Callable[..., torch.Tensor]] = {"": _as_is, "_relu": functional.relu}
OPERATORS: Mapping[str, Callable[..., Any]] = {
    **{
        f"quantized::{name}{suffix}": partial(_weighted, after)
        for name in ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
        for suffix, after in _AFTER.items()
    },
    **{f"quantized::conv2d_add{suffix}": partial(_conv_add, after) for suffix, after in _AFTER.items()},
    **{f"quantized::cat{suffix}": partial(_cat, after) for suffix, after in _AFTER.items()},
    **{
        f"quantized::{name}{suffix}": partial(_batch_norm, after)
        for name in ("batch_norm", "batch_norm1d", "batch_norm2d", "batch_norm3d")
        for suffix, after in _AFTER.items()
    },
    **{
        f"quantized::{name}{suffix}": _either(partial(scalar, after), partial(_pair, function, after))
        for name, scalar, function in (("add", _add_scalar, torch.add), ("mul", _mul_scalar, torch.mul))
        for suffix, after in _AFTER.items()
    },
    **{
        f"quantized::{name}{suffix}": partial(scalar, after)
        for name, scalar in (("add_scalar", _add_scalar), ("mul_scalar", _mul_scalar))
        for suffix, after in _AFTER.items()
    },
    "quantized::linear_leaky_relu": partial(_weighted, functional.leaky_relu),
    "quantized::linear_tanh": partial(_weighted, torch.tanh),
    "quantized::matmul": partial(_pair, torch.matmul, _as_is),
    "quantized::hardswish": partial(_unary, functional.hardswish),
    "quantized::sigmoid": partial(_unary, torch.sigmoid),
    "quantized::celu": partial(_unary, functional.celu),
    "quantized::dropout": partial(_unary, lambda x, *_: x),
    "quantized::elu": _elu,
    "quantized::leaky_relu": _leaky_relu,
    "quantized::prelu": _prelu,
    "quantized::relu6": lambda x, inplace=False: onto(functional.relu6(x.value), x.qparams),
    "quantized::clamp": lambda x, low=None, high=None: onto(torch.clamp(x.value, low, high), x.qparams),
    "quantized::softmax": _softmax,
    "quantized::layer_norm": _layer_norm,
    "quantized::group_norm": _group_norm,
    "quantized::instance_norm": _instance_norm,
    "quantized::linear_dynamic": lambda x, weight, reduce_range=False: weight.product(run_time(x, reduce_range)),
    "quantized::linear_relu_dynamic": lambda x, weight, reduce_range=False: functional.relu(
        weight.product(run_time(x, reduce_range))
    ),
    "quantized::linear_dynamic_fp16": lambda x, weight: weight.product(x),
    "quantized::linear_relu_dynamic_fp16": lambda x, weight: functional.relu(weight.product(x)),
    "dequantize": lambda x: x.value,
}
