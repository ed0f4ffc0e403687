"""Find the `Fold`s of a captured graph: which parameters can take up a factor of the channels that others read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch_to_nnef.graph.factors import ANY, ONE, Factors, Scaled
from torch_to_nnef.graph.ir import Graph
from torch_to_nnef.quantize.folds import Fold, Slices


def find_folds(graph: Graph, carried: Mapping[int, int] | None = None) -> tuple[Fold, ...]:
    """All folds of `graph`, in the order of their consumers.

    carried: position of an input -> that of the output that it is in the next call. Such a state may be scaled, since nobody else
    reads it; every other input and output stays as it is.
    """
    factors = Factors(graph, carried or {})
    for node in graph.nodes:
        factors.visit(node)
    factors.finish()
    return _folds(list(factors.scaled.values()), _roots(factors.count, factors.same))


def _roots(count: int, pairs: Sequence[Tensor]) -> Tensor:
    """Of each of `count` unknowns, the least that it equals by `pairs` [2, n]."""
    roots = torch.arange(count)
    left, right = torch.cat([torch.zeros(2, 1, dtype=torch.int64), *pairs], dim=1)
    while not torch.equal(roots[left], roots[right]):
        ends = torch.stack([roots[left], roots[right]])
        roots = roots.scatter_reduce(0, ends.flatten(), ends.amin(0).repeat(2), "amin")
        while not torch.equal(roots, roots[roots]):
            roots = roots[roots]
    return roots


def _folds(parameters: Sequence[Scaled], roots: Tensor) -> tuple[Fold, ...]:
    """One for all unknowns that have a parameter in common."""
    makers = [(p, p.made_axis, roots[p.made]) for p in parameters if p.made_axis is not None]
    readers = [(p, p.read_axis, roots[p.read]) for p in parameters if p.read_axis is not None]
    made, read = (torch.cat([side for *_, side in sides] or [roots[:0]]) for sides in (makers, readers))
    both = torch.zeros(2, len(roots), dtype=torch.bool)
    both[0, made] = both[1, read] = True
    free = both.all(0)
    free[ONE] = False
    kept = [[(p, axis, torch.where(free[side], side, ANY)) for p, axis, side in sides] for sides in (makers, readers)]
    together = _roots(len(roots), [_joined(side[side > 0]) for *_, side in itertools.chain(*kept)])
    found: dict[int, tuple[list[_Side], list[_Side]]] = {}
    for which, sides in ((1, kept[1]), (0, kept[0])):
        for p, axis, side in sides:
            for group in together[side[side > 0]][:1].tolist():
                found.setdefault(group, ([], []))[which].append((p, axis, side))
    return tuple(_fold(*sides) for sides in found.values())


_Side = tuple[Scaled, int, Tensor]


def _fold(makers: Sequence[_Side], readers: Sequence[_Side]) -> Fold:
    unknowns = torch.unique(torch.cat([side[side > 0] for *_, side in makers]))

    def slices(p: Scaled, axis: int, side: Tensor) -> Slices:
        channels = torch.where(side > 0, torch.searchsorted(unknowns, side), -1)
        return Slices(p.fqn, axis, tuple(channels.tolist()), p.offset)

    return Fold(tuple(slices(*side) for side in makers), tuple(slices(*side) for side in readers), len(unknowns))


def _joined(side: Tensor) -> Tensor:
    return torch.stack([side[:1].expand_as(side), side])
