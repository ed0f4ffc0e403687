"""The report on a terminal, or as plain text."""

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from torch_to_nnef.report import words

if TYPE_CHECKING:
    from torch_to_nnef.report.data import Report
    from torch_to_nnef.verify import Comparison

_PLAIN_WIDTH = 100
_NARROW = 120  # columns below which some are left out
_WIDE = ("module", "method", "seconds")
_VERDICT_STYLE = {"verified": "bold green", "mismatch": "bold red", "not verified": "bold yellow"}


def text(report: "Report") -> str:
    """Return the whole report without colour, for a width of 100 columns."""
    console = Console(
        file=StringIO(), width=_PLAIN_WIDTH, color_system=None, force_terminal=False, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def view(report: "Report", width: int) -> Iterator[RenderableType]:
    """Yield what to print, top to bottom, for a terminal of `width` columns."""
    yield Text.assemble((report.model, "bold"), " → ", (report.archive_path.name, "bold"))
    facts = _table(("", ""), right=())
    facts.show_header = False
    for name, value in words.facts(report):
        facts.add_row(Text(name, "dim"), Text(value))
    yield facts
    yield from _weights(report, width)
    if report.quantization:
        yield from _comparison(words.QUANTIZATION_TITLE, words.QUANTIZATION_NOTE, report.quantization, judged=False)
    if report.archive:
        yield from _comparison(words.archive_title(report), words.ARCHIVE_NOTE, report.archive, judged=True)
    for section in report.tables:
        yield from _titled(section.title, "", _filled(section.header, section.rows))
    if report.steps:
        yield from _titled(
            words.STEPS_TITLE, "", _filled(("step", "seconds"), [(n, f"{s:.2f}") for n, s in report.steps])
        )
    yield Text("\n" + ", ".join(f"{name} {version}" for name, version in report.versions.items()), "dim")
    word, sentence = words.verdict(report)
    yield Text.assemble((word.upper(), _VERDICT_STYLE[word]), f": {sentence}")


def _weights(report: "Report", width: int) -> Iterator[RenderableType]:
    header, rows, numbers = words.weights_table(words.by_snr(report.rows))
    kept = [i for i, name in enumerate(header) if width >= _NARROW or name not in _WIDE]
    header, rows = tuple(header[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]
    if rows:
        note = f"{words.WEIGHTS_NOTE} {words.OUTPUTS_NOTE}" if "output dB" in header else words.WEIGHTS_NOTE
        yield from _titled(words.WEIGHTS_TITLE, note, _filled(header, rows, right=numbers))
    if compared := words.gains(report.rows):
        cells = compared if width >= _NARROW else compared[-1:]
        yield from _titled(words.GAIN_TITLE, "", _filled(words.GAIN_HEADER, cells, right=words.GAIN_HEADER[1:]))
    skipped = [(row.fqn, row.reason or "") for row in report.rows if not row.quantized]
    if skipped:
        yield from _titled(words.SKIPPED_TITLE, "", _filled(("tensor", "why"), skipped))


def _comparison(
    title: str, note: str, comparisons: "Sequence[Comparison]", *, judged: bool
) -> Iterator[RenderableType]:
    table = _table(words.COMPARISON_HEADER, right=words.COMPARISON_HEADER[2:])
    for cells, ok in (row for comparison in comparisons for row in words.comparison_cells(comparison)):
        table.add_row(*(Text(cell, "red" if judged and not ok else "") for cell in cells))
    yield from _titled(title, note, table)
    for line in words.comparison_notes(comparisons):
        yield Text(f"({line})")


def _titled(title: str, note: str, table: Table) -> Iterator[RenderableType]:
    yield Text(f"\n{title}", "bold")
    if note:
        yield Text(note, "dim")
    yield table


def _table(header: Iterable[str], right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in header:
        numeric = name in right
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def _filled(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ("seconds",)) -> Table:
    table = _table(header, right)
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because names may hold what rich reads as markup
    return table
