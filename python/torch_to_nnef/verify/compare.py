"""Compare two tensors: how far apart, where it is worst, and whether that is within a tolerance."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from torch_to_nnef.inference_target import Tolerance, TractCheckTolerance

_CHUNK = 1 << 18  # elements held in f64 at a time


@dataclass(frozen=True, kw_only=True)
class OutputComparison:
    """One output, reference against actual. Distances are in the unit of the output.

    shape, dtype: of the reference. outside, outside_share: values beyond the tolerance, their number and share (0..1).
    relative_rmse: RMSE / RMS of the reference; snr_db: -20 log10 of it, infinite when equal; cosine: of their angle.
    worst_index: the value that exceeds its tolerance most (None for an empty tensor), with both values there.
    slack: what may be added to the tolerance because values are rounded to 8 bits on the way; rounded_share: of values that need it.
    reason: why the two cannot be compared at all (shape, dtype); the distances are then NaN.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    ok: bool
    outside: int
    outside_share: float
    max_abs: float = math.nan
    rmse: float = math.nan
    relative_rmse: float = math.nan
    cosine: float = math.nan
    snr_db: float = math.nan
    worst_index: tuple[int, ...] | None = None
    reference_at_worst: float | int | bool | None = None
    actual_at_worst: float | int | bool | None = None
    reason: str | None = None
    slack: float = 0.0
    rounded_share: float = 0.0

    def __str__(self) -> str:
        if self.reason is not None:
            return f"output {self.name!r}: {self.reason}"
        count = f"{self.outside} of {math.prod(self.shape)} values ({self.outside_share:.2%}) outside"
        at = f"reference {self.reference_at_worst!r}, actual {self.actual_at_worst!r}"
        return f"output {self.name!r}: {count}, worst at {list(self.worst_index or ())}: {at}"


@dataclass(frozen=True)
class Comparison:
    """Every output of one run, at one set of sizes.

    kind: "quantization" is float torch against quantized torch, "archive" is quantized torch against tract.
    sizes: symbol -> size. traced: these are the sizes the model was captured at.
    refused: torch's own explanation when the torch model cannot run at these sizes; `outputs` is then empty.
    name: what this run is, where the sizes alone do not say it.
    """

    kind: Literal["quantization", "archive"]
    sizes: dict[str, int]
    traced: bool
    outputs: tuple[OutputComparison, ...]
    tolerance: TractCheckTolerance
    refused: str | None = None
    name: str | None = None

    @property
    def ok(self) -> bool:
        """No output is outside the tolerance."""
        return all(output.ok for output in self.outputs)

    @property
    def sizes_text(self) -> str:
        """The sizes as text: `B=2, S=5`, with the traced ones marked, behind the name if there is one."""
        text = ", ".join(f"{symbol}={size}" for symbol, size in self.sizes.items())
        if not text:
            text = "as traced"
        elif self.traced:
            text += " (traced)"
        return text if self.name is None else f"{self.name}: {text}"


def as_array(values: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return the values as tract takes and gives them, on the host, not copied if avoidable.

    bf16, which numpy lacks, is f32; complex values are real ones with a last axis of 2, as in the archive.
    """
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu().resolve_conj().resolve_neg()
    if values.is_complex():
        values = torch.view_as_real(values)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def compare(
    reference: torch.Tensor | NDArray[Any],
    actual: NDArray[Any],
    tolerance: TractCheckTolerance,
    *,
    name: str = "output",
    slack: float = 0.0,
) -> OutputComparison:
    """Compare `actual` with `reference` (any shape; float, integer or bool) in f64, a bounded chunk at a time.

    A complex reference is compared as pairs, a bf16 one as f32, within the bounds of half precision. NaN equals NaN, an
    infinity the one of its sign; any other pair with a non-finite value is outside and makes `max_abs` and `rmse` infinite, while
    cosine and RMS cover the pairs of finite values. Integers and booleans are outside when they are not equal.
    A quantized reference is compared dequantized, to within one step from `approximate` on; `actual` may be integers.
    slack: how far, beyond the tolerance, rounding on the way may move a value; from `approximate` on too.
    """
    step = slack
    if isinstance(reference, torch.Tensor) and reference.is_quantized:
        reference, actual, width = _dequantized(reference, actual)
        step = max(slack, width)
    if isinstance(reference, torch.Tensor) and reference.is_complex():
        reference = torch.view_as_real(reference.detach().resolve_conj())
    dtype = str(reference.dtype).removeprefix("torch.")
    expected = as_array(reference)
    if reason := _incomparable(expected, actual, dtype):
        return OutputComparison(
            name=name,
            shape=expected.shape,
            dtype=dtype,
            ok=False,
            outside=expected.size,
            outside_share=1.0,
            reason=reason,
        )
    plain = bounds = tolerance.bounds(dtype)
    if tolerance not in {TractCheckTolerance.EXACT, TractCheckTolerance.CLOSE}:
        bounds = replace(bounds, atol=max(bounds.atol, step))
    sums = _Sums(plain)
    flat_expected, flat_actual = expected.reshape(-1), actual.reshape(-1)
    for start in range(0, expected.size, _CHUNK):
        sums.add(flat_expected[start : start + _CHUNK], flat_actual[start : start + _CHUNK], start, bounds)
    worst = None if sums.worst is None else tuple(int(i) for i in np.unravel_index(sums.worst, expected.shape))
    share = sums.outside / max(expected.size, 1)
    return OutputComparison(
        name=name,
        shape=expected.shape,
        dtype=dtype,
        ok=share <= bounds.outliers,
        outside=sums.outside,
        outside_share=share,
        slack=step,
        rounded_share=(sums.beyond_plain - sums.outside) / max(expected.size, 1),
        worst_index=worst,
        reference_at_worst=None if worst is None else expected[worst].item(),
        actual_at_worst=None if worst is None else actual[worst].item(),
        **sums.metrics(expected.size),
    )


def _dequantized(reference: torch.Tensor, actual: NDArray[Any]) -> tuple[torch.Tensor, NDArray[Any], float]:
    """Both sides as f32, and the width of one per-tensor quantization step with room for its own rounding."""
    scale, zero_point = reference.q_scale(), reference.q_zero_point()
    if actual.dtype.kind in "iu":
        actual = (actual.astype(np.int64) - zero_point).astype(np.float32) * np.float32(scale)  # as torch does it
    return reference.dequantize(), actual, scale * (1 + 1e-6)


def _incomparable(expected: NDArray[Any], actual: NDArray[Any], dtype: str) -> str | None:
    if expected.shape != actual.shape:
        return f"shape is {list(actual.shape)}, torch's is {list(expected.shape)}"
    if expected.dtype != actual.dtype:
        return f"dtype is {actual.dtype}, torch's is {dtype}"
    return None if expected.dtype.kind in "biuf" else f"{dtype} values cannot be compared"


@dataclass
class _Sums:
    """Running sums over chunks of two flat arrays; `plain`: the bounds without what rounding may add."""

    plain: Tolerance
    outside: int = 0
    beyond_plain: int = 0
    max_abs: float = 0.0
    squared_error: float = 0.0
    squared_reference: float = 0.0
    squared_actual: float = 0.0
    product: float = 0.0
    worst: int | None = None
    worst_excess: float = -math.inf

    def add(self, reference: NDArray[Any], actual: NDArray[Any], start: int, bounds: Tolerance) -> None:
        """Take in one chunk, whose first element has flat index `start`."""
        a, b = actual.astype(np.float64), reference.astype(np.float64)
        # In their own dtype: f64 merges neighbouring large integers.
        same = (actual == reference) | (np.isnan(a) & np.isnan(b))
        finite = np.isfinite(a) & np.isfinite(b)
        a[~finite] = b[~finite] = 0.0
        with np.errstate(over="ignore"):
            error = np.abs(a - b)
            error[~finite & ~same] = math.inf
            excess = error - (bounds.atol + bounds.rtol * np.abs(b))
            self.squared_error += float(np.dot(error, error))
            self.squared_reference += float(np.dot(b, b))
            self.squared_actual += float(np.dot(a, a))
            self.product += float(np.dot(a, b))
        outside = ~same & (excess > 0) if reference.dtype.kind == "f" else ~same
        self.beyond_plain += int(np.count_nonzero(~same & (error > self.plain.atol + self.plain.rtol * np.abs(b))))
        excess[outside] = np.maximum(excess[outside], math.ulp(0.0))
        self.outside += int(np.count_nonzero(outside))
        self.max_abs = max(self.max_abs, float(error.max()))
        at = int(excess.argmax())
        if excess[at] > self.worst_excess:
            self.worst, self.worst_excess = start + at, float(excess[at])

    def metrics(self, count: int) -> dict[str, Any]:
        """Return the distances of an `OutputComparison` over `count` values."""
        relative, snr_db = 0.0, math.inf
        if self.squared_error > 0:
            relative = math.sqrt(self.squared_error / self.squared_reference) if self.squared_reference else math.inf
            snr_db = -20 * math.log10(relative)
        norms = math.sqrt(self.squared_reference) * math.sqrt(self.squared_actual)
        cosine = self.product / norms if norms else float(self.squared_error == 0)
        return {
            "max_abs": self.max_abs,
            "rmse": math.sqrt(self.squared_error / max(count, 1)),
            "relative_rmse": relative,
            "cosine": max(-1.0, min(1.0, cosine)),
            "snr_db": snr_db,
        }
