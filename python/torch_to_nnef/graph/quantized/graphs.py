"""Converted models that are graphs of torch.fx: FX graph mode, and what torchao makes of an exported model (PT2E)."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.fx.traceback
from torch import fx, nn
from torch.nn import functional

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph.quantized.dynamic import RUN_TIME
from torch_to_nnef.graph.quantized.values import quantize_per_tensor
from torch_to_nnef.graph.quantized.weights import Weight, as_int8, product_of
from torch_to_nnef.tensor.quant.affine import RANGES
from torch_to_nnef.tensor.quant.int8 import QTensorInt8
from torch_to_nnef.torch_internals import operator_name, quantized_decomposed, script_class

_quantized = torch.ops.quantized
_QUANTIZE = (torch.quantize_per_tensor, torch.quantize_per_channel)
_DEQUANTIZE = (
    quantized_decomposed.dequantize_per_tensor.default,
    quantized_decomposed.dequantize_per_channel.default,
)
# How torch.ao names what it makes of observers.
_PARAMETER = re.compile(r"_(scale|zero_point)_\d+$")


def packed_weights(module: fx.GraphModule) -> dict[int, Weight]:
    """Id of each packed weight that the graph gives to functions -> what stands in for it.

    Raises:
        T2NErrorNotImplemented: A kind of weight that is not known.

    """
    found: dict[int, Weight] = {}
    for node in module.graph.nodes:
        held = _attribute(module, node)
        if isinstance(held, torch.ScriptObject):
            kind = script_class(held)
            user = next((_operator(user) for user in node.users), "")
            make = _PACKED.get((kind, user.startswith("conv1d")))
            if make is None:
                raise T2NErrorNotImplemented(
                    f"`{node.target}` is a {kind}, read by {user or 'nothing'}: leave it float, or use modules instead of functions"
                )
            found[id(held)] = make(held)
    return found


def rewrite(module: fx.GraphModule) -> None:
    """Change the graph of `module` in place: 8-bit weights become parameters, calls of `torch.quantize_per_tensor` ours."""
    for name in ("train", "eval"):  # which refuse, where torch.export made the module
        module.__dict__.pop(name, None)
    parameters = _Parameters(module)
    for node in list(module.graph.nodes):
        if node.target in _QUANTIZE or _operator(node):
            number = partial(_number, module)
            node.args, node.kwargs = (fx.node.map_arg(a, number) for a in (node.args, node.kwargs))
        held = _attribute(module, node.args[0]) if node.target in (*_QUANTIZE, *_DEQUANTIZE) else None
        if node.target in _DEQUANTIZE and isinstance(held, torch.Tensor) and held.dtype in RANGES:
            parameters.put(node, _dequantized(module, node), [node])
        elif node.target in _QUANTIZE and isinstance(held, nn.Parameter):
            args = [held.detach(), *(_attribute(module, value, value) for value in node.args[1:])]
            parameters.put(node, as_int8(node.target(*args)), list(node.users), node.args[0].target)
        elif node.target is torch.quantize_per_tensor:
            node.target = quantize_per_tensor
        elif node.target in RUN_TIME and _attribute(module, node.args[1]) is None:
            node.target = RUN_TIME[node.target]
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in module._buffers.keys() - read:
        del module._buffers[name]
    module.recompile()
    if hasattr(module, "_in_spec"):
        _keep_places(module)


def _keep_places(module: fx.GraphModule) -> None:
    """Let nodes of an exported model keep the module and the line that they had there, when they are captured again."""
    generated = type(module).forward

    @functools.wraps(generated)
    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(generated).bind(self, *args, **kwargs)
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(self).run(*list(bound.arguments.values())[1:])

    type(module).forward = forward  # the class is this module's own


class _Parameters:
    """Puts weights where the floats they were made of are."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._done: dict[str, str] = {}
        read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
        self._floats = {name: p for name, p in module.named_parameters() if name not in read}

    def put(self, node: fx.Node, weight: QTensorInt8, replaced: list[fx.Node], name: str = "") -> None:
        """Let the users of the nodes `replaced` read `weight`, a parameter, instead."""
        graph, source = self._module.graph, str(node.args[0].target)  # type: ignore[union-attr]
        if source not in self._done:
            self._done[source] = name or self._name(weight) or source
            path, _, leaf = self._done[source].rpartition(".")
            holder = self._module.get_submodule(path)
            for held in (holder._parameters, holder._buffers, holder.__dict__):
                held.pop(leaf, None)
            holder.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
        with graph.inserting_before(node):
            read = graph.get_attr(self._done[source])
        for old in replaced:
            old.replace_all_uses_with(read)
            graph.erase_node(old)
        if node not in replaced:
            graph.erase_node(node)

    def _name(self, weight: QTensorInt8) -> str:
        """The float weight that `weight` is within half a step of; torchao leaves it in the model, but says no names."""
        step = weight.qscheme.along(weight.qscheme.scale, weight.dim())
        for name, value in self._floats.items():
            if value.shape == weight.shape and bool(((value - weight).abs() <= 0.51 * step).all()):
                del self._floats[name]
                return name
        return ""


def _dequantized(module: fx.GraphModule, node: fx.Node) -> QTensorInt8:
    codes, scale, zero_point, *rest = (_attribute(module, value, value) for value in node.args)
    axis = rest.pop(0) if node.target is _DEQUANTIZE[1] else None
    scale, zero_point = (torch.as_tensor(value).reshape(-1) for value in (scale, zero_point))
    return QTensorInt8.from_codes(codes, scale, zero_point, axis, quant_min=rest[0])


def _operator(node: fx.Node) -> str:
    """Name of an operator of `torch.ops.quantized`; empty if it is something else."""
    name = operator_name(node.target)
    return name.removeprefix("quantized::") if name.startswith("quantized::") else ""


def _attribute(module: fx.GraphModule, node: Any, default: Any = None) -> Any:
    """What a `get_attr` node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return default
    path, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(path), name)


def _number(module: fx.GraphModule, node: fx.Node) -> Any:
    """Scales and zero points as numbers, since a graph holds them as such."""
    held = _attribute(module, node)
    scalar = isinstance(held, torch.Tensor) and held.numel() == 1 and _PARAMETER.search(str(node.target))
    return held.item() if scalar else node


def _linear(packed: Any) -> Weight:
    weight, bias = _quantized.linear_unpack(packed)
    return Weight(as_int8(weight), bias, functional.linear)


def _conv(function: Callable[..., torch.Tensor], spatial: int, packed: Any) -> Weight:
    kind = "conv3d" if spatial == 3 else "conv2d"
    if getattr(_quantized, f"{kind}_transpose")(packed):
        raise T2NErrorNotImplemented(
            "transposed convolutions as functions: use nn.ConvTranspose modules, or leave them float"
        )
    weight, bias = getattr(_quantized, f"conv{spatial}d_unpack")(packed)
    names = ("stride", "padding", "dilation")
    options = {name: getattr(_quantized, f"{kind}_{name}")(packed)[-spatial:] for name in names}
    groups = getattr(_quantized, f"{kind}_groups")(packed)
    return Weight(as_int8(weight), bias, product_of(function, groups=groups, **options))


# Class of the packed weight, whether it is read by conv1d (which packs as conv2d does) -> what makes a weight of it.
_PACKED: Mapping[tuple[str, bool], Callable[[Any], Weight]] = {
    ("LinearPackedParamsBase", False): _linear,
    ("Conv2dPackedParamsBase", True): partial(_conv, functional.conv1d, 1),
    ("Conv2dPackedParamsBase", False): partial(_conv, functional.conv2d, 2),
    ("Conv3dPackedParamsBase", False): partial(_conv, functional.conv3d, 3),
}
