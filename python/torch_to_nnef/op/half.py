"""Half precision: torch computes an operator in f32 and rounds its result once to f16, and so do we, where tract would not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from torch_to_nnef.graph.ir import Node
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Lowering, Ref, Result
from torch_to_nnef.torch_internals import pytree

# Operators that tract would round within, or compute from few digits, in f16.
_IN_SINGLE = """
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d batch_norm _native_batch_norm_legit_no_training
layer_norm native_layer_norm group_norm native_group_norm instance_norm _weight_norm scaled_dot_product_attention softmax _softmax
log_softmax _log_softmax celu col2im elu gelu glu hardsigmoid hardswish leaky_relu log_sigmoid mish prelu selu silu softplus sigmoid tanh
erf erfc exp exp2 expm1 log log10 log1p log2 pow sin cos rsqrt linalg_vector_norm var
"""


def needs_single(node: Node) -> bool:
    """Whether tract would round within the call."""
    namespace, _, name = node.target._schema.name.partition("::")
    halves = any(value.dtype is torch.float16 for value in node.outputs)
    return halves and namespace == "aten" and name in _IN_SINGLE.split()


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
