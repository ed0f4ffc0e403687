"""torch.einsum: any number of operands, diagonals, sums and broadcasting, contracted two at a time from the left."""

from __future__ import annotations

import string

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.product import arranged, contract, total_over
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten


@lowers(aten.einsum.default)
def einsum(e: Emitter, equation: str, tensors: list[Ref], path: list[int] | None = None) -> Ref:
    """Sum of products over named axes; `path` says only in which order."""
    terms, output = _spelled_out(equation.replace(" ", ""), [t.rank for t in tensors])
    sizes: dict[str, Dim] = {}
    for tensor, term in zip(tensors, terms, strict=True):
        sizes.update((a, d) for a, d in zip(term, tensor.shape, strict=True) if sizes.get(a, 1) == 1)
    operands = [
        _simple(e, e.cast(tensor, e.out.dtype), term, sizes) for tensor, term in zip(tensors, terms, strict=True)
    ]
    total, axes = operands[0]
    for index, (operand, term) in enumerate(operands[1:], start=1):
        later = output + "".join(t for _, t in operands[index + 1 :])
        total, axes = _summed(e, total, axes, term + later)
        operand, term = _summed(e, operand, term, axes + later)
        kept = "".join(a for a in dict.fromkeys(axes + term) if a in later)
        kept = output if set(kept) == set(output) else kept
        total = contract(e, [total, operand], f"{axes},{term}->{kept}", tuple(sizes[a] for a in kept))
        axes = kept
    total, axes = _summed(e, total, axes, output)
    return e.broadcast_to(arranged(e, total, axes, output), e.out.shape)


def _spelled_out(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Terms and output with a letter for every axis: those of an ellipsis are aligned on the right, and lead an implicit output."""
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    free = [a for a in string.ascii_letters if a not in equation]
    counts = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]
    hidden = "".join(free[: max(counts)])
    named = [term.replace("...", hidden[len(hidden) - count :]) for term, count in zip(terms, counts, strict=True)]
    if not arrow:
        letters = inputs.replace("...", "").replace(",", "")
        output = "..." + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    return named, output.replace("...", hidden)


def _simple(e: Emitter, x: Ref, axes: str, sizes: dict[str, Dim]) -> tuple[Ref, str]:
    """Without repeated axes, and without those of size 1 that others stretch."""
    stretched = [i for i, a in enumerate(axes) if x.shape[i] == 1 and sizes[a] != 1]
    x, axes = e.squeeze(x, stretched), "".join(a for i, a in enumerate(axes) if i not in stretched)
    while repeated := next((a for a in axes if axes.count(a) > 1), None):
        first, second = axes.index(repeated), axes.rindex(repeated)
        x = _diagonal(e, x, first, second)
        axes = axes[:second] + axes[second + 1 :]
    return x, axes


def _diagonal(e: Emitter, x: Ref, first: int, second: int) -> Ref:
    """Elements with equal positions on two axes: all others are zeroed, and the second axis is summed away."""
    positions = e.arange(0, 1, x.shape[first], torch.int64)
    lines = [e.unsqueeze(positions, [a for a in range(x.rank) if a != axis]) for axis in (first, second)]
    zero = e.unsqueeze(e.full(0, x.dtype), list(range(x.rank)))
    kept = e.op("select", e.op("eq", *lines, dtype=torch.bool), x, zero, out=x.shape, dtype=x.dtype)
    return total_over(e, kept, [second])


def _summed(e: Emitter, x: Ref, axes: str, needed: str) -> tuple[Ref, str]:
    """The sum over the axes that nothing else needs."""
    return total_over(e, x, [i for i, a in enumerate(axes) if a not in needed]), "".join(a for a in axes if a in needed)
