"""The report of a language model: that of any export, with what its texts are worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch_to_nnef.report import Report, Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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


def sections(
    generation: GenerationComparison | None, quality: Quality | None, texts: Mapping[str, str], notes: Iterable[str]
) -> tuple[Section, ...]:
    """The tables of an `LlmReport` beside those of every report."""
    found = [quality.section()] if quality else []
    if generation:
        found.append(Section("Greedy text: quantized torch against tract", ("outcome",), ((str(generation),),)))
    if texts:
        found.append(Section("Texts generated", ("by", "text"), tuple(texts.items())))
    if lines := tuple((note,) for note in notes):
        found.append(Section("Notes", ("",), lines))
    return tuple(found)


def condensed(comparison: Comparison) -> Comparison:
    """Of many caches, the key and the value that are furthest off: what is in one is in all layers above."""
    kept: dict[str, OutputComparison] = {}
    for output in comparison.outputs:
        side = output.name.rstrip("0123456789")
        if side not in kept or (kept[side].ok, -kept[side].max_abs) > (output.ok, -output.max_abs):
            kept[side] = output
    return replace(comparison, outputs=tuple(kept.values()))
