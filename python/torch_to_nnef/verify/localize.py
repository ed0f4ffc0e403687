"""Find the first node whose value in tract is not its value in torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NError
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.verify.compare import OutputComparison, as_array, compare


class RunnableModel(Protocol):
    """What is asked of a loaded archive."""

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the outputs in the order they were asked for."""


@dataclass(frozen=True)
class Candidate:
    """One value both sides can show: its name in graph.nnef, its module, its name in the torch graph."""

    nnef_name: str
    module_path: str
    node_name: str


@dataclass(frozen=True)
class Divergence:
    """The first candidate that differs, and by how much.

    alone: it differs only when the values before it are not asked for too, which keeps tract from merging them into it.
    """

    candidate: Candidate
    comparison: OutputComparison
    alone: bool = False

    def __str__(self) -> str:
        at = f"module {self.candidate.module_path!r}" if self.candidate.module_path else "the root module"
        node = f"{self.candidate.nnef_name!r} ({self.candidate.node_name!r} of {at})"
        note = (
            "; right when the values before it are outputs too: a rewrite that tract makes over several nodes is wrong"
        )
        return f"first value that differs: {node}; {self.comparison}{note * self.alone}"


def first_divergence(
    path: str | PathLike[str],
    candidates: Sequence[Candidate],
    torch_values: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    tolerance: TractCheckTolerance,
    load: Callable[[str | PathLike[str], Sequence[str]], RunnableModel] = _native.Model.load,
    chunk_size: int = 64,
) -> Divergence | None:
    """Compare intermediate values in topological order, `chunk_size` at a time, and return the first that differs.

    `torch_values` gives the values of torch graph nodes by name for these `inputs`; it may leave some out. Values that
    tract holds in another layout or dtype are skipped, and so are names that tract cannot output.
    If all agree so, the last value that differs when tract computes it alone is searched for by halving.
    None: every value that could be compared agrees.
    """
    arrays = [np.ascontiguousarray(as_array(tensor)) for tensor in inputs]
    for start in range(0, len(candidates), chunk_size):
        chunk = candidates[start : start + chunk_size]
        expected = torch_values([candidate.node_name for candidate in chunk])
        actual = _tract_values(path, [c.nnef_name for c in chunk if c.node_name in expected], arrays, load)
        for candidate in chunk:
            if candidate.nnef_name not in actual:
                continue
            name = candidate.nnef_name
            comparison = compare(expected[candidate.node_name], actual[name], tolerance, name=name)
            if _differs(comparison):
                return Divergence(candidate, comparison)
    return _alone(path, candidates, torch_values, arrays, tolerance, load)


def _alone(
    path: str | PathLike[str],
    candidates: Sequence[Candidate],
    torch_values: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
    inputs: Sequence[NDArray[Any]],
    tolerance: TractCheckTolerance,
    load: Callable[[str | PathLike[str], Sequence[str]], RunnableModel],
) -> Divergence | None:
    def differs(candidate: Candidate) -> Divergence | None:
        expected = torch_values([candidate.node_name]).get(candidate.node_name)
        actual = _tract_values(path, [candidate.nnef_name], inputs, load)
        if expected is None or not actual:
            return None
        comparison = compare(expected, actual[candidate.nnef_name], tolerance, name=candidate.nnef_name)
        return Divergence(candidate, comparison, alone=True) if _differs(comparison) else None

    found = differs(candidates[-1]) if candidates else None
    right, wrong = -1, len(candidates) - 1
    while found and wrong - right > 1:
        middle = (right + wrong) // 2
        earlier = differs(candidates[middle])
        found, right, wrong = (earlier, right, middle) if earlier else (found, middle, wrong)
    return found


def _differs(comparison: OutputComparison) -> bool:
    """By more than the tolerance; codes of 8 bits by more than one, as rounding may fall either way."""
    if comparison.ok or comparison.reason is not None:
        return False
    return comparison.dtype not in ("int8", "uint8") or comparison.max_abs > 1


def _tract_values(
    path: str | PathLike[str],
    names: Sequence[str],
    inputs: Sequence[NDArray[Any]],
    load: Callable[[str | PathLike[str], Sequence[str]], RunnableModel],
) -> dict[str, NDArray[Any]]:
    """Values by name. When tract cannot output all of them at once, halve until the ones it refuses stand alone."""
    if not names:
        return {}
    try:
        return dict(zip(names, load(path, names).run(inputs), strict=True))
    except T2NError:
        if len(names) == 1:
            return {}
        middle = len(names) // 2
        first, rest = names[:middle], names[middle:]
        return _tract_values(path, first, inputs, load) | _tract_values(path, rest, inputs, load)
