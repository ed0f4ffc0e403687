"""Put quantized weights in the place of float ones: all of them, or none."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor
from torch_to_nnef.quantize.measures import measures_of
from torch_to_nnef.quantize.rows import TensorRow, record, weight_error
from torch_to_nnef.quantize.targets import Selection, Target, find_targets
from torch_to_nnef.tensor.offload import OffloadedTensor, loaded
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.quant.padded import QTensorTractPadded, padded
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly
from torch_to_nnef.tensor.updater import ModTensorUpdater, Place
from torch_to_nnef.turns import one_at_a_time

Encode = Callable[[torch.Tensor, str], QTensorTractScaleOnly]
# `(bytes done, all bytes, name of what is next)`.
Progress = Callable[[int, int, str], None]
_LARGEST_READ = 32 << 20
_STORAGE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


@one_at_a_time
def quantize_(
    model: nn.Module,
    encode: Encode,
    *,
    classes: Sequence[type[nn.Module]] | None = None,
    selection: Selection | None = None,
    method: str,
    progress: Progress | None = None,
) -> nn.Module:
    """Replace the weights asked for by `encode(weight, name)`, in place.

    Shared weights are encoded once and stay shared. What is made of a weight on disk (`OffloadedTensor`) is put on disk too, so that
    there is one at a time in memory. The model changes only after every weight is encoded: on an error,
    Ctrl-C included, it is exactly as before. A row is recorded for every weight asked for, with the reason if it was
    left in float.

    Args:
        model: Changed in place, and returned.
        encode: Gets a float weight [N, K] whose rows are to be divided into groups (a view of a weight that the model
            holds as [K, N]) and its name, returns its quantized form in the same shape.
        classes: Module classes (with subclasses) whose `weight` is asked for; None for Linear, Embedding, Conv1d,
            Conv2d.
        selection: Narrows further, and brings what the captured graph knows about uses.
        method: Name shown in rows.
        progress: Called as `(done, total, name)` before each weight, and once at the end; in bytes of the float weights.

    Raises:
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.
        T2NErrorInvalidArgument: `selection.include` selects nothing.
        T2NErrorRuntime: The disk has no room for the packed weights.

    """
    targets = find_targets(model, classes, selection)
    done, total = 0, sum(target.nbytes for target in targets if target.reason is None)
    packed: dict[int, QTensor] = {}
    rows = []
    for target in targets:
        if target.reason is not None:
            rows.append(row_of(target, None, method))
            continue
        if progress:
            progress(done, total, target.places[0].fqn)
        packed[id(target.tensor)], row = _encoded(target, encode, method)
        rows.append(row)
        done += target.nbytes
    if progress:
        progress(total, total, "")
    put_packed(model, targets, packed, rows)
    return model


def _encoded(target: Target, encode: Encode, method: str) -> tuple[QTensor, TensorRow]:
    """What `encode` makes of a weight, on disk if the weight is, and its row: nothing read or made for them is held beyond."""
    began = time.perf_counter()
    read = replace(target, tensor=_read(target.tensor.detach()))
    codes = packed_rows(read, encode, target.places[0].fqn)
    if not isinstance(codes, QTensor) or codes.shape != target.tensor.shape:
        found = f"{type(codes).__name__} {list(getattr(codes, 'shape', ()))}"
        raise T2NErrorInconsistentTensor(
            f"`{target.places[0].fqn}`: encode must return a QTensor of shape {list(target.tensor.shape)}, not {found}"
        )
    row = row_of(read, codes, method, seconds=time.perf_counter() - began)
    return codes.offload() if isinstance(target.tensor, OffloadedTensor) else codes, row


def packed_rows(target: Target, encode: Callable[..., QTensorTractScaleOnly], *known: object) -> QTensorTractScaleOnly:
    """What `encode(rows [N, K], *known)` makes of a weight, in the shape of the weight."""
    weight = target.tensor.detach()
    if target.padding:
        return QTensorTractPadded.of(encode(padded(weight), *known), weight.shape[1])
    return encode(weight.mT, *known).transposed() if target.transposed else encode(weight, *known)


def put_packed(
    model: nn.Module,
    targets: Sequence[Target],
    packed: Mapping[int, QTensor],
    rows: Sequence[TensorRow],
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Hold what was made of each target (by the id of its tensor) in all its places, or change nothing; then record `rows`.

    beside: other parameters by name, and what is held instead.
    """
    updater = ModTensorUpdater(model)
    changes: list[tuple[torch.Tensor, torch.Tensor]] = [
        (t.tensor, packed[id(t.tensor)]) for t in targets if id(t.tensor) in packed
    ]
    changes += [(updater.get(name), new) for name, new in beside.items()]
    held = [
        (old, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new) for old, new in changes
    ]
    _swap([(place, old, new) for old, new in held for place in updater.places(old)])
    for row in rows:
        record(row)


def _read(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in memory, since it is read twice; large ones stay on disk, and are walked in pieces."""
    return weight if weight.nbytes > _LARGEST_READ else loaded(weight)


def _swap(swaps: Sequence[tuple[Place, torch.Tensor, torch.Tensor]]) -> None:
    try:
        for place, _, new in swaps:
            place.put(new)
    except BaseException:
        for place, old, _ in swaps:
            place.put(old)
        raise


def row_of(
    target: Target,
    packed: QTensor | None,
    method: str,
    *,
    output_snr_db: float | None = None,
    min_max_output_snr_db: float | None = None,
    seconds: float | None = None,
) -> TensorRow:
    """What became of `target.tensor`: packed by `method`, or left as it is with `target.reason`."""
    tensor, place = target.tensor, target.places[0]
    make = functools.partial(
        TensorRow,
        fqn=place.fqn,
        module_class=type(place.module).__name__,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        reason=target.reason,
        nbytes_before=target.nbytes,
        output_snr_db=output_snr_db,
        min_max_output_snr_db=min_max_output_snr_db,
        seconds=seconds if packed is not None else None,
    )
    now, rows = packed if packed is not None else tensor, tensor.mT if target.transposed else tensor
    if isinstance(now, QTensorTractPadded):
        method, rows = f"{method}, rows padded {now.shape[1]} -> {now.stored_shape[1]}", padded(tensor)
    if not isinstance(now, QTensor):
        return make(
            storage=_STORAGE.get(now.dtype, str(now.dtype).removeprefix("torch.")), bits_per_weight=8.0 *
            now.element_size(), method=None, snr_db=None, relative_rmse=None, quantized=False, nbytes_after=now.numel()
            * now.element_size(),
        )  # fmt: skip
    snr_db, relative_rmse = (None, None) if packed is None else weight_error(tensor, packed)
    measures = {}
    if isinstance(packed, QTensorTractScaleOnly):
        measures = vars(measures_of(rows, packed.stored))
    return make(
        storage=now.storage_name, bits_per_weight=8.0 * now.packed_nbytes / max(1, now.numel()), method=method if packed
        is not None else None, snr_db=snr_db, relative_rmse=relative_rmse, quantized=True,
        nbytes_after=now.packed_nbytes, **measures,
    )  # fmt: skip
