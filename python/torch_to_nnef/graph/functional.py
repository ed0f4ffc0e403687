"""In-place calls that nothing else can observe (`relu_` behind a convolution), made functional in place of a second trace."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from torch_to_nnef.torch_internals import OpOverload, is_composite

# Composite operators that give a tensor of their own; the schema of a composite one does not tell.
_OWN_RESULT = """
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm layer_norm group_norm instance_norm
"""
# In place by name only: no value changes.
_GRADIENT_ONLY = frozenset({torch.ops.aten.detach_.default})


def writes_in_place(module: GraphModule) -> bool:
    """Whether a call changes one of its arguments: handlers want values that stay."""
    return any(_is_in_place(node) for node in module.graph.nodes)


def make_functional(module: GraphModule) -> None:
    """Replace `y = relu_(x)` by `y = relu(x)`, and later uses of x by y, where x is a fresh tensor without views."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        functional = _functional(node.target) if _is_in_place(node) else None
        if functional is None or not _is_alone(node, order):
            continue
        node.target = functional
        node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, at=node: order[user] > order[at])
    module.recompile()


def _is_in_place(node: FxNode) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable and target not in _GRADIENT_ONLY


def _functional(op: OpOverload) -> OpOverload | None:
    """`relu` for `relu_`: the overload of the same arguments, of which `op` changes the first alone."""
    namespace, _, name = op._schema.name.partition("::")
    changed = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    found: OpOverload | None = getattr(packet, op._overloadname, None)
    same = found is not None and _rest(found) == _rest(op)
    return found if same and name.endswith("_") and changed == [True] + [False] * (len(changed) - 1) else None


def _rest(op: OpOverload) -> list[str]:
    """Names of all arguments but the first, which is `self` or `input`."""
    return [argument.name for argument in op._schema.arguments[1:]]


def _is_alone(node: FxNode, order: dict[FxNode, int]) -> bool:
    """Whether the changed tensor is fresh, nothing before the call shares its memory, and its dtype stays."""
    changed = node.args[0]
    if not isinstance(changed, FxNode) or not _is_fresh(changed):
        return False
    others = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    users = [user for user in changed.users if user is not node]
    return (
        all(value.dtype == changed.meta["val"].dtype for value in others)
        and not any(user.op == "output" for user in users)
        and all(_is_fresh(user) for user in users if order[user] < order[node])
    )


def _is_fresh(node: FxNode) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or any(r.alias_info for r in target._schema.returns):
        return False
    composite = is_composite(target)
    return not composite or target._schema.name.split("::")[1] in _OWN_RESULT.split()
