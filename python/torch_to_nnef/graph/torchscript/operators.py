"""Operators of TorchScript's graphs: torch's own by their schema; those on numbers, lists and text as Python's."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import gelu, linear, multi_head_attention_forward

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.torch_internals import JitNode, OpOverload, parse_schema

# In the order of c10::ScalarType: TorchScript says dtypes as positions in it.
_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128),
    *(torch.bool, torch.qint8, torch.quint8, torch.qint32, torch.bfloat16),
)


def call(node: JitNode, args: list[Any]) -> Any:
    """The value of `node` for `args`, a list if it has several."""
    kind = node.kind()
    # A traced size goes through tensors (`prim::NumToTensor`); here it stays a number, and so does what is computed from it.
    numbers = not any(isinstance(arg, torch.Tensor) for arg in args)
    python = (_NUMBERS.get(kind) if numbers else None) or _VALUES.get(kind)
    if python is not None:
        return python(*args)
    if kind.startswith(("quantized::", "aten::quantize_per")):
        raise T2NErrorNotImplemented(
            f"a ScriptModule that computes in 8 bits ({kind}): export the model that was scripted"
        )
    overload = _overload(node.schema())
    if overload is None:
        raise T2NErrorNotImplemented(f"TorchScript's {kind} has no equivalent in an exported graph")
    positional = [a for a in overload._schema.arguments if not a.kwarg_only]
    named = {a.name: v for a, v in zip(overload._schema.arguments, args, strict=True) if a.kwarg_only}
    return overload(*args[: len(positional)], **named)


@functools.cache
def _overload(schema: str) -> OpOverload | None:
    if schema == "(no schema)":
        return None
    parsed = parse_schema(schema)
    namespace, name = parsed.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return getattr(packet, parsed.overload_name or "default", None)


def _add(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a + b if alpha == 1 else a + alpha * b


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return a / b
    return a // b if rounding_mode == "floor" or (a >= 0 and b > 0) else torch.sym_int(a / b)


# On numbers, lists and text; the operator of torch's on tensors.
_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "aten::add": _add,
    "aten::sub": lambda a, b, alpha=1: a - alpha * b,
    "aten::rsub": lambda a, b, alpha=1: b - alpha * a,
    "aten::mul": operator.mul,
    "aten::div": _divide,
    "aten::floordiv": operator.floordiv,
    "aten::floor_divide": operator.floordiv,
    "aten::remainder": operator.mod,
    "aten::neg": operator.neg,
    "aten::pow": operator.pow,
    "aten::abs": abs,
    "aten::sqrt": torch.sym_sqrt,
    "aten::exp": math.exp,
    "aten::log": math.log,
    "aten::log2": math.log2,
    "aten::floor": math.floor,
    "aten::ceil": math.ceil,
    "aten::round": round,
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
    "aten::__and__": operator.and_,
    "aten::__or__": operator.or_,
    "aten::__xor__": operator.xor,
    "aten::slice": lambda items, start=None, end=None, step=1: items[start:end:step],
    "aten::sort": lambda items, reverse=False: items.sort(reverse=reverse),
    "aten::sorted": lambda items, *_: sorted(items),
    "aten::sum": sum,
    "aten::all": all,
    "aten::any": any,
    "aten::max": max,
    "aten::min": min,
    # Casts of a traced size change nothing.
    "aten::to": lambda number, *_: number,
    "aten::detach": lambda number: number,
    "aten::item": lambda number: number,
}


def _size(tensor: torch.Tensor, axis: int | None = None) -> Any:
    return list(tensor.shape) if axis is None else tensor.shape[axis]


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _tensor(data: Any, dtype: int | None = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(data, dtype=None if dtype is None else _DTYPES[dtype], device=device)


def _raise(message: str, kind: str = "") -> Any:
    raise T2NErrorNotImplemented(f"the ScriptModule refuses its sample inputs: {kind.rpartition('.')[2]}: {message}")


def _set(container: Any, key: Any, value: Any) -> None:
    container[key] = value


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> Any:
    """What a traced nn.Conv calls, as the function of torch that has a name."""
    rank, (output_padding, groups, *_) = weight.dim() - 2, rest
    if transposed:
        function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
        return function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1](x, weight, bias, stride, padding, dilation, groups)


def _range_length(low: int, high: int, step: int) -> int:
    return max(0, (high - low + step - (1 if step > 0 else -1)) // step)


def _same(value: Any, *_: Any) -> Any:
    return value


def _nothing(*_: Any) -> None:
    return None


def _attention(
    query: Any,
    key: Any,
    value: Any,
    width: int,
    heads: int,
    qkv: Any,
    qkv_bias: Any,
    out: Any,
    out_bias: Any,
    mask: Any,
    *options: Any,
) -> Any:
    """The fast path of nn.MultiheadAttention, as its slow one."""
    if mask is not None:
        raise T2NErrorNotImplemented("a mask on TorchScript's fast path of attention; export the nn.Module instead")
    need_weights, average, *_ = options
    q, k, v = (side.transpose(0, 1) for side in (query, key, value))
    y, weights = multi_head_attention_forward(
        q, k, v, width, heads, qkv, qkv_bias, None, None, False, 0.0, out, out_bias, False,
        need_weights=need_weights, average_attn_weights=average,
    )  # fmt: skip
    return y.transpose(0, 1), weights


def _encoder_layer(
    x: Any,
    width: int,
    heads: int,
    qkv: Any,
    qkv_bias: Any,
    out: Any,
    out_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    *rest: Any,
) -> Any:
    """The fast path of nn.TransformerEncoderLayer, spelled out."""
    norm1, bias1, norm2, bias2, wide, wide_bias, narrow, narrow_bias, mask, mask_type = rest

    def attend(x: Any) -> Any:
        return _attention(x, x, x, width, heads, qkv, qkv_bias, out, out_bias, mask, False, True, mask_type)[0]

    def feed(x: Any) -> Any:
        hidden = linear(x, wide, wide_bias)
        return linear(gelu(hidden) if use_gelu else hidden.relu(), narrow, narrow_bias)

    for part, norm, bias in ((attend, norm1, bias1), (feed, norm2, bias2)):
        if norm_first:
            x = x + part(torch.layer_norm(x, [width], norm, bias, eps))
        else:
            x = torch.layer_norm(x + part(x), [width], norm, bias, eps)
    return x


def _of_torch(name: str) -> Callable[..., Any]:
    """By the name a capture may replace, see `patches.py`."""
    return lambda *args: getattr(torch, name)(*args)


# Whatever the arguments are.
_VALUES: Mapping[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::DictConstruct": lambda *items: dict(zip(items[::2], items[1::2], strict=True)),
    "prim::TupleIndex": operator.getitem,
    "prim::TupleSlice": lambda items, start, end: items[start:end],
    "prim::NumToTensor": _same,
    "prim::unchecked_cast": _same,
    "prim::unchecked_unwrap_optional": _same,
    "aten::_unwrap_optional": _same,
    "prim::data": _same,
    "prim::Uninitialized": _nothing,
    "prim::RaiseException": _raise,
    "prim::Print": _nothing,
    "aten::warn": _nothing,
    "prim::device": lambda tensor: tensor.device,
    "prim::dtype": lambda tensor: _DTYPES.index(tensor.dtype),
    "prim::layout": lambda tensor: tensor.layout,
    "prim::is_cuda": lambda tensor: tensor.is_cuda,
    "prim::requires_grad": lambda tensor: False,
    "prim::min": min,
    "prim::max": max,
    "aten::tensor": _tensor,
    "aten::as_tensor": lambda data, *options: data if isinstance(data, torch.Tensor) else _tensor(data, *options),
    "aten::_convolution": _convolution,
    "aten::_native_multi_head_attention": _attention,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    **{f"aten::{name}": _of_torch(name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "max_pool1d")},
    "aten::size": _size,
    "aten::stride": lambda tensor, axis=None: list(tensor.stride()) if axis is None else tensor.stride(axis),
    "aten::numel": lambda tensor: tensor.numel(),
    "aten::dim": lambda tensor: tensor.dim(),
    "aten::len": lambda value: value.shape[0] if isinstance(value, torch.Tensor) else len(value),
    "aten::is_floating_point": lambda tensor: tensor.is_floating_point(),
    "aten::is_complex": lambda tensor: tensor.is_complex(),
    "aten::Int": lambda value: torch.sym_int(_item(value)),
    "aten::IntImplicit": _item,
    "aten::Float": lambda value: torch.sym_float(_item(value)),
    "aten::FloatImplicit": _item,
    "aten::Bool": bool,
    "aten::ScalarImplicit": _item,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::__not__": operator.not_,
    "aten::__contains__": operator.contains,
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": _set,
    "aten::__range_length": _range_length,
    "aten::__derive_index": lambda index, start, step: start + index * step,
    "aten::append": lambda items, item: items.append(item) or items,
    "aten::extend": lambda items, more: items.extend(more),
    "aten::insert": lambda items, index, item: items.insert(index, item),
    "aten::pop": lambda items, *index: items.pop(*index),
    "aten::reverse": lambda items: items.reverse(),
    "aten::list": list,
    "aten::copy": lambda container: container.copy(),
    "aten::keys": lambda mapping: list(mapping.keys()),
    "aten::values": lambda mapping: list(mapping.values()),
    "aten::items": lambda mapping: list(mapping.items()),
    "aten::get": lambda mapping, key, default=None: mapping.get(key, default),
    "aten::format": lambda text, *values: text.format(*values),
    "aten::str": str,
}
