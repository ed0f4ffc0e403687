"""Sample inputs at other sizes: one set of tensors for every combination of symbol sizes worth trying."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue
from torch_to_nnef.graph.inputs import resize


@dataclass(frozen=True)
class InputSet:
    """The inputs of one run. sizes: symbol -> size; traced: the inputs as the model was captured with."""

    sizes: dict[str, int]
    tensors: tuple[torch.Tensor, ...]
    traced: bool


def resized_input_sets(
    inputs: Sequence[torch.Tensor], dynamic_axes: Sequence[Mapping[int, str]]
) -> tuple[InputSet, ...]:
    """Return `inputs` as they are, then, if any axis is dynamic, at three or four other combinations of sizes.

    `dynamic_axes[i]` maps axes of `inputs[i]` to symbols; negative axes count from the end. Every symbol takes size 1,
    one more than traced and about twice that, in different combinations, always equal on all axes that carry it.
    Values are repeated cyclically along a grown axis and cut along a shrunk one, so ids and masks stay legal.
    Raises `T2NErrorDynamicShapeValue` for an axis out of range or a symbol traced at two sizes.
    """
    axes = [
        _axis_symbols(i, tensor, symbols) for i, (tensor, symbols) in enumerate(zip(inputs, dynamic_axes, strict=True))
    ]
    traced = _traced_sizes(inputs, axes)
    sets = [InputSet(traced, tuple(inputs), traced=True)]
    for sizes in other_sizes(traced):
        resized = tuple(
            resize(tensor.detach(), {axis: sizes[symbol] for axis, symbol in symbols.items()})
            for tensor, symbols in zip(inputs, axes, strict=True)
        )
        sets.append(InputSet(sizes, resized, traced=False))
    return tuple(sets)


def within(assertions: Iterable[str], sizes: Mapping[str, int]) -> bool:
    """Whether `sizes` satisfy every assertion in tract's syntax (`S + P <= 512`)."""
    return all(_satisfied(text, sizes) for text in assertions)


def _satisfied(assertion: str, sizes: Mapping[str, int]) -> bool:
    try:
        return bool(eval(assertion.replace("/", "//"), {"__builtins__": {}}, {**sizes, "min": min, "max": max}))
    except (SyntaxError, NameError):  # a scenario, or a symbol of no input: nothing that these sizes could violate
        return True


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


def _traced_sizes(inputs: Sequence[torch.Tensor], axes: Sequence[Mapping[int, str]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for position, (tensor, symbols) in enumerate(zip(inputs, axes, strict=True)):
        for axis, symbol in symbols.items():
            if sizes.setdefault(symbol, tensor.shape[axis]) != tensor.shape[axis]:
                raise T2NErrorDynamicShapeValue(
                    f"input {position}: axis {axis} has size {tensor.shape[axis]}, but {symbol!r} is {sizes[symbol]} "
                    "on another axis: give them two symbols, or sample inputs of one size"
                )
    return sizes
