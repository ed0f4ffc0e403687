"""What torch assumed of the dynamic sizes while it traced, each with the line that made it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import StackSummary
from typing import Any
from unittest import mock

import sympy
from torch import nn
from torch.fx.proxy import TracerBase

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.axes import axis_expression
from torch_to_nnef.graph.places import Place, running_place
from torch_to_nnef.graph.tdim import dim_text
from torch_to_nnef.log import LOGGER
from torch_to_nnef.torch_internals import ShapeEnv, SymMax, SymMin
from torch_to_nnef.turns import in_this_thread

_RELATIONS = {sympy.Eq: "==", sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">"}


@dataclass(frozen=True, slots=True)
class Axis:
    """A dynamic axis of an input, as the user named it."""

    input: str
    axis: int
    symbol: str


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition that held while tracing. `decided`: a branch of the model's Python took it, not an operator of torch."""

    condition: sympy.Basic
    place: Place | None
    decided: bool


@dataclass(slots=True)
class Watch:
    """The guards of one capture, and the buffers that were assigned to: of those in submodules torch loses the new value.

    `axes`: torch's name of a size (`L['x'].size()[0]`) -> whose it is. `modules`: id of a module -> its path.
    """

    axes: Mapping[str, Axis]
    modules: Mapping[int, str]
    env: ShapeEnv | None = None
    guards: list[Guard] = field(default_factory=list)
    assigned: dict[str, Place] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch what is captured within."""
        original = ShapeEnv.evaluate_expr

        def evaluate_expr(env: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
            known = len(env.guards)
            try:
                return original(env, *args, **kwargs)
            finally:
                # Nested calls have noted theirs.
                if len(env.guards) > max(known, len(self.guards) if env is self.env else 0):
                    self._note(env)

        def only_users(tracer: TracerBase, frames: StackSummary) -> StackSummary:
            place, _ = running_place(self.modules)
            return StackSummary.from_list([(place.file, place.line, place.function, None)] if place else [])

        assign = nn.Module.__setattr__

        def set_attribute(module: nn.Module, name: str, value: Any) -> None:
            path = self.modules.get(id(module))
            changed = name in module._buffers and value is not module._buffers[name]
            if path is not None and changed and (place := running_place(self.modules)[0]):
                self.assigned[f"{path}.{name}" if path else name] = place
            assign(module, name, value)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(ShapeEnv, "evaluate_expr", in_this_thread(evaluate_expr, original)))
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", set_attribute))
            # Else torch keeps the frames called `forward` only, in the stack trace of a node; torch before 2.9 has no such hook.
            if hasattr(TracerBase, "_filter_traceback_frames"):
                stack.enter_context(mock.patch.object(TracerBase, "_filter_traceback_frames", only_users))
            yield

    def _note(self, env: ShapeEnv) -> None:
        if env is not self.env:
            self.env, self.guards = env, []
        place, decided = running_place(self.modules)
        self.guards += [Guard(guard.expr, place, decided) for guard in env.guards[len(self.guards) :]]

    def named(self) -> dict[sympy.Symbol, Axis]:
        """Torch's symbols -> axes of the user."""
        sources = {} if self.env is None else self.env.var_to_sources
        names = {symbol: [_name(source) for source in found] for symbol, found in sources.items()}
        return {symbol: self.axes[n] for symbol, found in names.items() for n in found if n in self.axes}

    def specialized(self) -> list[tuple[Axis, int, Place | None]]:
        """Axes that torch gave one size, with that size and the line that asked for it."""
        if self.env is None:
            return []
        fixed = {s: value for s in self.named() if (value := self.env.replace(s)).is_Integer}
        result = []
        for symbol, value in fixed.items():
            asked = [g for g in self.guards if symbol in g.condition.free_symbols] or [
                g for g in self.guards if g.condition.free_symbols & fixed.keys()
            ]
            equal = [g for g in asked if isinstance(g.condition, sympy.Eq)] or asked
            result.append((self.named()[symbol], int(value), equal[0].place if equal else None))
        return result


def _name(source: Any) -> str:
    return str(source.name() if callable(source.name) else source.name)


@dataclass(frozen=True, slots=True)
class Limit:
    """A condition on axis names outside of which the captured graph is another computation than the model."""

    condition: sympy.Basic
    place: Place | None

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether `sizes` of the axes are within."""
        return bool(self.condition.subs({symbol: sizes[str(symbol)] for symbol in self.condition.free_symbols}))

    def assertion(self) -> str:
        """As tract's `tract_assert` has it."""
        left, right = self.condition.args
        if self.condition.has(
            sympy.Min, sympy.Max, SymMin, SymMax
        ):  # tract 0.23.9 proves with them until its stack is full
            raise T2NErrorDynamicShapeValue(f"tract cannot reason on {self.condition}")
        return f"{dim_text(left)} {_RELATIONS[type(self.condition)]} {dim_text(right)}"


def limits(watch: Watch) -> tuple[Limit, ...]:
    """What a branch of the model assumed of dynamic axes, and upper bounds (a table's length) that an operator of torch did.

    Raises `T2NErrorDynamicShapeValue` for an assumption that an archive cannot state.
    """
    named = {symbol: axis_expression(axis.symbol) for symbol, axis in watch.named().items()}
    found: dict[sympy.Basic, Limit] = {}
    for guard in watch.guards:
        symbols = guard.condition.free_symbols
        if not symbols or not symbols <= named.keys():
            continue
        condition = guard.condition.xreplace(named)
        if condition in (sympy.true, sympy.false) or not (guard.decided or _is_upper_bound(condition)):
            continue
        found.setdefault(condition, Limit(condition, guard.place))
    return tuple(_stated(limit) for limit in found.values())


def _is_upper_bound(condition: sympy.Basic) -> bool:
    small, large = condition.args if isinstance(condition, (sympy.Le, sympy.Lt)) else condition.args[::-1]
    kinds = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)
    return isinstance(condition, kinds) and small.is_Symbol and large.is_Integer


def _stated(limit: Limit) -> Limit:
    where = f"\n  at {limit.place}" if limit.place else ""
    try:
        text = limit.assertion()
    except (KeyError, T2NErrorDynamicShapeValue):
        raise T2NErrorDynamicShapeValue(
            f"the model branches on a dynamic size: what was traced holds only where {limit.condition}, "
            f"which an archive cannot state{where}\n"
            "  hint: compute both sides and choose with torch.where, or leave the axis out of dynamic_axes"
        ) from None
    LOGGER.warning("the archive holds only where %s, which it asserts%s", text, where)
    return limit
