"""The report as Markdown: the same words and cells, for a pull request or a wiki."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_to_nnef.report import words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch_to_nnef.report.data import Report
    from torch_to_nnef.verify import Comparison


def page(report: Report) -> str:
    """Return the whole report."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    word, sentence = words.verdict(report)
    yield f"# {_text(report.model)} → {_text(report.archive_path.name)}"
    yield ""
    yield f"**{word}**: {_text(sentence)}"
    yield from _table(("", ""), words.facts(report))
    for section in report.tables:
        yield from _section(section.title, "", section.header, section.rows)
    if report.quantization:
        yield from _comparison(words.QUANTIZATION_TITLE, words.QUANTIZATION_NOTE, report.quantization)
    if report.archive:
        yield from _comparison(words.archive_title(report), words.ARCHIVE_NOTE, report.archive)
    if compared := words.gains(report.rows):
        yield from _section(words.GAIN_TITLE, words.GAIN_NOTE, words.GAIN_HEADER, compared)
    if skipped := [(row.fqn, row.module_class, row.reason or "") for row in report.rows if not row.quantized]:
        yield from _section(words.SKIPPED_TITLE, "", ("tensor", "module", "why"), skipped)
    header, cells, _ = words.weights_table(words.by_snr(report.rows))
    if cells:
        yield from _section(words.WEIGHTS_TITLE, words.WEIGHTS_NOTE, header, cells)
    if report.steps:
        yield from _section(words.STEPS_TITLE, "", ("step", "seconds"), [(n, f"{s:.2f}") for n, s in report.steps])
    yield ""
    yield _text(", ".join(f"{name} {version}" for name, version in report.versions.items()))


def _comparison(title: str, note: str, comparisons: Sequence[Comparison]) -> Iterator[str]:
    rows = [cells for comparison in comparisons for cells, _ in words.comparison_cells(comparison)]
    yield from _section(title, note, words.COMPARISON_HEADER, rows)
    for line in words.comparison_notes(comparisons):
        yield ""
        yield _text(line)


def _section(title: str, note: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield f"## {_text(title)}"
    if note:
        yield ""
        yield _text(note)
    yield from _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield _row(header)
    yield _row(["---"] * len(header))
    yield from map(_row, rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(text: str) -> str:
    """As it is, whatever it holds: no markup, no HTML, no new cell or line."""
    flat = " ".join(text.split())
    for sign in "\\`*_<>[]|#":
        flat = flat.replace(sign, f"\\{sign}")
    return flat
