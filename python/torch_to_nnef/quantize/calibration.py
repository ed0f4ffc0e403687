"""Calibration data: batches that a model is run on, some to learn from, others held out to judge by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.torch_internals import pytree

_HELD_OUT = 5  # one batch in so many
_WAYS = "pass calibration=batches: tensors, tuples of positional or dicts of keyword arguments, a DataLoader, or texts with a tokenizer"


class Batch(NamedTuple):
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """What `model` returns."""
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`."""
        moved: Batch = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self)
        return moved


@dataclass(frozen=True)
class Calibration:
    """Batches to learn from, and batches that nothing is learned from, by which methods are judged."""

    learn: tuple[Batch, ...]
    held_out: tuple[Batch, ...] = ()

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
        cls, texts: Iterable[str], tokenizer: Callable[..., Any], *, size: int = 512, most: int = 8192
    ) -> Calibration:
        """Texts one after the other as `input_ids` [1, size]: at most `most` tokens, for a tokenizer of transformers and its models.

        Raises:
            T2NErrorInvalidArgument: There are less than two tokens.

        """
        ids: list[int] = []
        for text in texts:
            ids += tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
            if len(ids) >= most:
                break
        windows = [ids[i : min(i + size, most)] for i in range(0, min(len(ids), most), size)]
        batches = [Batch((), {"input_ids": torch.tensor([window])}) for window in windows if len(window) > 1]
        if not batches:
            raise T2NErrorInvalidArgument("calibration texts: at least two tokens are needed")
        return cls.of(batches)


def as_calibration(
    given: Any, tokenizer: Callable[..., Any] | None = None, model: nn.Module | None = None
) -> Calibration:
    """What a user passes as `calibration=`, as batches.

    Args:
        given: A `Calibration`; batches (each a tensor, a tuple of positional or a dict of keyword arguments; a `DataLoader`'s lists are
            cut to the number of positional arguments `model` takes, so that labels fall away); or texts: a str, a list of them, or the
            path of a text file.
        tokenizer: Of transformers; for texts.
        model: For lists.

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
        if tokenizer is None:
            raise T2NErrorInvalidArgument("calibration texts need a tokenizer")
        return Calibration.of_texts(map(_text, items), tokenizer)
    return Calibration.of([_batch(item, model) for item in items])


def _text(item: str | Path) -> str:
    if isinstance(item, str):
        return item
    if not item.is_file():
        raise T2NErrorNotFoundFile(f"no calibration text at {str(item)!r}")
    try:
        return item.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise T2NErrorInvalidArgument(f"calibration text {str(item)!r} is not UTF-8: {error}") from error


def _batch(item: Any, model: nn.Module | None) -> Batch:
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


def _positional(model: nn.Module | None) -> int | None:
    """How many positional arguments `model` takes; None for any number."""
    if model is None:
        return None
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)


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
