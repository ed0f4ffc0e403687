"""Data that methods learn from, as `LlmOptions` name it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.compress import needs_calibration, takes
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.llm_tract.families import vocabulary_of
from torch_to_nnef.llm_tract.texts import windows
from torch_to_nnef.quantize.calibration import TEXT_WINDOW, Batch, Calibration, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from torch_to_nnef.compress import Method
    from torch_to_nnef.llm_tract.options import LlmOptions

_NO_CACHE = {"use_cache": False}
_JUDGED_WINDOWS, _JUDGED_WINDOW = 4, 128


def check_calibration(options: LlmOptions, methods: Sequence[Method], *, judges: bool = False) -> None:
    """Before anything is loaded. Raises `T2NErrorInvalidArgument` for data that is missing, or that no method learns from.

    judges: the data is measured on too.
    """
    data = options.calibration_text or options.calibration_npz
    cache, key = options.calibration_cache, options.compression_method
    learns = any(map(needs_calibration, methods))
    if (
        learns
        and data is None
        and not (cache and cache.exists() and any(takes(m, "calibration_cache") for m in methods))
    ):
        raise T2NErrorInvalidArgument(
            f"{key or 'a method of --tensor-type'} learns from data: pass --calibration-text FILE or --calibration-npz FILE"
        )
    judges = judges or options.target_bpw is not None or options.max_kl is not None
    if data is not None and not (judges or any(takes(m, "calibration") for m in methods)):
        raise T2NErrorInvalidArgument(f"{key or 'an export without compression'} learns from no calibration data")
    if cache is not None and not any(takes(m, "calibration_cache") for m in methods):
        raise T2NErrorInvalidArgument(f"{key or 'an export without compression'} takes no --calibration-cache")


def calibration_of(
    options: LlmOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, context: int | None
) -> Calibration | None:
    """Batches `model` is called with, in windows of 512 tokens or `context` if that is less; None if `options` name no data.

    Raises what `Calibration` does, and `T2NErrorInvalidArgument` for tokens that the model does not have.
    """
    if options.calibration_npz is not None:
        calibration = Calibration.of_npz(options.calibration_npz, _NO_CACHE)
    elif options.calibration_text is None:
        return None
    elif tokenizer is None:
        raise T2NErrorInvalidArgument(
            "a calibration text needs a tokenizer, and the model has none: pass --calibration-npz"
        )
    else:
        calibration = Calibration.of_texts(
            [read_text(options.calibration_text)], tokenizer, size=min(TEXT_WINDOW, context or TEXT_WINDOW),
            most=options.calibration_tokens, arguments=_NO_CACHE,
        )  # fmt: skip
    count = vocabulary_of(model.config)
    for batch in (*calibration.learn, *calibration.held_out):
        ids = batch.kwargs.get("input_ids")
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise T2NErrorInvalidArgument(f"calibration: tokens must be in [0, {count}), some are not")
    return calibration


def judged_on(
    calibration: Calibration | None, tokenizer: PreTrainedTokenizerBase | None, context: int | None
) -> tuple[Batch, ...]:
    """At most 512 tokens that nothing is learned from, in windows of 128: of `calibration`, or of a built-in text.

    Raises `T2NErrorInvalidArgument` if there is neither that nor a tokenizer.
    """
    if calibration is None:
        if tokenizer is None:
            raise T2NErrorInvalidArgument("nothing to measure on: the model has no tokenizer; pass --calibration-npz")
        size = min(_JUDGED_WINDOW, context or _JUDGED_WINDOW)
        text = windows(tokenizer, size=size, most=_JUDGED_WINDOWS * size)
        return tuple(Batch((), {"input_ids": torch.tensor([ids]), **_NO_CACHE}) for ids in text.ids)
    pieces = (
        Batch((), {name: _piece(value, start) for name, value in batch.kwargs.items()})
        for batch in calibration.judge
        for start in range(0, batch.kwargs["input_ids"].shape[-1], _JUDGED_WINDOW)
    )
    return tuple(islice(pieces, _JUDGED_WINDOWS))


def _piece(value: Any, start: int) -> Any:
    return value[..., start : start + _JUDGED_WINDOW] if isinstance(value, torch.Tensor) else value
