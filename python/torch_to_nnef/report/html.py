"""The report as HTML: one self-contained page, or the part of it that a notebook embeds."""

from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from math import isfinite
from string import Template
from typing import TYPE_CHECKING

from torch_to_nnef.report import charts, words

if TYPE_CHECKING:
    from torch_to_nnef.quantize.rows import TensorRow
    from torch_to_nnef.report.data import Report
    from torch_to_nnef.verify import Comparison

_PAGE = Template(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    "<title>$title</title>\n<style>html, body { margin: 0; background: #ffffff; }\n"
    "@media (prefers-color-scheme: dark) { html, body { background: #12161d; } }</style>\n</head>\n"
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
        charts=_charts(report.rows),
        skipped=_skipped(report.rows),
        sections="".join(_section(s.title, "", _table(s.header, s.rows)) for s in report.tables),
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
    longest = max((db for r in quantized if (db := charts.db_of(r)) is not None and isfinite(db)), default=0.0)
    names, cells, numbers = words.weights_table(quantized)
    kinds = [" class=n" if name in numbers else "" for name in names]
    body = "".join(_weight(row, texts, kinds, longest) for row, texts in zip(quantized, cells, strict=True))
    header = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(names, kinds, strict=True)) + "<th></th>"
    table = f"<div class=wide><table class=full><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    note = f"{words.WEIGHTS_NOTE} {words.OUTPUTS_NOTE}" if "output dB" in names else words.WEIGHTS_NOTE
    return _section(words.WEIGHTS_TITLE, note, table)


def _weight(row: "TensorRow", cells: Sequence[str], kinds: Sequence[str], longest: float) -> str:
    columns = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(cells, kinds, strict=True))
    share = min(max(charts.db_of(row) or 0.0, 0.0) / max(longest, 1.0), 1.0)
    return f'<tr>{columns}<td class=bar><i style="width:{share:.1%}"></i></td></tr>'


def _charts(rows: "Sequence[TensorRow]") -> str:
    quantized = [row for row in rows if row.quantized]
    parts = []
    if compared := words.gains(rows):
        parts.append(_section(words.GAIN_TITLE, words.GAIN_NOTE, _table(words.GAIN_HEADER, compared, numbers_from=1)))
    if len(quantized) > 1 and (chart := charts.by_depth(quantized)):
        note = words.OUTPUTS_NOTE if any(row.output_snr_db is not None for row in quantized) else ""
        parts.append(
            _section(words.DEPTH_TITLE, f"{words.DEPTH_NOTE} {note}".strip(), f"<div class=wide>{chart}</div>")
        )
    if together := charts.histograms(quantized):
        worst = words.by_snr(quantized)[:3] if len(quantized) > 1 else ()
        several = "".join(
            f"<h3>{escape(row.fqn)}</h3><div class=figures>{charts.histograms([row])}</div>" for row in worst
        )
        content = f"<div class=figures>{together}</div>{several}"
        parts.append(_section(words.HISTOGRAMS_TITLE, words.HISTOGRAMS_NOTE, content))
    return "".join(parts)


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
