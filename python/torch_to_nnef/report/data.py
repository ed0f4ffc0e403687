"""The report: plain data, and the way to its views."""

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_to_nnef._native import write_text
from torch_to_nnef.files import as_path
from torch_to_nnef.report import html, markdown, terminal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderResult

    from torch_to_nnef.graph.macs import Arithmetic, Product
    from torch_to_nnef.quantize.rows import TensorRow
    from torch_to_nnef.verify import Comparison
    from torch_to_nnef.verify.metrics import Metrics


SCHEMA = 2
"""Of `Report.to_dict`; it grows by one when a field changes its meaning or goes."""


class Section(NamedTuple):
    """A table of the caller's: a title, column names, rows of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Totals:
    """Sizes in bytes: of all parameters, and of those that were quantized."""

    parameter_count: int
    parameter_bytes_before: int
    parameter_bytes_after: int
    quantized_bytes_before: int
    quantized_bytes_after: int

    @classmethod
    def of(cls, rows: "Iterable[TensorRow]", other_count: int = 0, other_bytes: int = 0) -> "Totals":
        """Sum `rows`, and `other_count` values in `other_bytes` bytes of parameters that nobody asked for."""
        rows = tuple(rows)
        quantized = [row for row in rows if row.quantized]
        return cls(
            parameter_count=other_count + sum(math.prod(row.shape) for row in rows),
            parameter_bytes_before=other_bytes + sum(row.nbytes_before for row in rows),
            parameter_bytes_after=other_bytes + sum(row.nbytes_after for row in rows),
            quantized_bytes_before=sum(row.nbytes_before for row in quantized),
            quantized_bytes_after=sum(row.nbytes_after for row in quantized),
        )

    @property
    def ratio(self) -> float:
        """How many times smaller all parameters became."""
        return self.parameter_bytes_before / self.parameter_bytes_after if self.parameter_bytes_after else 1.0

    @property
    def bits_per_weight(self) -> float:
        """Average over all parameters, quantized or not."""
        return 8 * self.parameter_bytes_after / self.parameter_count if self.parameter_count else 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every tensor, and two separate comparisons.

    method: key or name of the quantization method; None when nothing was asked to be quantized.
    archive_bytes: size of the archive on disk. rows: a row for every tensor that was asked for, quantized or not.
    quantization: float torch against quantized torch, what quantization costs; reported, never judged.
    archive: quantized torch against tract, whether the archive is right; empty when it was not checked.
    metrics: float torch, quantized torch and the archive in tract in the terms of the model's kind; None if nothing was to be quantized.
    arithmetic: the products of the archive and which of them run on 8-bit codes; None if nothing is rounded to codes.
    steps: (name, seconds). versions: name -> version. sections: further tables, shown at the end.
    """

    model: str
    method: str | None
    archive_path: Path
    archive_bytes: int
    rows: "tuple[TensorRow, ...]"
    totals: Totals
    quantization: "tuple[Comparison, ...]" = ()
    archive: "tuple[Comparison, ...]" = ()
    metrics: "Metrics | None" = None
    arithmetic: "Arithmetic | None" = None
    steps: tuple[tuple[str, float], ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    sections: tuple[Section, ...] = ()

    @property
    def tables(self) -> tuple[Section, ...]:
        """The metrics, what runs in integers, then `sections`."""
        own = [] if self.metrics is None else [Section(*self.metrics.table())]
        own += [] if self.arithmetic is None else [_in_integers(self.arithmetic, self.archive)]
        return (*own, *self.sections)

    @property
    def verified(self) -> bool:
        """The archive was run in tract and compared, at one set of sizes at least."""
        return any(comparison.outputs for comparison in self.archive)

    @property
    def ok(self) -> bool:
        """The archive was verified, and tract's outputs are those of the quantized torch model within tolerance."""
        return self.verified and all(comparison.ok for comparison in self.archive)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types: of paths the base name, non-finite numbers as text that `float()` reads."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del data["archive_path"]
        totals = dataclasses.asdict(self.totals) | {
            "ratio": self.totals.ratio,
            "bits_per_weight": self.totals.bits_per_weight,
        }
        head = {"schema": SCHEMA, "ok": self.ok, "verified": self.verified, "archive_name": self.archive_path.name}
        steps = [{"name": name, "seconds": seconds} for name, seconds in self.steps]
        sections = [section._asdict() for section in self.sections]
        data |= {"totals": totals, "steps": steps, "sections": sections}
        if self.arithmetic is not None:
            counts = {name: getattr(self.arithmetic, name) for name in ("macs", "integer_macs", "integer_share")}
            data["arithmetic"] = plain(self.arithmetic) | counts
        everything: dict[str, Any] = plain(head | data)
        return everything

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write `to_dict()` to `path`, replacing it whole.

        Raises `T2NErrorNotFoundFile` if its folder is not there, `T2NErrorRuntime` if the system refuses.
        """
        write_text(
            as_path("path", path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write one self-contained page to `path`, as `to_json` does."""
        write_text(as_path("path", path), html.page(self))

    def to_markdown(self, path: str | PathLike[str]) -> None:
        """Write Markdown to `path`, as `to_json` does."""
        write_text(as_path("path", path), markdown.page(self))

    def __str__(self) -> str:
        return terminal.text(self)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield from terminal.view(self, options.max_width)

    def _repr_html_(self) -> str:
        return html.fragment(self)


def _in_integers(arithmetic: "Arithmetic", archive: "tuple[Comparison, ...]") -> Section:
    """What runs on 8-bit codes, what does not and why, and how many values of outputs rounding moved."""
    floats: dict[tuple[str, str], list[Product]] = {}
    for product in arithmetic.products:
        if product.reason:
            floats.setdefault((product.operator, product.reason), []).append(product)
    rows = [
        (operator, _modules(found), f"{sum(product.macs for product in found):,}", reason)
        for (operator, reason), found in floats.items()
    ]
    rows += [
        (name, "-", "-", f"in float between codes, {count} times") for name, count in arithmetic.float_operators.items()
    ]
    rows += [
        (
            output.name,
            comparison.sizes_text,
            "-",
            f"{output.rounded_share:.3%} of values moved by codes one off torch's",
        )
        for comparison in archive
        for output in comparison.outputs
        if output.rounded_share
    ]
    share = f"{arithmetic.integer_share:.1%} of {arithmetic.macs:,} multiply-accumulates run in integers"
    return Section(f"8-bit arithmetic: {share}", ("operator or output", "module or sizes", "MACs", "why"), tuple(rows))


def _modules(products: "list[Product]") -> str:
    more = f" and {len(products) - 1} more" if len(products) > 1 else ""
    return f"{products[0].module_path or 'the root module'}{more}"


def plain(value: Any) -> Any:
    """`value` as JSON types: data classes with their verdicts, non-finite numbers as text that `float()` reads."""
    if dataclasses.is_dataclass(value):
        properties = {"ok": value.ok} if hasattr(value, "ok") else {}
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)} | properties)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
