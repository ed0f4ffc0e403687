"""Keeps slices away from gathers of packed rows.

tract 0.23.9 moves a slice in front of what it is the only reader of, step by step (optim/slice.rs), and panics where it so meets a
gather of packed rows, whose axes it does not know (ops/array/gather.rs, axes_mapping). At a second gather, of all columns, it stops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from torch_to_nnef.graph.ir import Node
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.fragments import in_use
from torch_to_nnef.op.statement import Ref, Statement
from torch_to_nnef.torch_internals import pytree

Readers = Mapping[str, Sequence[Statement]]


def kept_from_slices(e: Emitter, fresh: Callable[[Node | None, str], str]) -> Iterator[Statement]:
    """The statements of `e`, with such a second gather where a slice could reach the first; `fresh(None, hint)` names values."""
    readers = defaultdict[str, list[Statement]](list)
    for statement in e.statements:
        for name in {leaf.id for leaf in pytree.tree_leaves(list(statement.args)) if isinstance(leaf, Ref)}:
            readers[name].append(statement)
    texts = in_use({statement.operator for statement in e.statements}, e.fragments)
    slicing = {"slice", *(name for name, text in texts.items() if "slice(" in text)}
    for statement in e.statements:
        packed = statement.operator == "tract_core_gather" and e.is_quantized(statement.args[0])
        if not packed or not _reaches(statement.results[0], readers, slicing):
            yield statement
            continue
        weight, indices = statement.args
        rows = Ref(fresh(None, "rows"), (*indices.shape, weight.shape[-1]), torch.float32)
        columns = e.constant(torch.arange(weight.shape[-1]), "columns")
        yield replace(statement, results=(rows.id,))
        yield replace(statement, args=(rows, columns), attrs=(("axis", indices.rank),))


def _reaches(name: str, readers: Readers, slicing: set[str]) -> bool:
    """Whether what reads `name` is a slice, or several, or the only reader of it leads there."""
    while users := readers.get(name, ()):
        if all(user.operator in slicing for user in users):
            return True
        if len(users) > 1 or len(users[0].results) > 1:
            return False
        name = users[0].results[0]
    return False
