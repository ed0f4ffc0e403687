"""An NNEF graph before it is text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch_to_nnef.op.statement import Fragment, Ref, Statement, Variable


@dataclass(frozen=True, slots=True)
class Document:
    """All that graph.nnef says, and the tensors it names.

    `extensions` are further lines behind `extension` (`tract_assert S >= 1`); `properties` become
    tract_core_properties; `fragments` are those that handlers defined for this graph alone; `scales`, by identifier, are the lines of
    graph.quant: what a code of a variable in 8 bits means.
    """

    name: str
    inputs: tuple[Ref, ...]
    outputs: tuple[str, ...]
    statements: tuple[Statement, ...]
    variables: tuple[Variable, ...]
    symbols: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    fragments: Mapping[str, Fragment] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def operators(self) -> frozenset[str]:
        """Operators and fragments that statements call."""
        return frozenset(s.operator for s in self.statements)
