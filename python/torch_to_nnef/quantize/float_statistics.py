"""Statistics of the inputs that weights have in the float model: collected in few passes, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorRuntime
from torch_to_nnef.files import staged, writing
from torch_to_nnef.isolated.arrays import opened_npz
from torch_to_nnef.quantize.calibration import Calibration, as_calibration
from torch_to_nnef.quantize.sequence import Replay, Stage, order_of
from torch_to_nnef.quantize.statistics import InputStatistics, InputSums, Moments
from torch_to_nnef.quantize.targets import Target
from torch_to_nnef.quantize.watch import Watch
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.torch_internals import pytree

_MOST = 1 << 30
"""Bytes of second moments that are summed at a time, unless those of one weight are more; the model runs once for each such share."""
_FORMAT = 1
_SIDES = "learn", "held_out"


class FloatWalk:
    """The stages of a model, and statistics of their inputs, while nothing is quantized yet."""

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], calibration: Calibration, step: Callable[[str], None]
    ) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._learn, self._step = len(calibration.learn), step
        self._batches = [batch.to(device) for batch in (*calibration.learn, *calibration.held_out)]
        self._order = order_of(model, targets, self._batches)
        self._replay = Replay(model, self._order.blocks, self._batches)
        self._waiting = list(self._order.stages)
        self._known: dict[str, InputStatistics | None] = {}

    def groups(self) -> Iterator[Stage | tuple[Target, ...]]:
        """Stages in order, then the weights that the calibration does not reach."""
        yield from self._order.stages
        if self._order.unused:
            yield self._order.unused

    def statistics(self, stage: Stage) -> InputStatistics | None:
        """Of the inputs of a stage; stages come in the order of `groups`."""
        while stage.name not in self._known:
            self._read(self._share())
        return self._known.pop(stage.name)

    def _share(self) -> list[Stage]:
        """The next stages, as many as fit in memory together."""
        stages = [self._waiting.pop(0)]
        while self._waiting and len(_SIDES) * sum(s.nbytes for s in (*stages, self._waiting[0])) <= _MOST:
            stages.append(self._waiting.pop(0))
        return stages

    def _read(self, stages: Sequence[Stage]) -> None:
        while self._replay.at < stages[0].block:
            self._replay.advance()
        first = [stage.targets[0] for stage in stages]
        sums = {id(target.tensor): tuple(InputSums(len(target.tensor)) for _ in _SIDES) for target in first}
        for index in range(len(self._batches)):
            self._step(f"inputs of {len(stages)} groups of weights, {index + 1} of {len(self._batches)}")
            side = index >= self._learn

            @contextmanager
            def watch(enough: Callable[[], None], side: int = side) -> Iterator[None]:
                with Watch(
                    first,
                    lambda target, x, start, count: sums[id(target.tensor)][side].multiplied(x, start, count),
                    lambda target, indices: sums[id(target.tensor)][side].looked_up(indices),
                ):
                    yield

            self._replay.run(index, watch, stages[-1].block)
        for stage, target in zip(stages, first, strict=True):
            learn, held_out = (s.moments(stage.name) for s in sums.pop(id(target.tensor)))
            self._known[stage.name] = None if learn is None else InputStatistics(learn, held_out)


class StatisticsFile:
    """What a `FloatWalk` found, read from an `.npz` file: arrays `<stage>/<learn or held_out>/<field of Moments>`.

    Raises `T2NErrorInvalidArgument` if it is none, lacks one of `targets`, or is of another model or calibration.
    """

    def __init__(self, path: Path, targets: Sequence[Target], model: str, calibration: str | None) -> None:
        """`model` and `calibration`: digests; a calibration of None may be any."""
        self._path = path
        try:
            with opened_npz(path) as file:
                about = json.loads(str(file["about"]))
            known = about["format"], about["model"], about["calibration"], about["stages"], about["unused"]
        except (KeyError, TypeError, json.JSONDecodeError, T2NErrorInvalidArgument) as error:
            raise self._refused(f"is no calibration cache ({error})") from error
        version, of_model, of_calibration, stages, unused = known
        if version != _FORMAT:
            raise self._refused(f"is of format {version}, not {_FORMAT}")
        if of_model != model:
            raise self._refused("was made with another model, or other weights")
        if calibration is not None and of_calibration != calibration:
            raise self._refused("was made with other calibration data")
        by_name = {target.places[0].fqn: target for target in targets}
        if missing := sorted(by_name.keys() - {name for names in (*stages, unused) for name in names}):
            raise self._refused(f"was made for other weights, without `{missing[0]}`")
        self._keys: dict[str, int] = {}
        self._stages = []
        for key, names in enumerate(stages):
            if held := tuple(by_name[name] for name in names if name in by_name):
                self._stages.append(Stage(held, 0, 0))
                self._keys[self._stages[-1].name] = key
        self._unused = tuple(by_name[name] for name in unused if name in by_name)

    def groups(self) -> Iterator[Stage | tuple[Target, ...]]:
        """As those of `FloatWalk`, of the weights asked for."""
        yield from self._stages
        if self._unused:
            yield self._unused

    def statistics(self, stage: Stage) -> InputStatistics | None:
        """Of the inputs of a stage."""
        learn, held_out = (self._moments(f"{self._keys[stage.name]}/{side}/") for side in _SIDES)
        return None if learn is None else InputStatistics(learn, held_out)

    def _moments(self, prefix: str) -> Moments | None:
        with opened_npz(self._path) as file:
            found = {
                field.name: torch.from_numpy(file[prefix + field.name])
                for field in fields(Moments)
                if prefix + field.name in file
            }
        return Moments(**found) if found else None

    def _refused(self, why: str) -> T2NErrorInvalidArgument:
        return T2NErrorInvalidArgument(f"{str(self._path)!r} {why}: delete it, or name another file")


def cached(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | None,
    path: Path,
    step: Callable[[str], None],
) -> StatisticsFile:
    """The statistics in the file at `path`, which is written first if there is none.

    Raises:
        T2NErrorInvalidArgument: The file is of another model or calibration, or no such file; or neither file nor calibration is there.
        T2NErrorRuntime: The system does not let the file be written.

    """
    state = model_digest(model)
    data = None if calibration is None else calibration_digest(calibration)
    if not _is_there(path):
        if calibration is None:
            raise T2NErrorInvalidArgument(f"no calibration, and no cache of an earlier one at {str(path)!r}")
        _write(path, FloatWalk(model, targets, calibration, step), {"model": state, "calibration": data})
    return StatisticsFile(path, targets, state, data)


def calibration_unless_cached(
    given: Any, tokenizer: Callable[..., Any] | None, model: nn.Module, cache: Path | None
) -> Calibration | None:
    """`as_calibration`; None where nothing is given, and a cache of an earlier calibration is there instead."""
    return None if given is None and cache is not None and _is_there(cache) else as_calibration(given, tokenizer, model)


def _is_there(path: Path) -> bool:
    """Raises `T2NErrorRuntime` for a path that the system does not take."""
    with writing(path):
        return path.exists()


def _write(path: Path, walk: FloatWalk, about: dict[str, Any]) -> None:
    """Stage by stage, into a file that takes its place at the end."""
    if not path.parent.is_dir():
        raise T2NErrorRuntime(f"cannot write the calibration cache {str(path)!r}: there is no such folder")
    stages: list[list[str]] = []
    unused: list[str] = []
    with staged(path) as beside, writing(path), zipfile.ZipFile(beside, "x") as archive:
        for group in walk.groups():
            targets = group.targets if isinstance(group, Stage) else group
            names = [target.places[0].fqn for target in targets]
            statistics = walk.statistics(group) if isinstance(group, Stage) else None
            if statistics is None:
                unused += names
                continue
            for side in _SIDES:
                _put_moments(archive, f"{len(stages)}/{side}/", getattr(statistics, side))
            stages.append(names)
        about = {"format": _FORMAT, **about, "stages": stages, "unused": unused}
        _put(archive, "about", np.array(json.dumps(about)))


def _put_moments(archive: zipfile.ZipFile, prefix: str, moments: Moments | None) -> None:
    for field in fields(Moments) if moments is not None else ():
        if (value := getattr(moments, field.name)) is not None:
            _put(archive, prefix + field.name, value.cpu().numpy())


def _put(archive: zipfile.ZipFile, name: str, array: np.ndarray[Any, Any]) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def model_digest(model: nn.Module) -> str:
    """Of the names and values of all parameters and buffers."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return _digest(part for name, tensor in held for part in (name, tensor))


def calibration_digest(calibration: Calibration) -> str:
    """Of the values of all batches."""
    leaves, spec = pytree.tree_flatten((calibration.learn, calibration.held_out))
    return _digest((str(spec), *leaves))


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            values = part.decompress() if isinstance(part, QTensor) else loaded(part.detach())
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            if not values.is_meta:
                digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
