"""The methods of a compression registry, with a line of help each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any


def listing(registry: Mapping[str, Any]) -> str:
    """A line a method: its key, and the first line of its docstring."""
    width = max(map(len, registry), default=0)
    return "\n".join(f"{key:<{width}}  {summary(method)}".rstrip() for key, method in registry.items())


def summary(method: Any) -> str:
    """First line of a callable's docstring; of a `functools.partial`, that of its function and what it binds."""
    if not isinstance(method, partial):
        own = method if inspect.isroutine(method) or isinstance(method, type) else type(method)
        return (inspect.getdoc(own) or "").partition("\n")[0]
    bound = [f"{name}={_text(value)}" for name, value in method.keywords.items() if name != "method"]
    return " ".join(filter(None, [summary(method.func), f"[{', '.join(bound)}]" if bound else ""]))


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "|".join(map(_text, value))
    return str(getattr(value, "__name__", value))
