"""Identifiers of graph.nnef: from module paths and op names, unique, in the scheme the user asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum

from torch_to_nnef.graph.inputs import MISREAD
from torch_to_nnef.graph.ir import Node


class VariableNamingScheme(str, Enum):
    """How assignments are named. Inputs, outputs and labels of variables do not depend on it."""

    RAW = "raw"
    """torch's node names: `linear_3`."""
    NATURAL_VERBOSE = "natural_verbose"
    """Module path and op: `encoder_layer_0_attention_linear`."""
    NATURAL_VERBOSE_CAMEL = "natural_verbose_camel"
    """The same in camel case: `encoderLayer0AttentionLinear`."""
    NUMERIC = "numeric"
    """`v0`, `v1`..., the shortest text."""


class Names:
    """Gives each identifier once."""

    def __init__(self, scheme: VariableNamingScheme, reserved: Iterable[str]) -> None:
        self._taken = set(reserved)
        self._next: dict[str, int] = {}
        self._base = _SCHEMES[scheme]

    def fresh(self, node: Node | None, hint: str) -> str:
        """An unused identifier for a result of `node`; `hint` says what it is."""
        return self.unique(self._base(node, hint))

    def unique(self, text: str) -> str:
        """`text` as an identifier, numbered if taken."""
        base = re.sub(r"_{2,}", "_", re.sub(r"\W+", "_", text, flags=re.ASCII)).strip("_") or "value"
        base = f"_{base}" if base[0].isdigit() or MISREAD.match(base) else base
        name = base
        while name in self._taken:
            self._next[base] = self._next.get(base, 0) + 1
            name = f"{base}_{self._next[base]}"
        self._taken.add(name)
        return name


def _natural(node: Node | None, hint: str) -> str:
    return f"{node.module_path}_{hint}" if node is not None and node.module_path else hint


def _camel(node: Node | None, hint: str) -> str:
    head, *rest = re.split(r"[\W_]+", _natural(node, hint))
    return head + "".join(word[:1].upper() + word[1:] for word in rest)


_SCHEMES: dict[VariableNamingScheme, Callable[[Node | None, str], str]] = {
    VariableNamingScheme.RAW: lambda node, hint: node.name if node is not None else hint,
    VariableNamingScheme.NATURAL_VERBOSE: _natural,
    VariableNamingScheme.NATURAL_VERBOSE_CAMEL: _camel,
    VariableNamingScheme.NUMERIC: lambda _node, _hint: "v",
}
