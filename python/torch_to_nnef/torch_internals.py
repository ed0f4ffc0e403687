"""All that this package takes from torch without torch promising to keep it: where a new torch breaks us, it breaks here."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.functions import Max as SymMax
from torch.utils._sympy.functions import Min as SymMin

__all__ = [
    "FakeTensorMode",
    "FloorDiv",
    "JitBlock",
    "JitGraph",
    "JitNode",
    "OpOverload",
    "OpOverloadPacket",
    "ShapeEnv",
    "SymMax",
    "SymMin",
    "in_backward",
    "inline_calls",
    "is_composite",
    "no_torch_function",
    "operator_name",
    "parse_schema",
    "pytree",
    "quantized_decomposed",
    "recurrent_functions",
    "script_class",
    "since",
    "without_torch_function",
]

OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket

JitGraph = torch._C.Graph
JitNode = torch._C.Node
JitBlock = torch._C.Graph | torch._C.Block
inline_calls = torch._C._jit_pass_inline
parse_schema = torch._C.parse_schema

# Where nn.LSTM and its like look `lstm`... up.
recurrent_functions: Any = torch._VF

# For a tensor subclass whose operators need no look at the subclass.
no_torch_function = torch._C._disabled_torch_function_impl
without_torch_function = torch._C.DisableTorchFunctionSubclass

quantized_decomposed: Any = torch.ops.quantized_decomposed


def in_backward() -> bool:
    """Whether autograd is computing a gradient in this thread."""
    return torch._C._current_autograd_node() is not None


def since(version: str, *names: str) -> list[OpOverload]:
    """Overloads of aten (`relu.default`) that torch has had since `version`; none before."""
    if torch.__version__ < torch.torch_version.TorchVersion(version):
        return []
    packets = ((getattr(torch.ops.aten, name), overload) for name, _, overload in (n.partition(".") for n in names))
    return [getattr(packet, overload) for packet, overload in packets]


def operator_name(target: Any) -> str:
    """`namespace::name` of an operator, given with or without its overload; empty for any other function."""
    if isinstance(target, OpOverload):
        return target._schema.name
    return target._qualified_op_name if isinstance(target, OpOverloadPacket) else ""


def script_class(held: torch.ScriptObject) -> str:
    """Name of the C++ class of an object."""
    name: str = held._type().name()  # type: ignore[attr-defined]
    return name


def is_composite(op: OpOverload) -> bool:
    """Whether torch computes `op` by calling other operators, one of which may be given back as it is."""
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))  # type: ignore[no-untyped-call]
