"""Half precision: what of a model in f16 is computed in f32 and rounded once, as torch does it on a CPU, and what in f16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from torch_to_nnef.graph.ir import Node
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Lowering, Ref, Result
from torch_to_nnef.torch_internals import pytree

# Operators that tract would round within, or compute from few digits, in f16.
_NAMES = """
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d batch_norm _native_batch_norm_legit_no_training
instance_norm _weight_norm softmax _softmax log_softmax _log_softmax celu col2im elu gelu glu hardsigmoid
hardswish leaky_relu log_sigmoid mish prelu selu silu softplus sigmoid tanh erf erfc exp exp2 expm1 log log10 log1p log2 pow sin cos
rsqrt linalg_vector_norm var
"""
_IN_SINGLE = frozenset(_NAMES.split())
# Option of TractNNEF -> the operators that it moves to f32, and that are computed in f16 without it.
PARTS: Mapping[str, frozenset[str]] = {
    "force_attention_inner_in_f32": frozenset(
        {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"}
    ),
    "force_linear_accumulation_in_f32": frozenset({"linear", "addmm"}),
    "force_norm_in_f32": frozenset(
        {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm"}
    ),
}
# Their operands stay in f16, weights and caches above all: tract multiplies f16 by f32, and only sums are in f32.
_SUMS = PARTS["force_attention_inner_in_f32"] | PARTS["force_linear_accumulation_in_f32"]


def forced(target: TractNNEF) -> frozenset[str]:
    """The names of operators that the options of `target` move to f32."""
    return frozenset().union(*(names for option, names in PARTS.items() if getattr(target, option)))


def advice(nodes: Iterable[Node], target: TractNNEF) -> str:
    """The options that would move some of these calls from f16 to f32, as a sentence; empty if none would."""
    names = {_name(node) for node in nodes if _gives_halves(node)}
    options = [f"{option}=True" for option, part in PARTS.items() if part & names and not getattr(target, option)]
    if not options:
        return ""
    return f"parts of the model are computed in f16, where torch computes in f32: TractNNEF({', '.join(options)}) does so too"


def needs_single(e: Emitter, node: Node) -> bool:
    """Whether the operands are to be cast to f32."""
    return _gives_halves(node) and _name(node) in _IN_SINGLE | (e.forced - _SUMS)


def in_half(e: Emitter) -> bool:
    """Whether the call may sum products in f16: then tract sums as suits the machine, in f32 where it has no arithmetic in f16."""
    return e.out.dtype is torch.float16 and _name(e.node) in _SUMS - e.forced


def _gives_halves(node: Node) -> bool:
    return any(value.dtype is torch.float16 for value in node.outputs)


def _name(node: Node) -> str:
    namespace, _, name = node.target._schema.name.partition("::")
    return name if namespace == "aten" else ""


def in_single(e: Emitter, node: Node, lower: Lowering, arguments: Mapping[str, Any]) -> Result:
    """Run the handler as if the model were f32 here, and round what it gives; packed weights stay as they are."""

    def widened(value: Any) -> Any:
        is_half = isinstance(value, Ref) and value.dtype is torch.float16 and not e.is_quantized(value)
        return e.cast(value, torch.float32) if is_half else value

    arguments = pytree.tree_map(widened, dict(arguments))
    outputs = [replace(v, dtype=torch.float32) if v.dtype is torch.float16 else v for v in node.outputs]
    e.node = replace(node, outputs=tuple(outputs))
    result = lower(e, **arguments)
    e.node = node
    if isinstance(result, Ref):
        return e.cast(result, node.outputs[0].dtype)
    pairs = zip(result, node.outputs, strict=False)
    return [e.cast(ref, value.dtype) if isinstance(ref, Ref) else ref for ref, value in pairs]
