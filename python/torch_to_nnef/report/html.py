"""The report as HTML: one self-contained page, or the part of it that a notebook embeds."""

from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from math import isfinite
from string import Template
from typing import TYPE_CHECKING

from torch_to_nnef.report import words

if TYPE_CHECKING:
    from torch_to_nnef.quantize.rows import TensorRow
    from torch_to_nnef.report.data import Report
    from torch_to_nnef.verify import Comparison

_PAGE = Template(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    "<title>$title</title>\n<style>html, body { margin: 0; background: Canvas; }</style>\n</head>\n"
    "<body>\n$fragment</body>\n</html>\n"
)


def page(report: "Report") -> str:
    """Return a whole document that needs neither network nor scripts."""
    return _PAGE.substitute(title=escape(f"{report.model} → {report.archive_path.name}"), fragment=fragment(report))


def fragment(report: "Report") -> str:
    """Return one element with its own styles, which do not reach beyond it."""
    word, sentence = words.verdict(report)
    return _template().substitute(
        model=escape(report.model),
        archive=escape(report.archive_path.name),
        state=word.replace(" ", "-"),
        verdict=escape(word),
        sentence=escape(sentence),
        facts="".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in words.facts(report)),
        comparisons=_comparisons(report),
        weights=_weights(report.rows),
        skipped=_skipped(report.rows),
        sections="".join(_section(s.title, "", _table(s.header, s.rows)) for s in report.sections),
        steps=_steps(report),
        versions=escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
    )


@cache
def _template() -> Template:
    return Template((files("torch_to_nnef.report") / "template.html").read_text(encoding="utf-8"))


def _comparisons(report: "Report") -> str:
    parts = []
    if report.quantization:
        parts.append(_comparison(words.QUANTIZATION_TITLE, words.QUANTIZATION_NOTE, report.quantization, judged=False))
    if report.archive:
        parts.append(_comparison(words.archive_title(report), words.ARCHIVE_NOTE, report.archive, judged=True))
    return "".join(parts)


def _comparison(title: str, note: str, comparisons: "Sequence[Comparison]", *, judged: bool) -> str:
    rows = [row for comparison in comparisons for row in words.comparison_cells(comparison)]
    classes = ["bad" if judged and not ok else "" for _, ok in rows]
    notes = "".join(f"<p>{escape(note)}</p>" for note in words.comparison_notes(comparisons))
    return _section(title, note, _table(words.COMPARISON_HEADER, [cells for cells, _ in rows], 2, classes) + notes)


def _weights(rows: "Sequence[TensorRow]") -> str:
    quantized = words.by_snr(rows)
    if not quantized:
        return ""
    longest = max((r.snr_db for r in quantized if r.snr_db is not None and isfinite(r.snr_db)), default=0.0)
    body = "".join(_weight(row, longest) for row in quantized)
    names = words.WEIGHTS_HEADER
    header = "".join(f"<th{_kind(i, 4)}>{escape(name)}</th>" for i, name in enumerate(names)) + "<th></th>"
    table = f"<div class=wide><table class=full><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    return _section(words.WEIGHTS_TITLE, words.WEIGHTS_NOTE, table)


def _weight(row: "TensorRow", longest: float) -> str:
    cells = words.weight_cells(row)
    columns = "".join(f"<td{_kind(i, 4)}>{escape(cell)}</td>" for i, cell in enumerate(cells))
    share = min(max(row.snr_db or 0.0, 0.0) / max(longest, 1.0), 1.0)
    return f'<tr>{columns}<td class=bar><i style="width:{share:.1%}"></i></td></tr>'


def _skipped(rows: "Sequence[TensorRow]") -> str:
    skipped = [(row.fqn, row.module_class, row.reason or "") for row in rows if not row.quantized]
    return _section(words.SKIPPED_TITLE, "", _table(("tensor", "module", "why"), skipped)) if skipped else ""


def _steps(report: "Report") -> str:
    rows = [(name, f"{seconds:.2f}") for name, seconds in report.steps]
    return _section(words.STEPS_TITLE, "", _table(("step", "seconds"), rows, numbers_from=1)) if rows else ""


def _section(title: str, note: str, content: str) -> str:
    explained = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{explained}{content}</section>\n"


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None, classes: Sequence[str] = ()
) -> str:
    """Return a table whose columns from `numbers_from` on are numbers; `classes`: a CSS class a row."""
    kinds = [_kind(i, numbers_from) for i in range(len(header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        lines.append(f'<tr class="{classes[i]}">{cells}</tr>' if classes else f"<tr>{cells}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _kind(column: int, numbers_from: int | None) -> str:
    return " class=n" if numbers_from is not None and column >= numbers_from else ""
