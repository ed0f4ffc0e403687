"""The report of a language model: that of any export, with what its texts are worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch_to_nnef.report import Report

if TYPE_CHECKING:
    from torch_to_nnef.llm_tract.generation import GenerationComparison
    from torch_to_nnef.llm_tract.quality import Quality
    from torch_to_nnef.verify import Comparison, OutputComparison


@dataclass(frozen=True, kw_only=True)
class LlmReport(Report):
    """`Report`, and the model in words.

    archive: the four scenarios; of the caches, those furthest off.
    generation: greedy text of torch and tract, token by token; quality: perplexity and divergence of every form of the model on a text.
    Both are None if they were not taken; `notes` say why, and what else the user should know.
    """

    generation: GenerationComparison | None = None
    quality: Quality | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """The archive was verified in all scenarios, and generates torch's text."""
        return super().ok and (self.generation is None or self.generation.ok)


def condensed(comparison: Comparison) -> Comparison:
    """Of many caches, the key and the value that are furthest off: what is in one is in all layers above."""
    kept: dict[str, OutputComparison] = {}
    for output in comparison.outputs:
        side = output.name.rstrip("0123456789")
        if side not in kept or (kept[side].ok, -kept[side].max_abs) > (output.ok, -output.max_abs):
            kept[side] = output
    return replace(comparison, outputs=tuple(kept.values()))
