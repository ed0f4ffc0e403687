"""Replacements of torch functions for the time of a capture, where torch would burn a size into the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph.istft import istft
from torch_to_nnef.graph.recurrent import GATES, recurrent
from torch_to_nnef.torch_internals import recurrent_functions
from torch_to_nnef.turns import in_this_thread

Size = int | tuple[int, ...] | list[int]


@contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Functions that read a size as a number, replaced by ones that do not, in this thread."""
    with ExitStack() as stack:
        for holder, name, function in _replacements():
            stack.enter_context(mock.patch.object(holder, name, in_this_thread(function, getattr(holder, name))))
        stack.enter_context(mock.patch.object(nn.RNNBase, "_flat_weights", _flat_weights(), create=True))
        yield


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    yield torch, "max_pool1d", _max_pool1d
    yield math, "sqrt", partial(_sqrt, math.sqrt)
    for holder in (torch, Tensor):
        yield holder, "istft", istft
    for holder in (torch, recurrent_functions):
        for mode in GATES:
            yield holder, mode, partial(_recurrent_layers, mode)
    yield nn.RNNBase, "_update_flat_weights", lambda rnn: None
    for name in ("_pack_padded_sequence", "_pad_packed_sequence"):
        yield recurrent_functions, name, _packed_sequence


def _flat_weights() -> property:
    """The second list of its weights that a module keeps; torch would renew it, and so change the model, while it traces."""
    return property(
        in_this_thread(
            lambda rnn: [getattr(rnn, name) for name in rnn._flat_weights_names],
            lambda rnn: rnn.__dict__["_flat_weights"],
        ),
        lambda rnn, weights: rnn.__dict__.update(_flat_weights=weights),
    )


def _sqrt(root: Callable[[Any], float], value: Any) -> Any:
    """math.sqrt reads a size as a number; torch's own root of a size does not."""
    return (torch.sym_sqrt if isinstance(value, (torch.SymInt, torch.SymFloat)) else root)(value)


def _max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Over one row of two dimensions."""
    kernel, pad, spread = ((first, _one(value)) for first, value in ((1, kernel_size), (0, padding), (1, dilation)))
    step = (1, _one(stride)) if stride else kernel
    return max_pool2d(input.unsqueeze(-2), kernel, step, pad, spread, ceil_mode).squeeze(-2)


def _one(value: Size) -> int:
    return value if isinstance(value, int) else value[0]


def _recurrent_layers(mode: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`torch.lstm` and its like as one `t2n::recurrent` a layer and direction."""
    if isinstance(args[2], Tensor) or (mode == "lstm" and isinstance(args[1], Tensor)):
        _packed_sequence()
    return _stacked(mode, *args, **kwargs)


def _packed_sequence(*_args: Any) -> NoReturn:
    raise T2NErrorNotImplemented(
        "a PackedSequence drops frames by the lengths of a batch, which tract cannot plan; give the padded batch to the "
        "recurrent layer (without pack_padded_sequence) and mask what it returns, or export it for one sequence"
    )


def _stacked(
    mode: str,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    if train and dropout:
        raise T2NErrorNotImplemented("dropout between recurrent layers is random; export in eval mode")
    states = [hx] if isinstance(hx, Tensor) else hx
    directions = 2 if bidirectional else 1
    count = len(params) // (num_layers * directions)
    finals = []
    for layer in range(num_layers):
        outputs = []
        for at in range(layer * directions, (layer + 1) * directions):
            w_ih, w_hh, *rest = params[at * count : (at + 1) * count]
            biases, projection = (rest[:2], rest[2:]) if has_biases else ([None, None], rest)
            y, *final = recurrent(
                input,
                [s[at] for s in states],
                w_ih,
                w_hh,
                *biases,
                projection[0] if projection else None,
                mode,
                at % directions == 1,
                batch_first,
            )
            outputs.append(y)
            finals.append(final)
        input = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return input, *(torch.stack(list(state)) for state in zip(*finals, strict=True))
