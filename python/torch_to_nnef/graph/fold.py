"""What torch computes while exporting: small tensors made of constants alone, such as the window of a spectrogram."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch

from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.torch_internals import pytree

aten = torch.ops.aten

# Larger ones stay as the calls that make them, which take less room in an archive.
_LARGEST = 1 << 16
# Calls without tensors that are stored; others, such as zeros and ranges, say in one statement what they are.
_MADE = frozenset(
    {
        aten.bartlett_window.default,
        aten.bartlett_window.periodic,
        aten.blackman_window.default,
        aten.blackman_window.periodic,
        aten.fft_fftfreq.default,
        aten.fft_rfftfreq.default,
        aten.hamming_window.default,
        aten.hamming_window.periodic,
        aten.hamming_window.periodic_alpha,
        aten.hamming_window.periodic_alpha_beta,
        aten.hann_window.default,
        aten.hann_window.periodic,
        aten.kaiser_window.beta,
        aten.kaiser_window.default,
        aten.kaiser_window.periodic,
        aten.linspace.default,
    }
)
# Calls that give their argument.
IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.detach_.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
    }
)


def fold(graph: Graph, constants: Collection[str]) -> Graph:
    """The graph with the results of such calls as weights; `constants` are fqns of tensors that belong to the code, not to the model."""
    known = {name: graph.tensors[fqn] for name, fqn in graph.weights.items() if fqn in constants}
    made: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if _is_known(node, known):
            name = node.outputs[0].name
            known[name] = _computed(node, known)
            if node.target not in IDENTITIES:
                made[name] = known[name]
    nodes = live([n for n in graph.nodes if n.outputs[0].name not in made], graph.outputs)
    used = {v.name for n in nodes for v in values((n.args, n.kwargs))} | {v.name for v in graph.outputs}
    fqns = {name: f"constant.{name}" for name in made if name in used}
    weights = {name: fqn for name, fqn in graph.weights.items() if name in used} | fqns
    tensors = {**graph.tensors, **{fqn: made[name] for name, fqn in fqns.items()}}
    return replace(graph, nodes=tuple(nodes), weights=weights, tensors=tensors)


def _is_known(node: Node, known: Collection[str]) -> bool:
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Value)]
    sizes = [d for v in node.outputs for d in v.shape]
    return (
        (bool(tensors) or node.target in _MADE or 0 in sizes)
        and len(node.outputs) == 1
        and all(v.name in known for v in tensors)
        and not any(hasattr(x, "free_symbols") for x in (*leaves, *sizes))
        and torch.Size(sizes).numel() <= _LARGEST
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and (not node.target._schema.is_mutable or node.target in IDENTITIES)
    )


@torch.no_grad()
def _computed(node: Node, known: dict[str, torch.Tensor]) -> torch.Tensor:
    if node.target in IDENTITIES:
        return known[node.args[0].name]
    args, kwargs = pytree.tree_map(
        lambda leaf: known[leaf.name] if isinstance(leaf, Value) else leaf, (node.args, dict(node.kwargs))
    )
    result: torch.Tensor = node.target(*args, **kwargs)
    return result.resolve_conj().resolve_neg().contiguous()


def live(nodes: list[Node], outputs: tuple[Value, ...]) -> list[Node]:
    """Those that an output depends on."""
    needed, found = {v.name for v in outputs}, list[Node]()
    for node in reversed(nodes):
        if any(v.name in needed for v in node.outputs):
            found.append(node)
            needed.update(v.name for v in values((node.args, node.kwargs)))
    return found[::-1]


def values(tree: Any) -> Iterable[Value]:
    """The tensors within `tree`."""
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value))
