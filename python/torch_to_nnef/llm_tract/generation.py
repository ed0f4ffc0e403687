"""The same greedy text from torch and from tract, compared token by token."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torch_to_nnef.inference_target import Tolerance, TractCheckTolerance
from torch_to_nnef.llm_tract.causal import Signature, as_step
from torch_to_nnef.llm_tract.steps import run_ahead
from torch_to_nnef.report.data import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from torch_to_nnef.llm_tract.steps import Steps


class TorchSteps:
    """`Steps` of a model of transformers, or of a step made of one; `dtype` of its caches, if that is not the model's."""

    def __init__(self, model: PreTrainedModel, signature: Signature, dtype: torch.dtype | None = None) -> None:
        self._signature = replace(signature, logits=0)
        self._step = as_step(model, self._signature)
        self._dtype: torch.dtype = dtype or model.dtype
        self.reset()

    def reset(self) -> None:
        """Forget what was fed."""
        self._caches = self._signature.past(0, self._dtype)

    def keep(self, count: int) -> None:
        """See `Steps.keep`."""
        self._caches = [cache[:, :, :count] for cache in self._caches]

    @torch.no_grad()
    def feed(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """See `Steps.feed`; gives every position always."""
        logits, *self._caches = self._step(torch.tensor([ids]), *self._caches)
        rows: NDArray[np.float32] = logits[0].float().numpy()
        return rows


@dataclass(frozen=True)
class Difference:
    """Torch and tract would go on differently. Tokens and logits are those of torch's choice, then of tract's.

    position: of the token in the text generated, from 0. tie: both logits were as close, in torch, as the tolerance lets them be apart.
    """

    position: int
    tokens: tuple[int, int]
    torch_logits: tuple[float, float]
    tract_logits: tuple[float, float]
    tie: bool


@dataclass(frozen=True)
class GenerationComparison:
    """Greedy generation in torch and in tract, on the same quantized weights, caches carried on both sides.

    tokens: torch's. After a difference both sides go on with torch's token, so that every position is compared.
    max_logit_error: largest distance of a logit over all positions.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    differences: tuple[Difference, ...]
    max_logit_error: float
    tolerance: TractCheckTolerance

    @property
    def ok(self) -> bool:
        """The tokens are equal, or differ only where torch itself saw a tie within the tolerance; and all logits are numbers."""
        return all(difference.tie for difference in self.differences) and not math.isnan(self.max_logit_error)

    @property
    def tract_tokens(self) -> tuple[int, ...]:
        """What tract generates, up to the first token that is not torch's."""
        if not self.differences:
            return self.tokens
        first = self.differences[0]
        return (*self.tokens[: first.position], first.tokens[1])

    def __str__(self) -> str:
        count = len(self.tokens)
        if not self.differences:
            return f"all {count} tokens are torch's; logits at most {self.max_logit_error:.1e} apart"
        first, others = self.differences[0], len(self.differences) - 1
        gap = first.torch_logits[0] - first.torch_logits[1]
        tie = "a tie within tolerance" if first.tie else "more than tolerance"
        return (
            f"token {first.position} of {count} is {first.tokens[0]} in torch (logits {_pair(first.torch_logits)}), {first.tokens[1]} "
            f"in tract (logits {_pair(first.tract_logits)}); they are {gap:.1e} apart in torch, {tie} {self.tolerance.value!r}"
            + (f"; {others} more differences when both go on with torch's tokens" if others else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "ok": self.ok,
            **dataclasses.asdict(self),
            "tolerance": self.tolerance.value,
            "tract_tokens": self.tract_tokens,
        }


def compare_generation(
    reference: Steps,
    archive: Steps,
    prompt: Sequence[int],
    count: int,
    tolerance: TractCheckTolerance,
    dtype: torch.dtype = torch.float32,
    slack: float = 0.0,
) -> GenerationComparison:
    """Generate `count` tokens after `prompt` in torch (`reference`) and tract (`archive`); `dtype` is that of the logits in torch.

    slack: what rounding to 8 bits adds to `atol`.

    tract goes ahead token by token; torch then reads all of them in one run and says, at each, which one it would have chosen. From the
    first that differs, both go on with torch's: so the tokens are those of torch alone, for next to the price of one run of it.

    The logits of the model are verified to be apart by no more than `atol + rtol |logit|`. Where torch prefers a to b and tract b to a,
    those errors make up the gap: `logit_a - logit_b` in torch is at most the sum of both bounds. That is a tie; a larger gap is an error.
    """
    reference.reset()
    archive.reset()
    bounds = tolerance.bounds(str(dtype).removeprefix("torch."))
    bounds = replace(bounds, atol=max(bounds.atol, slack))
    tokens: list[int] = []
    differences: list[Difference] = []
    worst = 0.0
    pending = list(prompt)
    while len(tokens) < count:
        drafts, actual = run_ahead(archive, pending, count - len(tokens))
        expected = reference.feed([*pending, *drafts[:-1]], every=True)[-len(drafts) :]
        for in_torch, in_tract, draft in zip(expected, actual, drafts, strict=True):
            worst = float(np.maximum(worst, _distance(in_torch, in_tract)))
            tokens.append(int(in_torch.argmax()))
            if tokens[-1] != draft:
                differences.append(_difference(len(tokens) - 1, (tokens[-1], draft), in_torch, in_tract, bounds))
                break
        for steps in (reference, archive):
            steps.keep(len(prompt) + len(tokens) - 1)
        pending = tokens[-1:]
    return GenerationComparison(tuple(prompt), tuple(tokens), tuple(differences), worst, tolerance)


def texts(tokenizer: Any, compared: GenerationComparison, before: Sequence[int] = ()) -> Section:
    """What was generated, as text; `before`: tokens of the float model, from before its weights changed. tokenizer: of transformers."""
    forms = {"float torch": before, "torch": compared.tokens, "tract": compared.tract_tokens}
    rows = [(name, tokenizer.decode(list(tokens))) for name, tokens in forms.items() if tokens]
    return Section(f"Texts after {tokenizer.decode(list(compared.prompt))!r}", ("model", "text"), tuple(rows))


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The largest; none between infinities of the same sign, which stand for tokens that never come."""
    return float(np.abs(np.subtract(a, b, out=np.zeros_like(a), where=a != b)).max())


def _difference(
    position: int,
    pair: tuple[int, int],
    torch_all: NDArray[np.float32],
    tract_all: NDArray[np.float32],
    bounds: Tolerance,
) -> Difference:
    in_torch, in_tract = ((float(logits[pair[0]]), float(logits[pair[1]])) for logits in (torch_all, tract_all))
    allowed = sum(bounds.atol + bounds.rtol * abs(logit) for logit in in_torch)
    return Difference(position, pair, in_torch, in_tract, tie=in_torch[0] - in_torch[1] <= allowed)


def _pair(logits: tuple[float, float]) -> str:
    return f"{logits[0]:.6g} and {logits[1]:.6g}"
