"""`int8*`: weights and what they are multiplied with in 8-bit codes, so that products run in integers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.log import LOGGER
from torch_to_nnef.quantize.apply import put_packed, row_of
from torch_to_nnef.quantize.calibrated import running
from torch_to_nnef.quantize.calibration import Batch, as_calibration
from torch_to_nnef.quantize.costs import refuse_offloaded
from torch_to_nnef.quantize.inputs import Observed, OutputErrors, Products
from torch_to_nnef.quantize.norms import folded
from torch_to_nnef.quantize.observers import OBSERVERS, Observer
from torch_to_nnef.quantize.smoothing import ChannelRanges, smooth
from torch_to_nnef.quantize.targets import DEFAULT_CLASSES, Selection, Target, find_targets, int8_reason
from torch_to_nnef.tensor.quant.affine import QParams
from torch_to_nnef.tensor.quant.int8 import QTensorInt8, quantize_int8

if TYPE_CHECKING:
    from torch_to_nnef.quantize.apply import Progress

_CLASSES = (*DEFAULT_CLASSES, nn.Conv3d)
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8}


def quantize_static_int8(
    model: nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    calibration: Any = None,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "int8",
    observer: str | Callable[[], Observer] = "mse",
    per_channel: bool = True,
    activations: Literal["int8", "uint8"] = "int8",
    **kw: Any,
) -> nn.Module:
    """Hold weights as 8-bit codes that round what they are multiplied with to 8-bit codes too, in place; all of them or none.

    The model runs on the calibration once, in eval mode and without gradients, while an observer a weight sees its inputs. Tables that are
    only looked up have codes with a scale for each row; nothing of theirs is rounded beside. A weight that is used several times, or
    shared, has one range for all of its inputs. With one scale a weight, batch norms of `selection` are folded into the weights first.

    Args:
        model: Changed in place, and returned.
        tokenizer: For a calibration on texts.
        calibration: What `as_calibration` takes.
        to_quantize_module_classes: None: Linear, Embedding, Conv1d, Conv2d, Conv3d.
        selection: Filters, and what the captured graph knows about uses.
        progress: `(done, total, name)`.
        method: Name shown in reports.
        observer: Key of `OBSERVERS`, or what makes an `Observer`.
        per_channel: A scale for each output channel of a weight; else one for the weight.
        activations: Dtype of the codes of inputs.
        **kw: Arguments of the registry call that this method does not need.

    Raises:
        T2NErrorInvalidArgument: No calibration, one that the model cannot be called with, inputs that are not finite, weights on disk, an
            observer or a dtype that there is not.
        T2NErrorImpossibleQuantization: A weight holds NaN or Inf.

    """
    make = OBSERVERS.get(observer) if isinstance(observer, str) else observer
    if make is None or activations not in _DTYPES:
        raise T2NErrorInvalidArgument(
            f"observer is one of {sorted(OBSERVERS)}, activations one of {sorted(_DTYPES)}: got {observer!r}, {activations!r}"
        )
    data = as_calibration(calibration, tokenizer, model)
    classes = to_quantize_module_classes or _CLASSES
    if not per_channel and selection is not None and selection.norms:
        asked = {place.fqn for t in _targets(model, classes, selection) if t.reason is None for place in t.places}
        norms = [norm for norm in selection.norms if norm.filter in asked]
        with folded(model, norms):
            return quantize_static_int8(
                model,
                None,
                data,
                classes,
                replace(selection, norms=()),
                progress,
                method,
                observer,
                per_channel,
                activations,
            )
    targets = _targets(model, classes, selection)
    wanted = [target for target in targets if target.reason is None]
    refuse_offloaded([target.tensor for target in wanted])
    total = sum(target.nbytes for target in wanted)
    seen = Observed(wanted, make)
    with running(model):
        _run(model, data.learn, seen.watch, lambda what: progress and progress(0, total, f"inputs, {what}"))
        targets = [replace(t, reason=t.reason or _unseen(t, seen)) for t in targets]
        packed: dict[int, QTensorInt8] = {}
        seconds: dict[int, float] = {}
        done = 0
        for target in (target for target in targets if target.reason is None):
            name, began, key = target.places[0].fqn, time.perf_counter(), id(target.tensor)
            if progress:
                progress(done, total, name)
            inputs = seen.observers.get(key)
            packed[key] = quantize_int8(
                target.tensor,
                per_channel=per_channel or inputs is None,
                axis=1 if target.transposed else 0,
                input_qparams=QParams.of_range(*inputs.bounds(), _DTYPES[activations]) if inputs else None,
                name=name,
            )
            seconds[key] = time.perf_counter() - began
            done += target.nbytes
        errors = OutputErrors(targets, packed)
        _run(model, data.held_out, errors.watch, lambda what: progress and progress(total, total, f"outputs, {what}"))
    rows = [
        row_of(
            target,
            new := packed.get(id(target.tensor)),
            method if new is None or new.input_qparams else f"{method}, weight only",
            output_snr_db=errors.output_snr_db(target),
            seconds=seconds.get(id(target.tensor)),
        )
        for target in targets
    ]
    if progress:
        progress(total, total, "")
    put_packed(model, targets, packed, rows)
    return model


def quantize_smooth_int8(
    model: nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    calibration: Any = None,
    to_quantize_module_classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "int8_smooth",
    **kw: Any,
) -> nn.Module:
    """`quantize_static_int8`, channels made alike first where the graph lets a factor go into the layer before (`smooth`).

    What takes factors up changes as well: norms, biases, rows of other weights. Without a graph (`selection.folds`) nothing is scaled.
    """
    data = as_calibration(calibration, tokenizer, model)
    if selection is None or not selection.folds:
        LOGGER.warning("%s: no channels are scaled, since the graph has no place that takes up a factor", method)
    folds = selection.folds if selection else ()
    targets = _targets(model, to_quantize_module_classes or _CLASSES, selection)
    wanted = [target for target in targets if target.reason is None]
    refuse_offloaded([target.tensor for target in wanted])
    ranges = ChannelRanges(wanted)
    with running(model):
        _run(
            model,
            data.learn if folds else (),
            ranges.watch,
            lambda what: progress and progress(0, 1, f"channels, {what}"),
        )
    scaled = smooth(model, folds, wanted, ranges)
    try:
        return quantize_static_int8(model, None, data, to_quantize_module_classes, selection, progress, method, **kw)
    except BaseException:
        scaled.undo()
        raise


def _targets(model: nn.Module, classes: Sequence[type[nn.Module]], selection: Selection | None) -> list[Target]:
    """Weights asked for, with the reason of those that recurrent layers read: tract runs these in floats."""
    recurrent = "of a recurrent layer, which computes in floats"
    return [
        replace(target, reason=recurrent)
        if target.reason is None and any(isinstance(place.module, nn.RNNBase) for place in target.places)
        else target
        for target in find_targets(model, classes, selection, int8_reason)
    ]


def _unseen(target: Target, seen: Observed) -> str | None:
    known = id(target.tensor) in seen.observers or id(target.tensor) in seen.looked_up
    return None if known else "the calibration never reached it, so that the range of its inputs is not known"


def _run(
    model: nn.Module, batches: Sequence[Batch], watch: Callable[[], Products], step: Callable[[str], object]
) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for index, batch in enumerate(batches):
        step(f"batch {index + 1} of {len(batches)}")
        with watch():
            batch.to(device)(model)
