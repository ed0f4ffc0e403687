"""What happened to each weight: rows that methods record and reports show."""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from torch_to_nnef.tensor.quant.base import QTensor


@dataclass(frozen=True)
class TensorRow:
    """One weight that a method was asked for.

    Attributes:
        fqn: Name in the model; of shared weights, the first.
        module_class: Class of the module that holds it.
        shape: Logical shape.
        dtype: Float dtype it had, e.g. "float32".
        storage: How it is stored now: "q40", "f32", "f16"...
        bits_per_weight: Of that storage.
        method: Method that was applied; None if none was.
        snr_db: Signal-to-noise ratio of the weight, dB; inf if nothing was lost.
        relative_rmse: Root of squared error over squared weight.
        quantized: Whether it is quantized now.
        reason: Why not; None if it is.
        nbytes_before: Bytes of its float storage.
        nbytes_after: Bytes it takes now.
        output_snr_db: Signal-to-noise ratio of what it computes, dB, on calibration data held out; None without calibration.
        seconds: Time its encoding took; None if it was not.
        code_counts: How often each of the 16 codes is used; of a large weight, on rows spread evenly over it, as the next two.
        weight_counts: Its values in 32 bins from -4 to 4 times their root mean square.
        min_max_snr_db: `snr_db` that plain min-max (the extreme of each group / -8) has.
        min_max_output_snr_db: `output_snr_db` that it has, of the whole weight.

    """

    fqn: str
    module_class: str
    shape: tuple[int, ...]
    dtype: str
    storage: str
    bits_per_weight: float
    method: str | None
    snr_db: float | None
    relative_rmse: float | None
    quantized: bool
    reason: str | None
    nbytes_before: int
    nbytes_after: int
    output_snr_db: float | None = None
    seconds: float | None = field(default=None, compare=False)
    code_counts: tuple[int, ...] = ()
    weight_counts: tuple[int, ...] = ()
    min_max_snr_db: float | None = None
    min_max_output_snr_db: float | None = None


_rows: ContextVar[list[TensorRow] | None] = ContextVar("torch_to_nnef_tensor_rows", default=None)


@contextmanager
def recording() -> Iterator[list[TensorRow]]:
    """Collect the rows recorded inside the `with` block, in order. The innermost recording gets them."""
    rows: list[TensorRow] = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def record(row: TensorRow) -> None:
    """Add a row to the recording in force; without one, nothing happens.

    Of several for the same weight the first counts, or the first that says it is quantized.
    """
    if (rows := _rows.get()) is None:
        return
    index = next((i for i, known in enumerate(rows) if known.fqn == row.fqn), None)
    if index is None:
        rows.append(row)
    elif row.quantized and not rows[index].quantized:
        rows[index] = row


def weight_error(fp: torch.Tensor, q: QTensor) -> tuple[float, float]:
    """`(snr_db, relative_rmse)` of `q` against the float weight `fp`, in bounded memory.

    With signal S = sum(fp^2) and noise N = sum((q - fp)^2), in f64: SNR = 10 log10(S / N) dB, relative RMSE = sqrt(N /
    S). N = 0 gives `(inf, 0)`; S = 0 with N > 0 gives `(-inf, inf)`.
    """
    signal, noise = q.squared_error(fp)
    return snr_db(signal, noise), math.sqrt(noise / signal) if signal else math.inf if noise else 0.0


def snr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies; inf without noise, -inf for noise alone."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
