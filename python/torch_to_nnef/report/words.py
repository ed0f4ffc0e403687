"""The report in words and cells of text, the same in every view."""

import math
from typing import TYPE_CHECKING

from torch_to_nnef.report import charts

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
OUTPUTS_NOTE = (
    "Output SNR compares what a weight computes for inputs held out of the calibration, as the weights before it give them, with what it "
    "computes in the float model: the error that matters. Methods that learn from data raise it, often at the cost of the weight's own SNR."
)
DEPTH_TITLE = "Error by depth"
DEPTH_NOTE = "Each weight in the order of the model; higher is better."
HISTOGRAMS_TITLE = "Where weights and codes lie"
HISTOGRAMS_NOTE = (
    "Weights in units of the root mean square of their tensor; codes are what multiplies the scale of a group. All packed weights "
    "together (large ones by a sample of their rows), then the three with the most error."
)
GAIN_TITLE = "Against plain min-max"
GAIN_NOTE = (
    "The same weights in the same bytes, with scales of the extreme of each group over -8 (ggml's Q4_0). "
    "Means over the weights of a kind."
)
GAIN_HEADER: tuple[str, ...] = (
    "kind",
    "weights",
    "min-max dB",
    "this dB",
    "gain",
    "min-max output dB",
    "this output dB",
    "gain",
)
SKIPPED_TITLE = "Asked for, but left as they were"
STEPS_TITLE = "Time"

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
    """Sort the quantized rows, worst SNR first (of outputs, where they are known), unmeasured ones last."""

    def key(row: "TensorRow") -> tuple[float, str]:
        value = charts.db_of(row)
        return math.inf if value is None else value, row.fqn

    return sorted((row for row in rows if row.quantized), key=key)


def weights_table(rows: "Sequence[TensorRow]") -> "tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]":
    """Header, cells and the names of the columns of numbers, for `rows`; columns that would be empty, or all the same, are left out."""
    columns: dict[str, tuple[str, ...]] = {
        "tensor": tuple(row.fqn for row in rows),
        "module": tuple(row.module_class for row in rows),
        "shape": tuple("x".join(map(str, row.shape)) for row in rows),
        "stored": tuple(f"{row.dtype} → {row.storage}" for row in rows),
        "method": tuple(row.method or "" for row in rows),
        "bits": tuple(f"{row.bits_per_weight:g}" for row in rows),
        "SNR dB": tuple(_db(row.snr_db) for row in rows),
        "error": tuple("" if row.relative_rmse is None else f"{row.relative_rmse:.1%}" for row in rows),
        "output dB": tuple(_db(row.output_snr_db) for row in rows),
        "seconds": tuple("" if row.seconds is None else f"{row.seconds:.2f}" for row in rows),
    }
    optional = {"method": 2, "output dB": 1, "seconds": 1}
    kept = {n: c for n, c in columns.items() if len({*c} - {""} if n != "method" else {*c}) >= optional.get(n, 0)}
    numbers = tuple(name for name in kept if name in ("bits", "SNR dB", "error", "output dB", "seconds"))
    return tuple(kept), list(zip(*kept.values(), strict=True)), numbers


def gains(rows: "Sequence[TensorRow]") -> list[tuple[str, ...]]:
    """Cells under `GAIN_HEADER`, a row a kind of layer and one for all; nothing if all are what min-max makes anyway."""
    packed = [row for row in rows if row.min_max_snr_db is not None and row.snr_db is not None]
    if all(row.snr_db == row.min_max_snr_db for row in packed):
        return []
    kinds: dict[str, list[TensorRow]] = {}
    for row in packed:
        kinds.setdefault(charts.role(row), []).append(row)
    groups = [*kinds.items()] if len(kinds) > 1 else []
    return [_gain(name, group) for name, group in [*groups, ("all", packed)]]


def _gain(name: str, rows: "Sequence[TensorRow]") -> tuple[str, ...]:
    cells = [name, str(len(rows))]
    for before, after in (("min_max_snr_db", "snr_db"), ("min_max_output_snr_db", "output_snr_db")):
        pairs = [(getattr(row, before), getattr(row, after)) for row in rows]
        known = [(b, a) for b, a in pairs if b is not None and a is not None and math.isfinite(b) and math.isfinite(a)]
        if not known:
            cells += [""] * 3
            continue
        means = [sum(values) / len(known) for values in zip(*known, strict=True)]
        cells += [f"{means[0]:.1f}", f"{means[1]:.1f}", f"{means[1] - means[0]:+.1f}"]
    return tuple(cells)


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
