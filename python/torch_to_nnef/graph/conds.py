"""torch.cond as arithmetic: NNEF has no `if`, so both branches are computed and one is chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node


def inline_conds(module: GraphModule) -> None:
    """Write out every torch.cond on a tensor, in place. Torch has checked that branches are pure and agree in shapes and dtypes."""
    cond = torch.ops.higher_order.cond
    found = [n for n in module.graph.nodes if n.target is cond and isinstance(n.args[0].meta.get("val"), torch.Tensor)]
    if not found:
        return
    for node in found:
        _inline(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _inline(module: GraphModule, node: Node) -> None:
    choice, yes, no, operands = node.args
    with module.graph.inserting_before(node):
        sides = [_copy(module, module.get_submodule(branch.target), operands) for branch in (yes, no)]  # type: ignore[union-attr, arg-type]
    for user in list(node.users):
        # A getitem, turned in place: it may be an output, and those are known by name.
        index: Any = user.args[1]
        user.target = torch.ops.aten.where.self
        user.args = (choice, sides[0][index], sides[1][index])
    module.graph.erase_node(node)


def _copy(module: GraphModule, branch: Any, operands: Any) -> Any:
    inline_conds(branch)
    inputs = [n for n in branch.graph.nodes if n.op == "placeholder"]
    return module.graph.graph_copy(branch.graph, dict(zip(inputs, operands, strict=True)))
