"""`t2n quantize-shards`: a checkpoint to a packed one, weight by weight, by one process, several, or a Ray cluster."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from torch_to_nnef.compress import KEPT, dynamic_load_registry, needs_calibration
from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.llm_tract import hub
from torch_to_nnef.llm_tract.causal import Signature
from torch_to_nnef.llm_tract.checkpoint import Checkpoint
from torch_to_nnef.llm_tract.export import Work
from torch_to_nnef.llm_tract.families import attention_of, step_signature
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.shard_list import (
    COMPUTED,
    MANIFEST,
    OUTPUTS,
    WORK,
    Entry,
    Sources,
    WorkList,
    digest_of,
    divided,
    dtype_name,
    is_whole,
    named,
    put,
)
from torch_to_nnef.llm_tract.shard_work import quantize_output
from torch_to_nnef.llm_tract.streaming import mark
from torch_to_nnef.log import LOGGER
from torch_to_nnef.quantize.targets import DEFAULT_CLASSES, Selection, find_targets
from torch_to_nnef.tensor.checkpoint import INDEX
from torch_to_nnef.tensor.offload import OffloadedTensor, offloaded_safetensors
from torch_to_nnef.tensor.quant import save_safetensors
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.quantize.apply import Progress

FILES = 32
Run = Callable[[WorkList, Sequence[int], Path, Path, "Progress | None"], None]
"""Makes the outputs of these numbers, from a checkpoint into a folder."""


@dataclass(frozen=True)
class Shards:
    """What was done. done, files: how many of the output's files there are, and will be; tensors: in them, packed and all."""

    folder: Path
    done: int
    files: int
    bytes_before: int
    bytes_after: int

    @property
    def complete(self) -> bool:
        """Whether the folder is a checkpoint by now."""
        return self.done == self.files

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**vars(self), "folder": str(self.folder), "complete": self.complete}


def quantize_shards(
    options: LlmOptions,
    shard: tuple[int, int] = (1, 1),
    files: int = FILES,
    run: Run | None = None,
    progress: Progress | None = None,
) -> Shards:
    """Pack the weights of the checkpoint `options.local_dir` into a checkpoint in `options.export_dirpath`, the share of one worker of it.

    Which weights, and in what form, is decided as `export_llm` does, from the graph, once: the work list in the folder holds it. After a
    kill at any moment the same call goes on where it stopped, and the bytes are the same. The worker that makes the last file completes
    the folder with config, tokenizer and index; from then on it is what `-d` takes.

    Args:
        options: The checkpoint in safetensors, the folder, the method and its selection; a method that needs no data.
        shard: `(i, n)`: this is worker i of n, from 1 on; all of them write to one folder.
        files: At most about so many files are written; as many workers can share the work.
        run: Who does the work; default: this process, one file after the other.
        progress: `(bytes of weights done, all bytes of this share, name)`.

    Raises:
        T2NErrorInvalidArgument: A method that needs data or is not there; a share that is none; a folder with something else in it, or
            begun with other options or another checkpoint.
        T2NErrorNotFoundFile, T2NErrorNotImplemented: No checkpoint, one that is no safetensors, or is quantized already.
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond Q40.
        T2NErrorRuntime: The system cannot write; the work list stays, and the same call goes on.

    """
    index, count = shard
    if not 1 <= index <= count or files < 1:
        raise T2NErrorInvalidArgument(f"share {index}/{count} of {files} files: expected i/n with 1 <= i <= n")
    checkpoint, out = options.local_dir or Path(), options.export_dirpath
    if count > 1 and options.ignore_already_exist_dir:
        raise T2NErrorInvalidArgument(
            f"--force with --shard {index}/{count}: each worker would remove what others did; remove {out}, then start them"
        )
    work = _work_list(options, files)
    (run or _run_here)(work, work.share(index, count), checkpoint, out, progress)
    return _complete(work, checkpoint, out)


def _run_here(
    work: WorkList, numbers: Sequence[int], checkpoint: Path, out: Path, progress: Progress | None = None
) -> None:
    done, total = 0, sum(work.outputs[number].nbytes for number in numbers)

    def advance(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total, name)

    for number in numbers:
        quantize_output(work, number, checkpoint, out, advance)


def _work_list(options: LlmOptions, files: int) -> WorkList:
    """The list in the folder, if it was made of the same; else a new one."""
    checkpoint, out = options.local_dir or Path(), options.export_dirpath
    said = _decisive(options, files)
    if options.ignore_already_exist_dir or (work := WorkList.load(out)) is None:
        return _planned(options, said, files)
    if work.options != said:
        other = sorted(key for key in said if work.options.get(key) != said[key])
        raise T2NErrorInvalidArgument(
            f"{out} was begun with other options ({', '.join(other)}); begin anew with --force"
        )
    Sources(checkpoint, out).check(work)
    return work


def _decisive(options: LlmOptions, files: int) -> dict[str, Any]:
    """What the work list depends on beside the checkpoint."""
    return {
        "method": options.compression_method,
        "registry": options.compression_registry,
        "tensor_type": list(options.tensor_type),
        "include": list(options.include),
        "exclude": list(options.exclude),
        "fallback": options.fallback,
        "files": files,
    }


def _clear(out: Path) -> None:
    """Remove what an earlier run left, and nothing else; its list last, so that a kill leaves a folder that is known as one of ours."""
    if (out / MANIFEST).is_file():
        try:
            work = WorkList.load(out)
            names = [output.name for output in work.outputs] if work else []
        except T2NErrorInconsistentTensor:
            names = [path.name for path in out.glob(OUTPUTS)]
        for name in (INDEX, *names, MANIFEST):
            (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)


def _check_folder(checkpoint: Path, out: Path, force: bool) -> None:
    """Raise `T2NErrorInvalidArgument` where a new run would meet files of others."""
    if out.resolve() == checkpoint.resolve():
        raise T2NErrorInvalidArgument(f"{out} is the checkpoint itself; name another folder")
    if not out.exists() or (out / MANIFEST).is_file():
        return
    others = [path for path in out.iterdir() if path.name != WORK]
    if any(path.name == INDEX or path.suffix == ".safetensors" for path in others):
        raise T2NErrorInvalidArgument(f"{out} holds another checkpoint; name another folder")
    if others and not force:
        raise T2NErrorInvalidArgument(f"{out} holds something else already; name another folder, or pass --force")


def _planned(options: LlmOptions, said: Mapping[str, Any], files: int) -> WorkList:
    out = options.export_dirpath
    registry = dynamic_load_registry(options.compression_registry)
    for key in {options.compression_method, *options.overrides.values()}:
        if key not in (*registry, *KEPT):
            raise T2NErrorInvalidArgument(f"no compression method {key!r}; there are {', '.join(registry)}")
        if key in registry and needs_calibration(registry[key]):
            raise T2NErrorInvalidArgument(
                f"{key} learns from data that runs through the whole model: export with -c {key}, or choose a method that looks at each "
                "weight alone, such as q40"
            )
    _check_folder(options.local_dir or Path(), out, options.ignore_already_exist_dir)
    found = Checkpoint.find(options)
    if found.packed:
        raise T2NErrorInvalidArgument(f"{found.name} is packed already")
    stored = {found.folder / name: str(name) for name in [path.name for path in found.files]}
    dtype = torch.float32 if found.dtype is torch.bfloat16 else found.dtype
    signature = step_signature(found.config, 1, trust_remote_code=options.trust_remote_code)
    model = found.load(dtype, "t2n_offload_disk", attention_of(found.config))
    uses = _uses(options, found, signature, model)
    if options.ignore_already_exist_dir:
        _clear(out)  # not before all that can be refused was
    entries = _entries(model, uses, options, stored, out)
    digests = {name: digest_of(path) for path, name in sorted(stored.items())}
    work = WorkList(said, digests, named(list(divided(entries, files))))
    work.save(out)
    LOGGER.info("%d tensors in %d files", len(entries), len(work.outputs))
    return work


def _uses(options: LlmOptions, found: Checkpoint, signature: Signature, model: Any) -> dict[str, Any]:
    """What a captured step does with each weight; none is read."""
    step = Work(options, found, signature)
    step.model = model
    _, graph = step.capture()
    return weight_uses(graph)


def _entries(
    model: Any, uses: Mapping[str, Any], options: LlmOptions, stored: Mapping[Path, str], out: Path
) -> list[Entry]:
    """Every tensor of the model's state, shared ones once; those that are not bytes of the checkpoint are written to the work folder."""
    held, kept = ModTensorUpdater(model), model.state_dict().keys()
    tensors = {name: tensor for name, tensor in held.tensors() if name in kept}
    files = {str(path): name for path, name in stored.items()}
    elsewhere = {
        name: tensor
        for name, tensor in tensors.items()
        if not isinstance(tensor, OffloadedTensor) or any(e.file.name not in files for e in tensor.extents)
    }
    (out / WORK).mkdir(parents=True, exist_ok=True)
    if elsewhere:
        path = out / WORK / COMPUTED[1:]
        save_safetensors(elsewhere, path)
        tensors |= offloaded_safetensors(path)
        files[str(path)] = COMPUTED
    methods = _methods(model, uses, options)
    entries = []
    for name, tensor in cast("Mapping[str, OffloadedTensor]", tensors).items():
        used = sorted(use.value for use in uses.get(name, ()))
        extents = tuple((files[e.file.name], e.offset, e.nbytes) for e in tensor.extents)
        method = methods.get(name) if used else None
        entries.append(Entry(name, tuple(tensor.shape), dtype_name(tensor.dtypes[0]), extents, tuple(used), method))
    return entries


def _methods(model: Any, uses: Mapping[str, Any], options: LlmOptions) -> dict[str, str]:
    """Weight -> key of the method that it is for: of the first pattern that matches, else the one for all."""

    def asked(**narrowed: Any) -> list[str]:
        targets = find_targets(model, DEFAULT_CLASSES, Selection(uses, **narrowed))
        return [target.places[0].fqn for target in targets if target.reason is None or target.has_wrong_rows]

    chosen: dict[str, str] = {}
    exclude = list(options.exclude) or None
    for pattern, key in options.overrides.items():
        chosen = dict.fromkeys(asked(include=pattern, exclude=exclude), key) | chosen
    rest = asked(include=list(options.include) or None, exclude=exclude) if options.compression_method else []
    return dict.fromkeys(rest, options.compression_method or "") | chosen


def _complete(work: WorkList, checkpoint: Path, out: Path) -> Shards:
    """If every file is there: what else a checkpoint has, the index last; then nothing else is left."""
    paths = [out / output.name for output in work.outputs]
    done = [path for path in paths if is_whole(path)]
    before = sum(output.nbytes for output in work.outputs)
    after = sum(path.stat().st_size for path in done)
    if len(done) == len(paths) and not all((out / name).exists() for name in ("config.json", INDEX)):
        _copy_description(work, checkpoint, out)
        names = {entry.name: output.name for output in work.outputs for entry in output.entries}
        put(out, INDEX, json.dumps({"metadata": {"total_size": after}, "weight_map": names}, indent=1) + "\n")
    if len(done) == len(paths):
        shutil.rmtree(out / WORK, ignore_errors=True)
    return Shards(out, len(done), len(paths), before, after)


def _copy_description(work: WorkList, checkpoint: Path, out: Path) -> None:
    """Config, with a mark that its weights are packed, and tokenizer; not the indices of the weights."""
    try:
        config = dict(json.loads((checkpoint / "config.json").read_bytes()))
    except OSError as error:
        raise T2NErrorNotFoundFile(f"cannot read {checkpoint / 'config.json'}: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise T2NErrorInconsistentTensor(f"{checkpoint / 'config.json'} is no JSON object: {error}") from error
    for path in sorted(chain.from_iterable(checkpoint.glob(pattern) for pattern in hub.DESCRIPTION)):
        if path.is_file() and not path.name.endswith(".index.json") and path.name not in ("config.json", MANIFEST):
            put(out, path.name, path.read_bytes())
    put(out, "config.json", json.dumps(mark(config, str(work.options["method"])), indent=2) + "\n")
