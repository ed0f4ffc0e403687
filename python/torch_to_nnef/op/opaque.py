"""Modules kept whole: the lowering that was registered for the class."""

from __future__ import annotations

from typing import Any

import torch

from torch_to_nnef.exceptions import T2NErrorConsistency
from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.graph.opaque import call_named
from torch_to_nnef.op import extensions
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import OPS, lowers
from torch_to_nnef.op.statement import Ref


@lowers(torch.ops.t2n.module.default)
def module(e: Emitter, inputs: list[Ref], weights: list[Ref], sizes: list[Dim], call: str) -> list[Ref]:
    """What the lowering of the module's class gives, if it is what forward gives."""
    record = call_named(call)
    name = type(record.module).__name__
    handler = OPS.modules[type(record.module)]
    args, kwargs = record.arguments(inputs, sizes)
    with extensions.blamed(handler.lower, name, e.node.where()):
        result = handler.lower(e, record.module, dict(zip(record.names, weights, strict=True)), *args, **kwargs)
    results: list[Any] = list(result) if isinstance(result, (list, tuple)) else [result]
    given = [(tuple(r.shape), r.dtype) if isinstance(r, Ref) else r for r in results]
    wanted = [(v.shape, v.dtype) for v in e.node.outputs]
    if given != wanted:
        raise T2NErrorConsistency(
            f"the lowering of {name} at {e.node.where()} gives {given}, forward gives {wanted}: say shape and dtype with out= and dtype="
        )
    return results
