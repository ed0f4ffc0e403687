"""Two archives on the same inputs: what a method, an option or a version changes in what tract computes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.verify.compare import OutputComparison, compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_to_nnef.inference_target import TractCheckTolerance
    from torch_to_nnef.tract_model import Fact, TractModel

Arrays = Mapping[str, "NDArray[Any]"]
_SIZE, _IDS = 3, 16  # of a symbol, unless it is given; integers are drawn below
_CLASSES = 16  # last axis from which an output may be logits


@dataclass(frozen=True)
class Divergence:
    """Of an output as logits along its last axis: KL(first || second) in nats, mean and worst, and the share of equal likeliest classes."""

    kl_mean: float
    kl_max: float
    top1_same: float


@dataclass(frozen=True)
class SideBySide:
    """Two archives on the same inputs, the first being the reference.

    weight_bytes: that tract holds of each. seconds: of the faster of two runs, each. divergences: by output, of the one that may be
    logits: 16 classes or more along the last axis, which no other output has.
    """

    weight_bytes: tuple[int, int]
    seconds: tuple[float, float]
    outputs: tuple[OutputComparison, ...]
    divergences: Mapping[str, Divergence]

    @property
    def ok(self) -> bool:
        """No output of the second is outside the tolerance."""
        return all(output.ok for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        outputs = [asdict(output) | {"divergence": self._divergence(output.name)} for output in self.outputs]
        return {
            "ok": self.ok,
            "weight_bytes": list(self.weight_bytes),
            "seconds": list(self.seconds),
            "outputs": outputs,
        }

    def _divergence(self, name: str) -> dict[str, float] | None:
        return asdict(self.divergences[name]) if name in self.divergences else None


def side_by_side(first: TractModel, second: TractModel, inputs: Arrays, tolerance: TractCheckTolerance) -> SideBySide:
    """Run both on `inputs`, by name.

    Raises:
        T2NErrorInvalidArgument: Inputs or outputs of other names, dtypes or ranks, or inputs that fit neither.

    """
    _same("inputs", first.inputs, second.inputs)
    _same("outputs", first.outputs, second.outputs)
    (reference, took), (actual, took_too) = (_timed(model, inputs) for model in (first, second))
    outputs = tuple(compare(reference[name], actual[name], tolerance, name=name) for name in reference)
    divergences = {
        o.name: _divergence(reference[o.name], actual[o.name]) for o in outputs if _may_be_logits(o, outputs)
    }
    return SideBySide((first.weight_bytes, second.weight_bytes), (took, took_too), outputs, divergences)


def random_inputs(facts: tuple[Fact, ...], sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs that fit `facts`: floats of a normal distribution, integers in [0, 16), booleans; the same for the same seed.

    sizes: of symbols; 3 for those not named. Raises `T2NErrorInvalidArgument` for a dimension that is neither a number nor a symbol,
    and for sizes of symbols there are not.
    """
    random = np.random.default_rng(seed)
    symbols = {dim for fact in facts for dim in fact.shape if isinstance(dim, str)}
    if unknown := sorted(sizes.keys() - symbols):
        raise T2NErrorInvalidArgument(
            f"no input has a symbol {', '.join(unknown)}; there are {', '.join(sorted(symbols)) or 'none'}"
        )
    return {fact.name: _draw(fact, [_extent(fact, dim, sizes) for dim in fact.shape], random) for fact in facts}


def _extent(fact: Fact, dim: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if not dim.isidentifier():
        raise T2NErrorInvalidArgument(f"input {fact} has a size {dim}: pass inputs that fit (--npz)")
    return sizes.get(dim, _SIZE)


def _draw(fact: Fact, shape: list[int], random: np.random.Generator) -> NDArray[Any]:
    dtype = np.dtype(fact.dtype)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2 if dtype.kind == "b" else _IDS, shape).astype(dtype)


def _same(what: str, first: tuple[Fact, ...], second: tuple[Fact, ...]) -> None:
    a, b = ({fact.name: (fact.dtype, len(fact.shape)) for fact in facts} for facts in (first, second))
    if a != b:
        sides = " and ".join(", ".join(map(str, facts)) for facts in (first, second))
        raise T2NErrorInvalidArgument(f"the archives have different {what}: {sides}")


def _may_be_logits(output: OutputComparison, outputs: Sequence[OutputComparison]) -> bool:
    """Whether its last axis may be classes: of many, and more than any other output has in its last axis."""
    if output.reason is not None or len(output.shape) < 2 or 0 in output.shape or "float" not in output.dtype:
        return False
    others = [other.shape[-1] for other in outputs if other is not output and other.shape]
    return output.shape[-1] >= max(_CLASSES, *(count + 1 for count in others), 0)


def _timed(model: TractModel, inputs: Arrays) -> tuple[dict[str, NDArray[Any]], float]:
    took = []
    for _ in range(2):
        began = time.perf_counter()
        outputs = model.run(**inputs)
        took.append(time.perf_counter() - began)
    return outputs, min(took)


def _divergence(reference: NDArray[Any], actual: NDArray[Any]) -> Divergence:
    p, q = (log_softmax(logits.reshape(-1, logits.shape[-1])) for logits in (reference, actual))
    possible = np.exp(p) > 0  # elsewhere 0 log 0 is 0
    gaps = (
        (np.exp(p) * np.subtract(p, q, where=possible, out=np.zeros_like(p))).sum(1).clip(0)
    )  # below 0 by rounding only
    return Divergence(float(gaps.mean()), float(gaps.max()), float((p.argmax(1) == q.argmax(1)).mean()))


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized
