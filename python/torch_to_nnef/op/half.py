"""Half precision: torch computes an operator in f32 and rounds its result once to f16, and so do we, where tract would not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torch_to_nnef.graph.ir import Node
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.statement import Ref

# Operators that move values or round once in f16 as well; products with `acc = "f32"` keep their weights in f16.
_AS_THEY_ARE = """
_to_copy _unsafe_view alias alpha_dropout arange cat chunk clone concat constant_pad_nd contiguous detach detach_ dropout
embedding empty expand expand_as eye feature_dropout flatten flip full full_like gather index index_select lift_fresh
lift_fresh_copy masked_fill movedim narrow new_full new_ones new_zeros ones ones_like pad permute pixel_shuffle
pixel_unshuffle repeat repeat_interleave reshape roll scalar_tensor select slice slice_scatter split split_with_sizes squeeze
stack t to transpose tril triu type_as unbind unflatten unfold unsqueeze view where zeros zeros_like
abs add ceil clamp clamp_max clamp_min div floor hardtanh max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum
minimum mul neg relu round rsub sign sqrt sub trunc
einsum linear
"""


def needs_single(node: Node) -> bool:
    """Whether tract would round within the call."""
    name = node.target._schema.name.split("::")[1]
    return name not in _AS_THEY_ARE.split() and any(value.dtype is torch.float16 for value in node.outputs)


def in_single(
    e: Emitter, node: Node, lower: Callable[..., Ref | list[Ref]], arguments: Mapping[str, Any]
) -> Ref | list[Ref]:
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
    return [e.cast(ref, value.dtype) for ref, value in zip(result, node.outputs, strict=False)]
