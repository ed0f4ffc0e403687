"""Sample inputs at other sizes: one set of tensors for every combination of symbol sizes worth trying."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.axes import Condition
from torch_to_nnef.graph.inputs import axis_sizes, resize, traced_sizes

# Sizes tried besides the samples', at least where there are as many.
_WANTED = 3
_NEAR = 64
# Combinations that break an assumption which the others keep, at most.
_DOUBTED = 4


@dataclass(frozen=True)
class InputSet:
    """The inputs of one run. sizes: symbol -> size; traced: the inputs as the model was captured with.

    outside: what the capture assumed of sizes, and these are not; `beside` if it is merely that they are no other ones.
    """

    sizes: dict[str, int]
    tensors: tuple[torch.Tensor, ...]
    traced: bool
    outside: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def resized_input_sets(
    inputs: Sequence[torch.Tensor],
    dynamic_axes: Sequence[Mapping[int, str]],
    asserted: Sequence[Condition] = (),
    assumed: Sequence[Condition] = (),
) -> tuple[InputSet, ...]:
    """Return `inputs` as they are, then, if any axis is dynamic, at three or four other combinations of sizes.

    `dynamic_axes[i]` maps axes of `inputs[i]` to symbols, or sums of multiples of them; negative axes count from the end. Every symbol
    takes size 1, one more than traced and about twice that, in different combinations, always equal on all axes that carry it.
    A symbol asserted to be 0 or more also takes 0, alone.
    All sizes are as `asserted`, and so must the samples be. `assumed` is what the capture supposes, and may be wrong in or torch refuse:
    there are further combinations that keep it if few of the usual do, and some that do not.
    Values are repeated cyclically along a grown axis and cut along a shrunk one, so ids and masks stay legal.
    Raises `T2NErrorDynamicShapeValue` for an axis out of range, a symbol traced at two sizes, samples that are not as asserted, or if no
    other size is.
    """
    axes = [
        _axis_symbols(i, tensor, symbols) for i, (tensor, symbols) in enumerate(zip(inputs, dynamic_axes, strict=True))
    ]
    traced = traced_sizes([f"input {i}" for i in range(len(inputs))], inputs, axes)
    if broken := _broken(asserted, traced):
        raise T2NErrorDynamicShapeValue(f"the sample inputs are not as asserted: {_shown(traced)}, but {broken[0]}")
    sets = [InputSet(traced, tuple(inputs), traced=True)]
    supposed = [c for c in assumed if not c.merely_unequal], [c for c in assumed if c.merely_unequal]
    for sizes in _combinations(traced, axes, asserted, *supposed):
        resized = tuple(
            resize(tensor.detach(), axis_sizes(by_axis, sizes)) for tensor, by_axis in zip(inputs, axes, strict=True)
        )
        sets.append(InputSet(sizes, resized, False, *(tuple(_broken(conditions, sizes)) for conditions in supposed)))
    return tuple(sets)


def _combinations(
    traced: Mapping[str, int],
    axes: Sequence[Mapping[int, str]],
    asserted: Sequence[Condition],
    assumed: Sequence[Condition],
    unequal: Sequence[Condition],
) -> list[dict[str, int]]:
    def possible(sizes: Mapping[str, int]) -> bool:
        return not _broken(asserted, sizes) and all(min(axis_sizes(a, sizes).values(), default=1) >= 0 for a in axes)

    if not traced:
        return []
    chosen = [sizes for sizes in other_sizes(traced) if possible(sizes)]
    for conditions in ((), assumed):
        missing = _WANTED - sum(not _broken(conditions, sizes) for sizes in chosen)
        more = (s for s in _further(traced) if s not in chosen and possible(s) and not _broken(conditions, s))
        chosen += islice(more, max(missing, 0))
    if not chosen:
        texts = ", ".join(condition.text for condition in asserted)
        raise T2NErrorDynamicShapeValue(f"no size but that of the samples, {_shown(traced)}, is as asserted: {texts}")
    empty = ({**traced, s: 0} for s in traced if any(_from_zero(condition, s, traced) for condition in asserted))
    chosen += [sizes for sizes in empty if possible(sizes) and sizes not in chosen]
    doubts = (c for c in (*assumed, *unequal) if all(map(c.holds, chosen)))
    breaking = (next((s for s in _near(c, traced) if possible(s) and not c.holds(s)), None) for c in doubts)
    return chosen + list(islice((sizes for sizes in breaking if sizes and sizes not in chosen), _DOUBTED))


def _from_zero(condition: Condition, symbol: str, traced: Mapping[str, int]) -> bool:
    """Whether `condition` says `symbol >= 0`, and so that nothing at all is legal."""
    return condition.holds({**traced, symbol: 0}) and not condition.holds({**traced, symbol: -1})


def _near(condition: Condition, traced: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Combinations near the numbers of a condition, as far as their tensors are not much larger than the samples."""
    sizes = sorted({number + step for number in condition.numbers for step in (-1, 0, 1)})
    for symbol, size in traced.items():
        yield from ({**traced, symbol: other} for other in sizes if 1 <= other <= 8 * size + _NEAR)


def _further(traced: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """More combinations: multiples and parts of all, then nearby sizes of all, then of one symbol alone."""
    yield from ({s: size * k for s, size in traced.items()} for k in (2, 3))
    yield from (
        {s: size // k for s, size in traced.items()} for k in (2, 4) if all(size % k == 0 for size in traced.values())
    )
    for step in range(1, _NEAR):
        for near in (step, -step):
            if min(traced.values()) + near >= 1:
                yield {s: size + near for s, size in traced.items()}
    for alone, size in traced.items():
        yield from ({**traced, alone: other} for other in range(1, size + _NEAR) if other != size)


def _broken(conditions: Sequence[Condition], sizes: Mapping[str, int]) -> list[str]:
    return [condition.text for condition in conditions if not condition.holds(sizes)]


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())


def other_sizes(traced: Mapping[str, int]) -> list[dict[str, int]]:
    """List combinations in which every symbol differs from its traced size, and symbols differ from each other in kind.

    The last one doubles all: the one that models with a smallest size or a stride accept.
    """
    if not traced:
        return []
    candidates = {symbol: _candidates(size) for symbol, size in traced.items()}
    rotated = [{s: c[(k + i) % 3] for i, (s, c) in enumerate(candidates.items())} for k in range(3)]
    doubled = {symbol: c[2] for symbol, c in candidates.items()}
    return rotated if doubled in rotated else [*rotated, doubled]


def _candidates(size: int) -> tuple[int, int, int]:
    return (1, size + 1, 2 * size) if size > 1 else (size + 1, size + 2, size + 3)


def _axis_symbols(position: int, tensor: torch.Tensor, symbols: Mapping[int, str]) -> dict[int, str]:
    positive: dict[int, str] = {}
    for axis, symbol in symbols.items():
        if not -tensor.dim() <= axis < tensor.dim():
            raise T2NErrorDynamicShapeValue(
                f"input {position}: dynamic axis {axis} ({symbol}) does not exist in shape {list(tensor.shape)}"
            )
        if positive.setdefault(axis % tensor.dim(), symbol) != symbol:
            raise T2NErrorDynamicShapeValue(
                f"input {position}: axis {axis} is named both {positive[axis % tensor.dim()]!r} and {symbol!r}"
            )
    return positive
