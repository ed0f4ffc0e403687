"""8-bit arithmetic of a captured graph, whoever quantized the model: quantize and dequantize become explicit, products run on codes.

Three ways in: `quantized_decomposed` calls (PT2E, and reference modules of `torch.ao` models), weights that are `QTensorInt8`, and both.
One way out: `t2n` nodes (see `integer_ops`), int8 codes between them. What has no integer form is computed in floats, between dequantize
and quantize, exactly as torch's reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph import integer_ops as ops
from torch_to_nnef.graph.fold import values
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.products import FACTORS, multiplied
from torch_to_nnef.graph.requantize import requantize
from torch_to_nnef.graph.rewriting import Rewriting
from torch_to_nnef.graph.uses import is_transpose
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant import QParams, QTensorInt8

_NAMESPACE = "quantized_decomposed::"


def _name(node: Node) -> str:
    name: str = node.target.name()  # type: ignore[no-untyped-call]
    return name


def has_codes(graph: Graph) -> bool:
    """Whether anything of the graph is in 8 bits."""
    return any(isinstance(graph.tensors[fqn], QTensorInt8) for fqn in graph.weights.values()) or any(
        node.target is ops.dequantize_chosen or _name(node).startswith(_NAMESPACE) for node in graph.nodes
    )


def to_integers(graph: Graph) -> Graph:
    """`graph` with its 8-bit arithmetic in integers; itself if there is none.

    Raises `T2NErrorNotImplemented` for a scheme that tract has no equivalent of, with the module path.
    """
    return requantize(multiplied(_explicit(graph))) if has_codes(graph) else graph


@dataclass(frozen=True)
class Weight:
    """Codes (int8) of a weight, with scale and zero point (None: 0) of the tensor or of each index of `axis`."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    axis: int


# -- quantize, dequantize and 8-bit weights as nodes of ours


def _explicit(graph: Graph) -> Graph:
    rewriting = Rewriting(graph)
    packed = {name: t for name, fqn in graph.weights.items() if isinstance(t := graph.tensors[fqn], QTensorInt8)}
    inputs = _input_qparams(graph)
    codes: dict[int, tuple[Value | None, ...]] = {}
    for node in graph.nodes:
        for value in values((node.args, dict(node.kwargs))):
            if (tensor := packed.pop(value.name, None)) is not None:
                if id(tensor) not in codes:  # shared weights have their codes once
                    codes[id(tensor)] = _stored(rewriting, _weight_of(tensor), graph.weights[value.name])
                rewriting.replace(value, _dequantized(rewriting, codes[id(tensor)], node, tensor.axis or 0, value))
        if _name(node).startswith(_NAMESPACE):
            if not _constant(rewriting, node) and not _FOREIGN.get(_name(node), _unknown)(rewriting, node):
                raise T2NErrorNotImplemented(
                    f"{node.target} at {node.where()}: tract has codes of 8 bits with a scale and zero point known at export; "
                    "quantize statically, per tensor for activations, or leave this part in float"
                )
        else:
            rewriting.keep(_with_rounded_input(rewriting, inputs, node))
    return rewriting.done()


def _unknown(rewriting: Rewriting, node: Node) -> bool:
    return False


def _constant(rewriting: Rewriting, node: Node) -> bool:
    """Quantize what is known: the float weight of a model whose constants were not folded."""
    found = [rewriting.tensor(v) for v in values((node.args, dict(node.kwargs)))]
    if ".quantize_per" not in f".{_name(node).removeprefix(_NAMESPACE)}" or any(t is None for t in found):
        return False
    args = [rewriting.tensor(a) if isinstance(a, Value) else a for a in node.args]
    codes = node.target(*[loaded(a) if isinstance(a, torch.Tensor) else a for a in args])
    rewriting.replace(node.outputs[0], rewriting.store(codes, f"{rewriting.weights[node.args[0].name]}.codes"))
    return True


def _weight_of(tensor: QTensorInt8) -> Weight:
    return _as_weight(tensor.codes, tensor.qscheme.scale, tensor.qscheme.zero_point, tensor.axis)


def _as_weight(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, axis: int | None) -> Weight:
    """Signed codes; a zero point of zeros is none."""
    codes, scale = loaded(codes), loaded(scale).to(torch.float32).reshape(-1)
    zeros = torch.zeros_like(scale) if zero_point is None else loaded(zero_point).to(torch.float32).reshape(-1)
    if codes.dtype is torch.uint8:
        codes, zeros = (codes.to(torch.int16) - 128).to(torch.int8), zeros - 128
    return Weight(codes.contiguous(), scale, zeros if bool(zeros.any()) else None, axis or 0)


def _stored(rewriting: Rewriting, weight: Weight, fqn: str) -> tuple[Value | None, ...]:
    rewriting.tensors.pop(fqn, None)  # the codes take its name
    codes, scale = rewriting.store(weight.codes, fqn), rewriting.store(weight.scale, f"{fqn}.scale")
    return codes, scale, None if weight.zero_point is None else rewriting.store(weight.zero_point, f"{fqn}.zero_point")


def _dequantized(
    rewriting: Rewriting, parts: tuple[Value | None, ...], like: Node, axis: int, value: Value, name: str = ""
) -> Value:
    return rewriting.add(ops.dequantize_weight, (*parts, axis), like, value.shape, value.dtype, name)


def _input_qparams(graph: Graph) -> dict[str, QParams]:
    """By the name of a weight, or of its transpose: how what it is multiplied with is rounded."""
    found = {}
    for name, fqn in graph.weights.items():
        tensor = graph.tensors[fqn]
        if isinstance(tensor, QTensorInt8) and tensor.input_qparams is not None:
            found[name] = tensor.input_qparams
    for node in graph.nodes:
        if is_transpose(node) and (qparams := found.get(node.args[0].name)) is not None:
            found[node.outputs[0].name] = qparams
    return found


def _with_rounded_input(rewriting: Rewriting, inputs: Mapping[str, QParams], node: Node) -> Node:
    """A product with a weight that says how its other factor is rounded."""
    if node.target not in FACTORS:
        return node
    weight, other = FACTORS[node.target]
    if (qparams := inputs.get(node.args[weight].name)) is None:
        return node
    args = list(node.args)
    args[other] = _rounded(rewriting, args[other], qparams, node)
    return replace(node, args=tuple(args))


def _rounded(rewriting: Rewriting, x: Value, q: QParams, like: Node) -> Value:
    shift = 128 if q.dtype is torch.uint8 else 0
    zero = q.zero_point - shift
    args = (x, q.scale, zero, q.quant_min - shift, q.quant_max - shift)
    codes = rewriting.add(ops.quantize, args, like, x.shape, torch.int8)
    return rewriting.add(ops.dequantize, (codes, q.scale, zero), like, x.shape, x.dtype)


def _quantize(rewriting: Rewriting, node: Node) -> bool:
    x, scale, zero, low, high, dtype = node.args[:6]
    scale, zero = (_number(rewriting, value) for value in (scale, zero))
    if scale is None or zero is None or dtype not in _SHIFTS:
        return False
    shift = _SHIFTS[dtype]
    out = node.outputs[0]
    name = "" if shift else out.name
    codes = rewriting.add(
        ops.quantize, (x, scale, zero - shift, low - shift, high - shift), node, out.shape, torch.int8, name
    )
    rewriting.replace(out, codes)
    return True


def _dequantize(rewriting: Rewriting, node: Node) -> bool:
    codes, scale, zero, _, _, dtype = node.args[:6]
    scale, zero = (_number(rewriting, value) for value in (scale, zero))
    if scale is None or zero is None:
        return False
    if rewriting.tensor(codes) is not None:
        return _dequantize_constant(rewriting, node, codes, torch.tensor([scale]), torch.tensor([zero]), 0)
    if dtype not in _SHIFTS:
        return False
    out = node.outputs[0]
    rewriting.add(
        ops.dequantize, (rewriting.current(codes), scale, zero - _SHIFTS[dtype]), node, out.shape, out.dtype, out.name
    )
    return True


def _dequantize_channels(rewriting: Rewriting, node: Node) -> bool:
    codes, scales, zeros, axis = node.args[:4]
    scale, zero = rewriting.tensor(scales), rewriting.tensor(zeros) if zeros is not None else None
    if rewriting.tensor(codes) is None or scale is None:
        return False
    return _dequantize_constant(rewriting, node, codes, scale, zero, axis)


def _dequantize_constant(
    rewriting: Rewriting, node: Node, codes: Value, scale: torch.Tensor, zero: torch.Tensor | None, axis: int
) -> bool:
    tensor, fqn = rewriting.tensor(codes), rewriting.weights[codes.name]
    if tensor is None or tensor.dtype not in (torch.int8, torch.uint8, torch.int32):
        return False
    if tensor.dtype is torch.int32:  # a bias
        zeros = 0 if zero is None else loaded(zero)
        value = ((loaded(tensor) - zeros).to(torch.float64) * loaded(scale)).to(torch.float32)
        rewriting.replace(node.outputs[0], rewriting.store(value, f"{fqn}.dequantized"))
        return True
    parts = _stored(rewriting, _as_weight(tensor, scale, zero, axis), fqn)
    _dequantized(rewriting, parts, node, axis, node.outputs[0], node.outputs[0].name)
    return True


def _number(rewriting: Rewriting, value: Any) -> Any:
    """A literal, or what a tensor of one element of the model holds; None if it is computed."""
    if not isinstance(value, Value):
        return value
    tensor = rewriting.tensor(value)
    return None if tensor is None or tensor.numel() != 1 else tensor.item()


_SHIFTS = {torch.int8: 0, torch.uint8: 128}
_FOREIGN: Mapping[str, Callable[[Rewriting, Node], bool]] = {
    f"{_NAMESPACE}quantize_per_tensor": _quantize,
    f"{_NAMESPACE}quantize_per_tensor.tensor": _quantize,
    f"{_NAMESPACE}dequantize_per_tensor": _dequantize,
    f"{_NAMESPACE}dequantize_per_tensor.tensor": _dequantize,
    f"{_NAMESPACE}dequantize_per_channel": _dequantize_channels,
}
