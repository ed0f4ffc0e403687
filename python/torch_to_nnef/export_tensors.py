"""`.dat` files alone: tensors from memory, or from a file of weights."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch

from torch_to_nnef._native import check_dats, sweep, write_dat
from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorNotImplemented,
    expect,
)
from torch_to_nnef.files import as_path, require_space, writing
from torch_to_nnef.nnef.writer import raw_bytes
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.tensor.quant import QTensor, QTensorTractScaleOnly, load_safetensors, stored_nbytes

_PICKLED = (".pt", ".pth", ".bin")


def export_tensors_to_nnef(name_to_torch_tensors: Mapping[str, torch.Tensor], output_dir: str | Path) -> list[Path]:
    """Write each tensor as `output_dir/NAME.dat`; the paths, in the order of the mapping.

    A `QTensor` is written packed, others in their dtype; a `/` in a name makes a folder. All tensors are checked before the first byte
    is written; then each file is replaced in one step, and other files in `output_dir` stay.

    Raises:
        T2NErrorInvalidArgument: A name that leaves `output_dir`, is hidden, or is told from another by letter case only; a value that
            is not a tensor with data; a tensor beyond the format (rank above 8, 4 GiB).
        T2NErrorNotImplemented: A dtype tract has not (bfloat16, complex...), or a QTensor class without a file format.
        T2NErrorRuntime: The system refuses to write, or has too little space.

    """
    expect("name_to_torch_tensors", name_to_torch_tensors, Mapping, "a dict of tensors by name")
    output_dir = as_path("output_dir", output_dir)
    check_dats([_described(name, tensor) for name, tensor in name_to_torch_tensors.items()])
    require_space(output_dir, sum(map(stored_nbytes, name_to_torch_tensors.values())))
    paths = [output_dir / f"{name}.dat" for name in name_to_torch_tensors]
    for folder in dict.fromkeys([output_dir, *(path.parent for path in paths)]):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for folder in dict.fromkeys(path.parent for path in paths):
        sweep(folder)
    for path, (name, tensor) in zip(paths, name_to_torch_tensors.items(), strict=True):
        if isinstance(tensor, QTensor):
            tensor.write_in_file(output_dir, name)
        else:
            write_dat(path, tract_dtype(tensor.dtype, name), list(tensor.shape), raw_bytes(tensor))
    return paths


def export_tensors_from_disk_to_nnef(
    store_filepath: str | Path,
    output_dir: str | Path,
    filter_key: Callable[[str], bool] | None = None,
    fn_check_found_tensors: Callable[[dict[str, torch.Tensor]], bool | None] | None = None,
) -> list[Path]:
    """Write tensors of a file as `.dat` files, as `export_tensors_to_nnef` does; the file is mapped, not read into memory.

    store_filepath: `.safetensors` (QTensors of `save_safetensors` stay packed), or `.pt`, `.pth`, `.bin`: a dict of tensors, read
        with `weights_only=True` whatever happens, so no code in it is ever run.
    filter_key: called with each name; the tensors for which it is true are written. Default: all.
    fn_check_found_tensors: called with those tensors by name before anything is written; it raises or returns False to refuse them.

    Raises what `export_tensors_to_nnef` raises, `T2NErrorNotFoundFile`, `T2NErrorInconsistentTensor` for a file that cannot be read, and
    `T2NErrorInvalidArgument` for another suffix, tensors that were refused, or none to write.
    """
    path = as_path("store_filepath", store_filepath)
    for what, function in (("filter_key", filter_key), ("fn_check_found_tensors", fn_check_found_tensors)):
        expect(what, function, (Callable, type(None)), "a function")  # type: ignore[arg-type]
    if not path.is_file():
        raise T2NErrorNotFoundFile(f"no such file: {path}")
    stored = _load(path)
    found = {name: tensor for name, tensor in stored.items() if filter_key is None or filter_key(name)}
    verdict = None if fn_check_found_tensors is None else fn_check_found_tensors(found)
    if verdict is not None and not verdict:
        raise T2NErrorInvalidArgument(f"fn_check_found_tensors refused the tensors found in {path}: {list(found)}")
    if not found:
        raise T2NErrorInvalidArgument(
            f"no tensor to write: {path} holds {list(stored)[:10]}, of which filter_key took none"
        )
    return export_tensors_to_nnef(found, output_dir)


def _described(name: object, tensor: object) -> tuple[str, str, list[int]]:
    """`(label, dtype, shape)` of a tensor that has data in a form that `.dat` files know."""
    if not isinstance(name, str) or any("\ud800" <= char <= "\udfff" for char in name):
        raise T2NErrorInvalidArgument(f"{name!r} cannot name a file; rename the tensor")
    if not isinstance(tensor, torch.Tensor):
        raise T2NErrorInvalidArgument(
            f"`{name}` is a {type(tensor).__name__}, not a tensor; leave it out, or pass the dict inside it"
        )
    if isinstance(tensor, QTensorTractScaleOnly):
        return name, "q40", list(tensor.stored_shape)
    if isinstance(tensor, QTensor):
        if type(tensor).write_in_file is QTensor.write_in_file:
            raise T2NErrorNotImplemented(
                f"`{name}`: {type(tensor).__name__} has no file format; decompress() it, or use Q40"
            )
        return name, "u8", []  # its file is its own affair: only the name is checked
    if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        raise T2NErrorInvalidArgument(
            f"`{name}` has no dense data ({tensor.layout} on {tensor.device}); load it, or to_dense() it"
        )
    return name, tract_dtype(tensor.dtype, f"tensor `{name}`"), list(tensor.shape)


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix not in _PICKLED:
        raise T2NErrorInvalidArgument(f"{path}: the suffix is not one of .safetensors, {', '.join(_PICKLED)}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        why = "it is damaged, or holds more than tensors, which is not read since it could run code"
        raise T2NErrorInconsistentTensor(
            f"{path}: {why}; save its state_dict, best as .safetensors. torch says: {error}"
        ) from error
    if not isinstance(stored, Mapping):
        raise T2NErrorInvalidArgument(f"{path} holds a {type(stored).__name__}, not a dict of tensors by name")
    return stored
