"""Rust core. Arrays cross as contiguous numpy arrays, `data` ones as their raw little-endian bytes (uint8, 1-D); inputs are never copied.

Errors raised: `T2NErrorInvalidArgument`, `T2NErrorImpossibleQuantization`, `T2NErrorInconsistentTensor`, `T2NErrorNotFoundFile`,
`T2NErrorTract`, `T2NErrorMisuse`, `T2NErrorRuntime` (system errors and panics), `KeyboardInterrupt`.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

__version__: str
tract_version: str
"""Version of the linked tract crates."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
FloatName = Literal["f32", "f16", "bf16"]
Encoder = Literal["signed_extreme", "abs_max", "min_max", "scale_search"]

def q40_quantize(
    data: Bytes, dtype: FloatName, encoder: Encoder, percentile: float, name: str, codes: Bytes, scales: Bytes
) -> None:
    """Quantize `n` floats (n % 32 == 0) into `codes` (n/2 bytes: byte i of a group = element i low, i+16 high nibble) and `scales` (f16, n/32)."""

def q40_quantize_with_scales(data: Bytes, dtype: FloatName, name: str, scales: Bytes, codes: Bytes) -> None:
    """Round `data` onto the grid of given f16 `scales` (one a group of 32): code = clamp(round(x / scale) + 8, 0, 15)."""

def q40_quantize_weighted(
    data: Floats, width: int, importance: Floats, name: str, codes: Bytes, scales: Bytes
) -> None:
    """Rows of `width` floats to the least sum of `importance * error^2` of each group found; rows of `importance` are shared in order, evenly."""

def q40_quantize_hessian(
    data: Floats, width: int, hessian: Floats, ridge: float, factor: Floats, order: NDArray[np.uint32],
    importance: Floats, sweeps: int, name: str, codes: Bytes, scales: Bytes,
) -> None:  # fmt: skip
    """Rows of `width` floats to little `e H e^T` of the error `e` of each, `hessian` being `H` with `ridge` on its diagonal.

    `factor`: upper triangular `U`, `U^T U` = inverse of `hessian` with rows and columns taken in `order`. `importance` weighs columns when
    the first scales are chosen; then at most `sweeps` times better codes and scales are looked for.
    """

def q40_dequantize(codes: Bytes, scales: Bytes, dtype: FloatName, data: Bytes) -> None:
    """`data[i] = (code[i] - 8) * scale`, computed in f32 and rounded once to `dtype`."""

def q40_squared_error(codes: Bytes, scales: Bytes, dtype: FloatName, data: Bytes, shown: FloatName) -> tuple[float, float]:
    """`(sum of x^2, sum of (value - x)^2)` of the floats `data` and what the planes decode to, rounded once to `shown`; summed in f64."""

def q40_join(codes: Bytes, scales: Bytes, blocks: Bytes) -> None:
    """Interleave planes into GGUF Q4_0 blocks (18 bytes a group of 32: f16 scale, 16 code bytes)."""

def q40_split(blocks: Bytes, codes: Bytes, scales: Bytes) -> None:
    """Inverse of `q40_join`."""

def read_dat(path: str | PathLike[str]) -> tuple[str, list[int], Bytes]:
    """`(dtype, shape, payload)` of an NNEF `.dat`; dtype is a tract name ("f32", "i64", "bool", ...) or "q40" (payload: blocks)."""

def write_dat(path: str | PathLike[str], dtype: str, shape: Sequence[int], data: Bytes) -> None:
    """Write one `.dat` atomically."""

def write_dat_q40(path: str | PathLike[str], shape: Sequence[int], codes: Bytes, scales: Bytes) -> None:
    """Write one Q40 `.dat` (item type 0x3040) atomically."""

def check_dats(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
    """Refuse tensors `(label, dtype, shape)` that cannot be `.dat` files in one folder: names that leave it or collide, dtypes, sizes."""

@final
class ArchiveWriter:
    """Writes beside `path`, and replaces it in one rename at `finish`. Entries keep the order they are added in."""

    def __new__(
        cls, path: str | PathLike[str], form: Literal["folder", "tar", "tgz"], compression_level: int = 0
    ) -> ArchiveWriter: ...
    def add_text(self, name: str, text: str) -> None:
        """A text entry: `graph.nnef`, `graph.quant`."""

    def add_tensor(self, label: str, dtype: str, shape: Sequence[int], data: Bytes) -> None: ...
    def add_q40(self, label: str, shape: Sequence[int], codes: Bytes, scales: Bytes) -> None: ...
    def add_dat_file(self, label: str, path: str | PathLike[str]) -> None:
        """Copy a `.dat` from disk, streamed, after its header was checked against its size."""

    def finish(self) -> int:
        """Put the archive in place; bytes on disk."""

    def abort(self) -> None:
        """Remove what was written. Idempotent; `finish` after it raises."""

@final
class Staging:
    """A folder `.t2n-unfinished-*` in `parent`, which is made if need be: gone at the end of the block, or of the object.

    First, those of processes that are dead are swept.
    """

    def __new__(cls, parent: str | PathLike[str]) -> Staging: ...
    def __enter__(self) -> Path: ...
    def __exit__(self, error_class: object, error: object, traceback: object) -> None: ...

def put_in_place(new: str | PathLike[str], target: str | PathLike[str]) -> None:
    """Make a file or folder durable and rename it to `target` on the same file system; one of the same kind there is replaced in one step."""

def write_text(path: str | PathLike[str], text: str) -> None:
    """Write UTF-8 to a file that is replaced whole or not at all, durably; its folder exists, and is swept first."""

def sweep(folder: str | PathLike[str]) -> None:
    """Remove what killed processes left unfinished in `folder`."""

def archive_entries(path: str | PathLike[str]) -> list[tuple[str, int]]:
    """`(name, size in bytes)` of every entry of a folder, tar or tgz, without unpacking to disk."""

def archive_tensors(path: str | PathLike[str]) -> list[tuple[str, int, str | None, list[int] | None]]:
    """`archive_entries` with dtype ("f32", "q40"...) and shape of those that are `.dat` files, by their headers alone."""

def archive_read(path: str | PathLike[str], name: str, max_bytes: int) -> bytes:
    """One entry; `T2NErrorInconsistentTensor` if it is larger than `max_bytes`."""

def preflight(path: str | PathLike[str]) -> None:
    """Refuse an archive that could crash tract: nesting, fragment cycles (`T2NErrorTract`), sizes, entry names (`T2NErrorInconsistentTensor`)."""

@final
class Model:
    """An archive loaded, optimized and ready in tract. Immutable; `run` may be called from several threads."""

    @staticmethod
    def load(path: str | PathLike[str], outputs: Sequence[str] | None = None, threads: int | None = None) -> Model:
        """Load a folder, tar or tgz. `outputs`: assignment names of graph.nnef to output instead of the graph's results; `threads` of a run."""

    @staticmethod
    def load_bytes(data: bytes, outputs: Sequence[str] | None = None, threads: int | None = None) -> Model: ...
    @property
    def inputs(self) -> list[tuple[str, str, list[int | str]]]:
        """`(name, dtype, shape)`; a symbolic dimension is its expression as text, e.g. `"B"`, `"S+P"`."""

    @property
    def outputs(self) -> list[tuple[str, str, list[int | str]]]: ...
    @property
    def properties(self) -> dict[str, Any]:
        """Archive properties: str, list of str, or numpy array."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of constants tract holds (packed blocks counted as they are held)."""

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One stateless run, inputs in order; dtype or shape that does not fit -> `T2NErrorInvalidArgument`."""

    def session(self, carried: Sequence[tuple[str, str]]) -> Session:
        """Runs in which each input named has the value that the output named beside it had in the run before; zeros first, symbols being 0."""

@final
class Session:
    """What is carried stays in tract. Calls from two threads at once -> `T2NErrorMisuse`."""

    @property
    def inputs(self) -> list[tuple[str, str, list[int | str]]]:
        """Those not carried, as `Model.inputs`."""

    @property
    def outputs(self) -> list[tuple[str, str, list[int | str]]]: ...
    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """`Model.run` without what is carried. After an error, what is carried is what it was."""

    def reset(self) -> None: ...
    def state(self) -> dict[str, NDArray[Any]]:
        """What is carried, copied, by name of the input."""

    def load_state(self, names: Sequence[str], values: Sequence[NDArray[Any]]) -> None:
        """Replace all that is carried."""
