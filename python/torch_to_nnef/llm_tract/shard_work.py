"""One file of a work list: each weight is packed alone and kept, so that a worker may die at any time and nothing is packed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from torch_to_nnef._native import put_in_place
from torch_to_nnef.compress import Choice, dynamic_load_registry
from torch_to_nnef.exceptions import T2NError
from torch_to_nnef.llm_tract.shard_list import WORK, Entry, Sources, WorkList, is_whole
from torch_to_nnef.quantize.targets import Selection, Use
from torch_to_nnef.tensor.offload import OffloadedTensor, scratch_in
from torch_to_nnef.tensor.quant import save_safetensors
from torch_to_nnef.tensor.quant.serialize import offloaded_tensors

Progress = Callable[[int, str], None]
"""`(bytes of weights that were just finished, name)`."""


def quantize_output(work: WorkList, number: int, checkpoint: Path, out: Path, progress: Progress | None = None) -> None:
    """Make file `number` of `work` in `out`, unless it is there; weights that an earlier run packed are taken as they are.

    What is cut is made again. Two workers at the same file do no harm: what each puts in place is whole, and the same.

    Raises what the method raises, `T2NErrorRuntime` where the system cannot write, `T2NErrorInconsistentTensor` for files that changed.
    """
    folder, sources = out / WORK, Sources(checkpoint, out)
    target = out / work.outputs[number].name
    if is_whole(target):
        return
    try:
        parts = _make(work, number, sources, folder, target, progress)
    except (T2NError, OSError):
        if not is_whole(target):  # else another worker was faster, and cleared up
            raise
        return
    for part in parts:
        part.unlink(missing_ok=True)


def _make(
    work: WorkList, number: int, sources: Sources, folder: Path, target: Path, progress: Progress | None
) -> list[Path]:
    """Put the file in place; returns the parts it was made of."""
    folder.mkdir(exist_ok=True)
    parts: dict[str, Path] = {}
    for position, entry in enumerate(work.outputs[number].entries):
        if entry.method is not None:
            parts[entry.name] = part = folder / f"{number:05d}-{position:05d}.safetensors"
            if not is_whole(part):
                save_safetensors(_packed(work, entry, sources, folder), part)
        if progress:
            progress(entry.nbytes, entry.name)
    made = {name: tensor for part in parts.values() for name, tensor in offloaded_tensors(part).items()}
    # What a method leaves is copied from the checkpoint.
    left = {entry.name: sources.tensor(entry) for entry in work.outputs[number].entries if entry.name not in made}
    save_safetensors(made | left, folder / target.name)
    put_in_place(folder / target.name, target)
    return list(parts.values())


def _packed(work: WorkList, entry: Entry, sources: Sources, folder: Path) -> dict[str, torch.Tensor]:
    """What the method makes of one weight, which a module holds alone, on disk; nothing if it leaves it."""
    weight = sources.tensor(entry)
    choice = Choice(entry.method, dynamic_load_registry(work.options["registry"]), fallback=work.options["fallback"])
    uses = {entry.name: frozenset(map(Use, entry.uses))}
    with scratch_in(folder):
        held = choice(_holder(entry.name, weight), Selection(uses), local_dir=sources.checkpoint).get_parameter(
            entry.name
        )
    return {} if isinstance(held, OffloadedTensor) else {entry.name: held}


def _holder(name: str, weight: torch.Tensor) -> nn.Module:
    """A module with one parameter, under its name."""
    root = module = nn.Module()
    *path, last = name.split(".")
    for part in path:
        child = nn.Module()
        module.add_module(part, child)
        module = child
    module.register_parameter(last, nn.Parameter(weight, requires_grad=False))
    return root
