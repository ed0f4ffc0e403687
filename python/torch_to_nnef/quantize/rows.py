"""One row a tensor: what quantization did to it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorRow:
    """What happened to one parameter: sizes in bytes, `snr_db` and `relative_rmse` of stored against original."""

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
