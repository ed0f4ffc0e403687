"""What a person needs to look into a failed check, in one folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument
from torch_to_nnef.files import staged, writing
from torch_to_nnef.isolated import save_arrays
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tract_model import TractModel
from torch_to_nnef.verify.compare import as_array
from torch_to_nnef.verify.resize import InputSet


def write_bundle(
    folder: Path,
    archive: Path,
    input_names: Sequence[str],
    sets: Sequence[InputSet],
    reference: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    error: T2NError,
) -> None:
    """Make `folder` of the archive, `error.txt`, and per input set `inputs_i.npz`, `torch_i.npz`, `tract_i.npz` (if tract runs).

    An earlier bundle is replaced; where there is something else, or the system refuses, a warning says so: `error` is what counts.
    """
    try:
        with writing(folder):
            if folder.is_dir() and not all(_PART.fullmatch(part.name) for part in folder.iterdir()):
                raise T2NErrorInvalidArgument(f"other files are in {folder}")
            with staged(folder) as beside:
                _fill(beside, archive, input_names, sets, reference, error)
    except T2NError as failure:
        LOGGER.warning("no debug bundle: %s", failure)


_PART = re.compile(r"error\.txt|(inputs|torch|tract)_\d+\.npz|.+\.nnef(\.tar|\.tgz)?")


def _fill(
    folder: Path,
    archive: Path,
    input_names: Sequence[str],
    sets: Sequence[InputSet],
    reference: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    error: T2NError,
) -> None:
    folder.mkdir()
    (shutil.copytree if archive.is_dir() else shutil.copy2)(archive, folder / archive.name)
    report = [f"{type(error).__name__}: {error}"]
    sides: dict[str, Callable[[InputSet], dict[str, NDArray[Any]]]] = {
        "torch": lambda inputs: _torch_outputs(reference, inputs),
        "tract": lambda inputs: TractModel.load(archive).run(*map(as_array, inputs.tensors)),
    }
    for index, inputs in enumerate(sets):
        arrays = [as_array(tensor) for tensor in inputs.tensors]
        save_arrays(folder / f"inputs_{index}.npz", dict(zip(input_names, arrays, strict=True)))
        for side, run in sides.items():
            outcome = _outcome(run, inputs)
            if isinstance(outcome, Exception):
                report.append(f"no {side}_{index}.npz: {type(outcome).__name__}: {outcome}")
            else:
                save_arrays(folder / f"{side}_{index}.npz", outcome)
    (folder / "error.txt").write_text("\n".join(report) + "\n", encoding="utf-8")


def _outcome(
    run: Callable[[InputSet], dict[str, NDArray[Any]]], inputs: InputSet
) -> dict[str, NDArray[Any]] | Exception:
    """What it returns or raises: either side may fail in any way."""
    try:
        return run(inputs)
    except Exception as failure:
        return failure


@torch.no_grad()
def _torch_outputs(
    reference: Callable[[list[torch.Tensor]], list[torch.Tensor]], inputs: InputSet
) -> dict[str, NDArray[Any]]:
    return {f"output_{i}": as_array(t) for i, t in enumerate(reference(list(inputs.tensors)))}
