"""The report in words and cells of text, the same in every view."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch_to_nnef.quantize.rows import TensorRow
    from torch_to_nnef.report.data import Report, Totals
    from torch_to_nnef.verify import Comparison

QUANTIZATION_TITLE = "What quantization costs: float torch against quantized torch"
QUANTIZATION_NOTE = (
    "The same inputs through the model before and after quantization. A difference is expected, because fewer bits "
    "hold fewer digits; how much is acceptable is for you to judge."
)
ARCHIVE_NOTE = (
    "The same inputs through the model in torch and through the archive in tract. Both use the same stored weights, "
    "so next to no difference is expected. Outside is the share of values beyond the tolerance."
)
WEIGHTS_TITLE = "Quantized weights"
WEIGHTS_NOTE = (
    "SNR compares the stored weights with the originals: higher is better, and 6 dB more is half the error. "
    "Error is the same as a share of the weights' own size (relative RMSE). Worst first."
)
SKIPPED_TITLE = "Asked for, but left as they were"
STEPS_TITLE = "Time"

WEIGHTS_HEADER: tuple[str, ...] = ("tensor", "module", "shape", "stored", "bits", "SNR dB", "error")
_UNITS = ("B", "kB", "MB", "GB", "TB")
COMPARISON_HEADER: tuple[str, ...] = ("sizes", "output", "max error", "RMSE", "cosine", "SNR dB", "outside")


def archive_title(report: "Report") -> str:
    """Name the second comparison; there is nothing quantized about an export without a method."""
    return f"Is the archive right: {'' if report.method is None else 'quantized '}torch against tract"


def verdict(report: "Report") -> tuple[str, str]:
    """One or two words, and the sentence that explains them."""
    if not report.verified:
        return "not verified", "the archive was not run in tract, so nothing is known about its outputs"
    tolerance = report.archive[0].tolerance.value
    failed = [comparison for comparison in report.archive if not comparison.ok]
    if failed:
        return "mismatch", f"tract's outputs are not torch's within tolerance {tolerance!r} at {failed[0].sizes_text}"
    compared = sum(bool(comparison.outputs) for comparison in report.archive)
    where = "the traced sizes" if compared == 1 else f"{compared} sets of sizes"
    return "verified", f"tract's outputs are torch's within tolerance {tolerance!r} at {where}"


def size(count: int) -> str:
    """Write bytes in decimal units: `13.2 MB`."""
    value, unit = float(count), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:  # 999.95 would be printed as 1000.0
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def facts(report: "Report") -> list[tuple[str, str]]:
    """List the headline numbers as (name, value)."""
    totals: Totals = report.totals
    quantized = sum(row.quantized for row in report.rows)
    outcome = f"{quantized} of {len(report.rows)} tensors, {report.method}"
    return [
        ("parameters", f"{size(totals.parameter_bytes_before)} → {size(totals.parameter_bytes_after)}"),
        ("smaller", f"{totals.ratio:.1f}x"),
        ("bits a weight", f"{totals.bits_per_weight:.2f}"),
        ("quantized", "nothing was asked for" if report.method is None else outcome),
        ("archive", size(report.archive_bytes)),
    ]


def by_snr(rows: "Sequence[TensorRow]") -> "list[TensorRow]":
    """Sort the quantized rows, worst SNR first, unmeasured ones last."""
    return sorted((r for r in rows if r.quantized), key=lambda r: (math.inf if r.snr_db is None else r.snr_db, r.fqn))


def weight_cells(row: "TensorRow") -> tuple[str, ...]:
    """Cells under `WEIGHTS_HEADER`."""
    error = "" if row.relative_rmse is None else f"{row.relative_rmse:.1%}"
    shape = "x".join(map(str, row.shape))
    return (
        row.fqn,
        row.module_class,
        shape,
        f"{row.dtype} → {row.storage}",
        f"{row.bits_per_weight:g}",
        _db(row.snr_db),
        error,
    )


def comparison_cells(comparison: "Comparison") -> list[tuple[tuple[str, ...], bool]]:
    """Cells under `COMPARISON_HEADER` and whether that output is within tolerance, a row an output."""
    rows: list[tuple[tuple[str, ...], bool]] = []
    for output in comparison.outputs:
        distances = [f"{output.max_abs:.1e}", f"{output.rmse:.1e}", f"{output.cosine:.6f}", _db(output.snr_db)]
        if output.reason is not None:
            distances = ["-"] * 4
        rows.append(((comparison.sizes_text, output.name, *distances, _share(output.outside_share)), output.ok))
    return rows


def comparison_notes(comparisons: "Sequence[Comparison]") -> list[str]:
    """Write a sentence for every set of sizes that was not compared and every output that could not be."""
    notes = [
        f"{c.sizes_text}: not compared, the torch model itself refuses these sizes: {c.refused}"
        for c in comparisons
        if c.refused is not None
    ]
    return notes + [f"{c.sizes_text}: {o}" for c in comparisons for o in c.outputs if o.reason is not None]


def _db(value: float | None) -> str:
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.1f}"


def _share(value: float) -> str:
    return "none" if value == 0 else f"{value:.2%}" if value >= 1e-4 else f"{value:.0e}"
