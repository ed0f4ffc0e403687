"""`verify`, `run` and `inspect`: what to ask of a child process about an archive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_to_nnef.exceptions import T2NErrorNotFoundFile, T2NErrorTractCrash, expect
from torch_to_nnef.files import as_path
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.isolated.arrays import load_arrays, save_arrays
from torch_to_nnef.isolated.jobs import INPUTS, OUTPUTS
from torch_to_nnef.isolated.process import Limits, ask, working_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_DEFAULT = Limits()


def verify(
    archive: str | PathLike[str],
    npz: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    *,
    sizes: Mapping[str, int] | None = None,
    tolerance: TractCheckTolerance = TractCheckTolerance.APPROXIMATE,
    limits: Limits = _DEFAULT,
) -> dict[str, Any]:
    """Check, load and run an archive in a child process.

    Args:
        archive: Folder, tar or tgz.
        npz: A file or files with inputs, and outputs that are expected, by name. Inputs that are in none are zeros.
        sizes: Of symbols, where inputs are zeros; 3 for those not named.
        tolerance: Within which outputs are what is expected.
        limits: Of the child.

    Returns:
        JSON types: `ok` (all outputs are as expected), `inputs` and `outputs` with dtypes and shapes, what was compared,
        `seconds` of the run.

    Raises:
        T2NErrorTract, T2NErrorInconsistentTensor: The archive is not sound, or tract refused it.
        T2NErrorTractCrash, T2NErrorTractLimit: It ended the process, or wanted more than `limits`; both are `T2NErrorTract`.
        T2NErrorNotFoundFile, T2NErrorInvalidArgument: Of `npz` and `sizes`.

    """
    for name, size in (sizes or {}).items():
        expect(f"sizes[{name!r}]", size, int, "a number")
    files = [str(as_path("npz", path).absolute()) for path in ([npz] if isinstance(npz, (str, PathLike)) else npz)]
    with working_folder() as folder:
        found: dict[str, Any] = ask(
            "verify", folder, _found(archive), limits, npz=files, sizes=dict(sizes or {}), tolerance=tolerance.value
        )
    return found


def run(
    archive: str | PathLike[str],
    inputs: Mapping[str, NDArray[Any]] | str | PathLike[str],
    *,
    limits: Limits = _DEFAULT,
) -> dict[str, NDArray[Any]]:
    """Outputs of an archive by name, computed in a child process from arrays by name or those of an `.npz` file; raises as `verify`."""
    with working_folder() as folder:
        npz = None
        if isinstance(inputs, (str, PathLike)):
            npz = str(Path(inputs).absolute())
        else:
            expect("inputs", inputs, Mapping, "a dict of arrays by name, or the path of an .npz file")
            save_arrays(folder / INPUTS, {name: np.asarray(array) for name, array in inputs.items()})
        ask("run", folder, _found(archive), limits, npz=npz)
        try:
            return load_arrays(folder / OUTPUTS)
        except (T2NErrorNotFoundFile, ValueError, MemoryError) as error:
            raise T2NErrorTractCrash(f"{archive}: the process that ran tract gave no outputs: {error}") from error


def inspect(archive: str | PathLike[str], *, limits: Limits = _DEFAULT) -> dict[str, Any]:
    """What an archive holds as JSON types, by its headers and its text: tract does not run. Raises as `verify`."""
    with working_folder() as folder:
        found: dict[str, Any] = ask("inspect", folder, _found(archive), limits)
    return found


def _found(archive: str | PathLike[str]) -> Path:
    path = as_path("archive", archive).absolute()
    if not os.path.exists(path):  # noqa: PTH110  # unlike Path.exists, it has an answer for any name
        raise T2NErrorNotFoundFile(f"no archive at {str(archive)!r}")
    return path
