"""Complex values as tract has them, which is not at all: real numbers with a last axis of size 2, as torch.view_as_real gives them.

A complex `Ref` has torch's shape and dtype; its identifier holds the real layout. Operators that treat both parts alike are the real ones
on that layout, and products are those of the parts: they need no handler of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torch_to_nnef.graph.ir import Node, Value
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import OPS, OpOverload, OpTable
from torch_to_nnef.op.statement import Ref, Result

aten = torch.ops.aten


def real_layout(z: Ref) -> Ref:
    """torch.view_as_real: the same identifier."""
    return replace(z, shape=(*z.shape, 2), dtype=z.dtype.to_real()) if z.dtype.is_complex else z


def as_complex(x: Ref) -> Ref:
    """torch.view_as_complex: the same identifier."""
    return replace(x, shape=x.shape[:-1], dtype=x.dtype.to_complex())


def promote(e: Emitter, x: Ref, dtype: torch.dtype) -> Ref:
    """`x`, complex or real, as complex values of `dtype`."""
    if x.dtype.is_complex:
        return as_complex(e.cast(real_layout(x), dtype.to_real()))
    x = e.unsqueeze(e.cast(x, dtype.to_real()), [x.rank])
    padding = [(0, 0)] * (x.rank - 1) + [(0, 1)]
    shape = (*x.shape[:-1], 2)
    return as_complex(e.op("pad", x, out=shape, hint="complex", padding=padding, border="constant", value=0.0))


@contextmanager
def seen_as(e: Emitter, *outputs: Value) -> Iterator[Node]:
    """The node as if it had these outputs: what a handler of real values then reads."""
    node = e.node
    e.node = replace(node, outputs=outputs)
    try:
        yield e.node
    finally:
        e.node = node


def is_complex(node: Node) -> bool:
    """Whether a value or a number of the call is complex."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs), node.outputs))
    return any(leaf.dtype.is_complex if isinstance(leaf, Value) else isinstance(leaf, complex) for leaf in leaves)


# Operators that treat both parts alike and know nothing of their last axis.
_LAYOUT = frozenset(
    {
        aten._unsafe_view.default,
        aten.alias.default,
        aten.cat.default,
        aten.chunk.default,
        aten.clone.default,
        aten.concat.default,
        aten.constant_pad_nd.default,
        aten.contiguous.default,
        aten.cumsum.default,
        aten.detach.default,
        aten.detach_.default,
        aten.dropout.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.flatten.using_ints,
        aten.flip.default,
        aten.index_select.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.mean.default,
        aten.mean.dim,
        aten.narrow.default,
        aten.pad.default,
        aten.repeat.default,
        aten.reshape.default,
        aten.roll.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.stack.default,
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
# Those over all axes, as the operator that takes axes.
_OVER_DIMS = {aten.mean.default: aten.mean.dim, aten.sum.default: aten.sum.dim_IntList}


_ALONG_AXES = frozenset(
    {*_OVER_DIMS.values(), aten.cumsum.default, aten.flip.default, aten.index_select.default, aten.roll.default}
)
# Operators that are bilinear in two operands -> their names.
_PRODUCTS: Mapping[OpOverload, tuple[str, str]] = {
    aten.bmm.default: ("self", "mat2"),
    aten.conv1d.default: ("input", "weight"),
    aten.conv2d.default: ("input", "weight"),
    aten.linear.default: ("input", "weight"),
    aten.matmul.default: ("self", "other"),
    aten.mm.default: ("self", "mat2"),
}
_CHANNELS_SECOND = frozenset({aten.conv1d.default, aten.conv2d.default})


class ComplexTable(OpTable):
    """Handlers of calls with complex values."""

    def __contains__(self, op: OpOverload) -> bool:
        return op in _LAYOUT or op in _PRODUCTS or super().__contains__(op)

    def lower(self, emitter: Emitter, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Result:
        """Run the handler of `node`, or that of real values on their layout."""
        given = dict(zip((a.name for a in node.target._schema.arguments), args, strict=False)) | dict(kwargs)
        if node.target in _LAYOUT:
            return _in_layout(emitter, node, given)
        if node.target in _PRODUCTS:
            return _product(emitter, node, given)
        return super().lower(emitter, node, args, kwargs)


COMPLEX = ComplexTable()
lowers_complex = COMPLEX.lowers


def table_of(node: Node) -> OpTable:
    """The table that has the handler of `node`, if there is one."""
    return COMPLEX if is_complex(node) else OPS


def part(e: Emitter, z: Ref, index: int) -> Ref:
    """The real (0) or the imaginary (1) part."""
    return e.squeeze(e.slice(real_layout(z), z.rank, index, 1), [z.rank])


def join(e: Emitter, re: Ref, im: Ref) -> Ref:
    """A complex value of its parts, of one shape."""
    columns = [e.unsqueeze(part, [part.rank]) for part in (re, im)]
    return as_complex(e.op("concat", columns, out=(*re.shape, 2), dtype=re.dtype, axis=re.rank))


def _product(e: Emitter, node: Node, given: dict[str, Any]) -> Ref:
    """(a + bi)(c + di) = ac - bd + (ad + bc)i, and a bias that is added."""
    left, right = _PRODUCTS[node.target]
    a, b, c, d = (part(e, given[name], index) for name in (left, right) for index in (0, 1))
    bias: Ref | None = given.pop("bias", None)
    out = node.outputs[0]
    with seen_as(e, Value(out.name, out.shape, a.dtype)) as real:
        ac, bd, ad, bc = (
            OPS.lower(e, real, (), {**given, left: x, right: y}) for x, y in ((a, c), (b, d), (a, d), (b, c))
        )
        product = join(e, e.op("sub", ac, bd), e.op("add", ad, bc))
    if bias is None:
        return product
    behind = len(out.shape) - 2 if node.target in _CHANNELS_SECOND else 0
    column = e.unsqueeze(real_layout(bias), list(range(1, 1 + behind)))
    return as_complex(e.binary("add", real_layout(product), column, column.dtype))


def _in_layout(e: Emitter, node: Node, given: dict[str, Any]) -> Result:
    given.pop("dtype", None)  # the output says it
    first = next(leaf for leaf in pytree.tree_leaves(list(given.values())) if isinstance(leaf, Ref))
    rank = max(first.rank, len(node.outputs[0].shape))
    target = node.target
    target = _OVER_DIMS.get(target, target)
    if target in _OVER_DIMS.values() and not given.get("dim"):
        given["dim"] = list(range(first.rank))
    if target in _ALONG_AXES and first.rank == 0:  # has none
        return promote(e, first, node.outputs[0].dtype)
    if target is aten.roll.default and not given.get("dims"):  # flattened: a step is both parts
        given["shifts"] = [2 * shift for shift in given["shifts"]]
    dtype = node.outputs[0].dtype
    given = {name: _argument(e, name, value, rank, dtype) for name, value in given.items()}
    outputs = [Value(v.name, (*v.shape, 2), v.dtype.to_real()) for v in node.outputs]
    with seen_as(e, *outputs) as real:
        result = OPS.lower(e, replace(real, target=target), (), given)
    if isinstance(result, Ref):
        return as_complex(result)
    return [as_complex(r) if isinstance(r, Ref) else r for r in result]


def _argument(e: Emitter, name: str, value: Any, rank: int, dtype: torch.dtype) -> Any:
    """The argument `name` for the real layout of `rank` axes and one: axes are counted from the front."""
    if name == "index" and isinstance(value, Ref):
        return value
    if isinstance(value, Ref):
        return real_layout(promote(e, value, dtype))
    if isinstance(value, list) and value and isinstance(value[0], Ref):
        return [real_layout(promote(e, part, dtype)) for part in value if part.shape != (0,)]
    if name in {"dim", "dim0", "dim1"} and isinstance(value, int):
        return value % max(rank, 1)
    if name in _LISTS and isinstance(value, Sequence):
        return _LISTS[name](value, rank)
    if name == "value" and value:
        raise e.refuse(f"padding with {value} on complex values; pad the parts, torch.view_as_real")
    return value


def _front(dims: Sequence[int], rank: int) -> list[int]:
    return [d % max(rank, 1) for d in dims]


# Arguments that are lists.
_LISTS: Mapping[str, Callable[[Sequence[Any], int], list[Any]]] = {
    "dim": _front,
    "dims": _front,
    "pad": lambda amounts, rank: [0, 0, *amounts],
    "repeats": lambda repeats, rank: [*repeats, 1],
}
