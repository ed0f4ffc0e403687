"""`Graph` -> `Document`, through the op table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorMissingOpEmitter, T2NErrorNotImplemented
from torch_to_nnef.graph.experts import routed_experts
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.nnef.document import Document
from torch_to_nnef.nnef.gathers import kept_from_slices
from torch_to_nnef.nnef.names import Names, VariableNamingScheme
from torch_to_nnef.op.complex_layout import is_complex, real_layout, table_of
from torch_to_nnef.op.dtypes import check_storable
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import table
from torch_to_nnef.op.statement import Ref, Statement, Unavailable, Variable
from torch_to_nnef.tensor.quant import QTensorHalf, QTensorTractScaleOnly, QTensorTractTransposed
from torch_to_nnef.torch_internals import OpOverload, pytree

# Handlers of these take f16 weights in any model: tract would cast one beyond 4 MiB at each run.
_TAKE_HALVES = frozenset({torch.ops.aten.linear.default, torch.ops.aten.embedding.default, routed_experts})


@dataclass(frozen=True, slots=True)
class Lowered:
    """A document, and for every torch node the identifier that holds its value."""

    document: Document
    identifiers: Mapping[str, str]


def missing_ops(graph: Graph) -> list[OpOverload]:
    """Ops of the graph without a handler, each once."""
    table()
    return list(dict.fromkeys(node.target for node in graph.nodes if node.target not in table_of(node)))


def refuse_missing(graph: Graph) -> None:
    """Raise `T2NErrorMissingOpEmitter` that lists every op without handler, with counts and module paths."""
    table()
    nodes = defaultdict[Any, list[Node]](list)
    for node in graph.nodes:
        if node.target not in table_of(node):
            nodes[node.target].append(node)
    if not nodes:
        return
    lines = []
    for op, uses in nodes.items():
        places = Counter(node.module_path or "<root module>" for node in uses)
        shown = ", ".join(f"{path} x{n}" if n > 1 else path for path, n in places.most_common(5))
        more = f" and {len(places) - 5} more modules" if len(places) > 5 else ""
        values = " on complex values" if is_complex(uses[0]) else ""
        lines.append(f"  {op}{values} ({len(uses)} use{'s' * (len(uses) > 1)}): {shown}{more}")
        lines += [f"    first at {uses[0].source}"] if uses[0].source else []
    lines.append(
        f"write one with @torch_to_nnef.op.lowers(torch.ops.{next(iter(nodes))}), see docs/custom_operators.md"
    )
    raise T2NErrorMissingOpEmitter(f"{len(nodes)} operator(s) have no lowering to NNEF:\n" + "\n".join(lines))


def lower(
    graph: Graph,
    name: str,
    output_names: Sequence[str],
    scheme: VariableNamingScheme,
    forced: frozenset[str] = frozenset(),
    reify_sdpa: bool = False,
) -> Lowered:
    """Lower every node. `output_names` are one an output of the graph; raises what handlers raise, or `T2NErrorMissingOpEmitter`.

    `forced` names the operators to compute in f32 where they are in f16; `reify_sdpa` makes attention one operator.
    """
    refuse_missing(graph)
    return _Lowering(graph, output_names, scheme, forced, reify_sdpa).run(name)


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        output_names: Sequence[str],
        scheme: VariableNamingScheme,
        forced: frozenset[str],
        reify_sdpa: bool,
    ) -> None:
        table()
        self.graph, self.output_names = graph, output_names
        self.names = Names(scheme, [*graph.input_names, *output_names, *graph.symbols])
        self.variables: dict[int, Variable] = {}
        # Shared weights go by the first of their names, whichever torch picked.
        self.first_fqn = {id(tensor): fqn for fqn, tensor in reversed(list(graph.tensors.items()))}
        self.env: dict[str, Ref | Unavailable] = {}
        producers = {value.name: node for node in graph.nodes for value in node.outputs}
        results = frozenset(value.name for value in graph.outputs)
        self.emitter = Emitter(
            self.names.fresh,
            producers,
            graph.tensors.__getitem__,
            results,
            forced,
            frozenset(self._shared()),
            reify_sdpa,
        )

    def _shared(self) -> Iterator[str]:
        """Names of weights that several calls read."""
        tensors, readers = self.graph.tensors, Counter[int]()
        for node in self.graph.nodes:
            values = (
                leaf.name for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, Value)
            )
            readers.update({id(tensors[self.graph.weights[name]]) for name in values if name in self.graph.weights})
        return (fqn for tensor, fqn in self.first_fqn.items() if readers[tensor] > 1)

    def run(self, name: str) -> Lowered:
        inputs = []
        for value, given in zip(self.graph.inputs, self.graph.input_names, strict=True):
            inputs.append(Ref(given, value.shape, value.dtype))
            self.env[value.name] = inputs[-1]
        for node in self.graph.nodes:
            self._node(node)
        rename = self._outputs()
        statements = tuple(_renamed(s, rename) for s in kept_from_slices(self.emitter, self.names.fresh))
        identifiers = {n: rename.get(r.id, r.id) for n, r in self.env.items() if isinstance(r, Ref) and r.fqn is None}
        # A module kept whole is given weights that its lowering may not read.
        leaves = pytree.tree_leaves([[*s.args, *(value for _, value in s.attrs)] for s in statements])
        read = {leaf.id for leaf in leaves if isinstance(leaf, Ref)}
        bodies = "".join(line for _, body in self.emitter.fragments.values() for line in body)
        stored = [*self.variables.values(), *self.emitter.variables.values()]
        kept = [v for v in stored if v.id in read or f'label = "{v.label}"' in bodies]
        variables = sorted(kept, key=lambda v: v.label)
        name = Names(VariableNamingScheme.RAW, ()).unique(name)
        document = Document(
            name,
            tuple(map(real_layout, inputs)),
            tuple(self.output_names),
            statements,
            tuple(variables),
            self.graph.symbols,
            fragments=self.emitter.fragments,
            scales={v.id: self.graph.scales[v.label] for v in variables if v.label in self.graph.scales},
        )
        return Lowered(document, identifiers)

    def _node(self, node: Node) -> None:
        self.emitter.node = node
        args, kwargs = pytree.tree_map(
            lambda a: self._operand(node, a) if isinstance(a, Value) else a, (node.args, dict(node.kwargs))
        )
        result = table_of(node).lower(self.emitter, node, args, kwargs)
        results = [result] if isinstance(result, Ref) else result
        for index, value in enumerate(node.outputs):
            # A handler may give fewer results than torch has; what is then used fails in `_ref`.
            given = results[index] if index < len(results) else Unavailable(f"result {index} has no lowering")
            if isinstance(given, Unavailable):
                given = Unavailable(str(self.emitter.refuse(given.reason)))
            self.env[value.name] = given

    def _operand(self, node: Node, value: Value) -> Ref:
        fqn = self.graph.weights.get(value.name)
        if fqn is not None and node.target in _TAKE_HALVES and isinstance(self.graph.tensors[fqn], QTensorHalf):
            return self._stored(value)
        return self._ref(value)

    def _ref(self, value: Value) -> Ref:
        if value.name not in self.env:
            self.env[value.name] = self._weight(value)
        ref = self.env[value.name]
        if isinstance(ref, Unavailable):
            raise T2NErrorNotImplemented(ref.reason)
        return ref

    def _weight(self, value: Value) -> Ref:
        """As the model computes with it."""
        return self.emitter.cast(self._stored(value), value.dtype)

    def _stored(self, value: Value) -> Ref:
        """As it is in the archive: what is kept in f16 of another model is f16."""
        fqn = self.graph.weights[value.name]
        tensor = self.graph.tensors[fqn]
        check_storable(tensor, fqn)
        if id(tensor) not in self.variables:
            fqn = self.first_fqn[id(tensor)]
            stored = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
            stored = stored.stored if isinstance(stored, QTensorTractScaleOnly) else stored
            stored = stored.halves() if isinstance(stored, QTensorHalf) else stored
            self.variables[id(tensor)] = Variable(self.names.unique(fqn), fqn, stored)
        if isinstance(tensor, QTensorHalf):
            return Ref(self.variables[id(tensor)].id, tuple(tensor.shape), torch.float16, fqn)
        transposed = isinstance(tensor, QTensorTractTransposed)
        return Ref(self.variables[id(tensor)].id, tuple(tensor.shape), tensor.dtype, fqn, transposed)

    def _outputs(self) -> dict[str, str]:
        """Give results their output names; what is an input, a weight, or given out already is copied."""
        rename: dict[str, str] = {}
        produced = {r for s in self.emitter.statements for r in s.results}
        for value, name in zip(self.graph.outputs, self.output_names, strict=True):
            ref = self._ref(value)
            if ref.id == name:  # an input handed through under its own name
                continue
            if name in self.graph.input_names:
                raise T2NErrorInvalidArgument(
                    f"output {name!r} has the name of an input, but is not that input as it came"
                )
            if ref.id in produced and ref.id not in rename:
                rename[ref.id] = name
            else:
                self.emitter.statements.append(Statement((name,), "copy", (ref,), (), value.name, ""))
        return rename


def _renamed(statement: Statement, names: Mapping[str, str]) -> Statement:
    def leaf(value: Any) -> Any:
        return replace(value, id=names.get(value.id, value.id)) if isinstance(value, Ref) else value

    args = tuple(pytree.tree_map(leaf, list(statement.args)))
    return replace(statement, results=tuple(names.get(r, r) for r in statement.results), args=args)
