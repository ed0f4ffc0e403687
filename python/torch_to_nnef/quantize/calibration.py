"""Calibration data: batches that a model is run on, some to learn from, others held out to judge by."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument, T2NErrorNotFoundFile, expect
from torch_to_nnef.isolated.arrays import load_arrays
from torch_to_nnef.torch_internals import pytree

_HELD_OUT = 5  # one batch in so many
_WAYS = (
    "pass calibration=batches: tensors, tuples of positional or dicts of keyword arguments, a DataLoader, the path of an .npz file, or "
    "texts with a tokenizer"
)
TEXT_TOKENS, TEXT_WINDOW = 8192, 512
"""How many tokens of texts are read, and in windows of how many, where nothing else is asked for."""


class Batch(NamedTuple):
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """What `model` returns. Raises `T2NErrorInvalidArgument` if it does not take them."""
        try:
            return model(*self.args, **self.kwargs)
        except (T2NError, MemoryError):
            raise
        except Exception as error:
            raise T2NErrorInvalidArgument(
                f"calibration: {type(model).__name__} fails on a batch of {self}: {type(error).__name__}: {error}"
            ) from error

    def __str__(self) -> str:
        """Types and shapes."""
        named = {f"argument {index}": value for index, value in enumerate(self.args)} | dict(self.kwargs)
        return ", ".join(f"{name} {_described(value)}" for name, value in named.items())

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`."""
        moved: Batch = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self)
        return moved


@dataclass(frozen=True)
class Calibration:
    """Batches to learn from, and batches that nothing is learned from, by which methods are judged."""

    learn: tuple[Batch, ...]
    held_out: tuple[Batch, ...] = ()

    @property
    def judge(self) -> tuple[Batch, ...]:
        """Batches to judge by: those held out; without any, those learned from."""
        return self.held_out or self.learn

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Calibration:
        """Every fifth batch is held out; of two to four, the last; of one, a fifth of its samples (first axis), if it has two."""
        if not batches:
            raise T2NErrorInvalidArgument(f"no calibration data: {_WAYS}")
        if len(batches) == 1:
            return cls(*_halves(batches[0]))
        held = [i for i in range(len(batches)) if i % _HELD_OUT == _HELD_OUT - 1] or [len(batches) - 1]
        learn = tuple(batch for i, batch in enumerate(batches) if i not in held)
        return cls(learn, tuple(batches[i] for i in held))

    @classmethod
    def of_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Callable[..., Any],
        *,
        size: int = TEXT_WINDOW,
        most: int = TEXT_TOKENS,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> Calibration:
        """Texts one after the other as `input_ids` [1, size]: at most `most` tokens, for a tokenizer of transformers and its models.

        Each window has the special tokens that the tokenizer puts around a text. arguments: others that the model is called with.

        Raises:
            T2NErrorInvalidArgument: There are less than two tokens.

        """
        before, after = _around(tokenizer)
        ids: list[int] = []
        for text in texts:
            ids += _tokens(tokenizer, text, add_special_tokens=False) if text.strip() else []
            if len(ids) >= most:
                break
        ids = ids[:most]
        step = max(1, size - len(before) - len(after))
        if len(ids) <= step:  # one window: a part of it is held out
            step = max(1, math.ceil(len(ids) * (1 - 1 / _HELD_OUT)))
        windows = [ids[i : i + step] for i in range(0, len(ids), step)]
        told = [window for window in windows if len(window) > 1 or len(windows) == 1]
        whole = [torch.tensor([[*before, *window, *after]]) for window in told]
        if not whole or whole[0].shape[1] < 2:
            raise T2NErrorInvalidArgument("calibration texts: at least two tokens are needed")
        return cls.of([Batch((), {"input_ids": window, **arguments}) for window in whole])

    @classmethod
    def of_npz(cls, path: Path, arguments: Mapping[str, Any] = MappingProxyType({})) -> Calibration:
        """Arrays by the names of the inputs, each [samples, ...]: a sample, its first axis kept, is a batch.

        Integers become int64, torch's type of indices. arguments: others that the model is called with.

        Raises:
            T2NErrorNotFoundFile: No file there.
            T2NErrorInvalidArgument: Not an .npz file of plain arrays with as many samples each.

        """
        if not path.is_file():
            raise T2NErrorNotFoundFile(f"no calibration data at {str(path)!r}")
        arrays = load_arrays(path)
        counts = {array.shape[0] if array.ndim else None for array in arrays.values()}
        if len(counts) != 1 or not (count := counts.pop()):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
            raise T2NErrorInvalidArgument(
                f"{str(path)!r}: arrays must be [samples, ...] of as many samples; got {shapes}"
            )
        tensors = {
            name: torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
            for name, array in arrays.items()
        }
        return cls.of(
            [Batch((), {n: t[i : i + 1] for n, t in tensors.items()} | dict(arguments)) for i in range(count)]
        )


def as_calibration(
    given: Any, tokenizer: Callable[..., Any] | None = None, model: nn.Module | None = None
) -> Calibration:
    """What a user passes as `calibration=`, as batches.

    Args:
        given: A `Calibration`; batches (each a tensor, a tuple of positional or a dict of keyword arguments; a `DataLoader`'s lists are
            cut to the number of positional arguments `model` takes, so that labels fall away); the path of an `.npz` file; or texts:
            a str, a list of them, or the path of a text file.
        tokenizer: Of transformers; for texts.
        model: For lists; and a language model of transformers is asked for no cache.

    Raises:
        T2NErrorInvalidArgument: None, nothing, or something else; texts without a tokenizer.
        T2NErrorNotFoundFile: No file at a path.

    """
    if isinstance(given, Calibration):
        return given
    if given is None:
        raise T2NErrorInvalidArgument(f"this method learns from calibration data: {_WAYS}")
    if isinstance(given, (str, Path)):
        given = [given]
    if isinstance(given, (torch.Tensor, Mapping)) or not isinstance(given, Iterable):
        raise T2NErrorInvalidArgument(f"calibration is {type(given).__name__}, not an iterable of batches: {_WAYS}")
    items = list(given)
    if items and all(isinstance(item, (str, Path)) for item in items):
        others = {"use_cache": False} if "use_cache" in _parameters(model) else {}
        if len(items) == 1 and isinstance(items[0], Path) and items[0].suffix == ".npz":
            return Calibration.of_npz(items[0], others)
        if tokenizer is None:
            raise T2NErrorInvalidArgument("calibration texts need a tokenizer")
        expect("tokenizer", tokenizer, Callable, "a tokenizer of transformers")  # type: ignore[arg-type]
        return Calibration.of_texts(
            (i if isinstance(i, str) else read_text(i) for i in items), tokenizer, arguments=others
        )
    return Calibration.of([as_batch(item, model) for item in items])


def read_text(path: Path) -> str:
    """A text file. Raises `T2NErrorNotFoundFile`, and `T2NErrorInvalidArgument` if it is not UTF-8."""
    if not path.is_file():
        raise T2NErrorNotFoundFile(f"no calibration text at {str(path)!r}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise T2NErrorInvalidArgument(f"calibration text {str(path)!r} is not UTF-8: {error}") from error


def as_batch(item: Any, model: nn.Module | None = None) -> Batch:
    """A tensor, a tuple or list of positional or a dict of keyword arguments. Raises `T2NErrorInvalidArgument` for anything else."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, torch.Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        return Batch((), dict(item))
    if isinstance(item, list):
        return Batch(tuple(item[: _positional(model)]), {})
    if isinstance(item, tuple):
        return Batch(item, {})
    raise T2NErrorInvalidArgument(f"a calibration batch is {type(item).__name__}: {_WAYS}")


def _parameters(model: nn.Module | None) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters if model is not None else {}


def _positional(model: nn.Module | None) -> int | None:
    """How many positional arguments `model` takes; None for any number."""
    kinds = [parameter.kind for parameter in _parameters(model).values()]
    if model is None or inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)


def _tokens(tokenizer: Callable[..., Any], text: str, **how: Any) -> list[int]:
    return list(tokenizer(text, verbose=False, **how)["input_ids"])


def _around(tokenizer: Callable[..., Any]) -> tuple[list[int], list[int]]:
    """Special tokens that `tokenizer` puts before and after a text."""
    bare, whole = _tokens(tokenizer, "a", add_special_tokens=False), _tokens(tokenizer, "a")
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    at = next(starts, 0)
    return whole[:at], whole[at + len(bare) :]


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _halves(batch: Batch) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """One batch in two along its first axis; whole and nothing where it has no two samples."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if len(sizes) != 1 or min(sizes) < 2:
        return (batch,), ()
    count = sizes.pop()
    cut = count - max(1, count // _HELD_OUT)

    def samples(part: slice) -> tuple[Batch, ...]:
        return (pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[part] if tensor.dim() else tensor, batch),)

    return samples(slice(cut)), samples(slice(cut, None))
