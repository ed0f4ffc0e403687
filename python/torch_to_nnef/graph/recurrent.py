"""`t2n::recurrent`, one direction of one recurrent layer: torch spells its own operators out step by step, which fixes the length."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_to_nnef.torch_internals import recurrent_functions

# Torch's function -> gates stacked in its weights.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

torch.library.define(
    "t2n::recurrent",
    "(Tensor input, Tensor[] state, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr,"
    " str mode, bool reverse, bool batch_first) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
recurrent = torch.ops.t2n.recurrent.default


@torch.library.impl("t2n::recurrent", "CompositeExplicitAutograd")
def _compute(
    input: Tensor,
    state: list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    mode: str,
    reverse: bool,
    batch_first: bool,
) -> list[Tensor]:
    """All outputs (steps or batch first, as the input), then the last state: h, and c of an LSTM. `state` is [batch, features]."""
    steps = 1 if batch_first else 0
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    first = [s.unsqueeze(0) for s in state]
    function = getattr(recurrent_functions, mode)
    x = input.flip(steps) if reverse else input
    y, *last = function(
        x, first if mode == "lstm" else first[0], weights, b_ih is not None, 1, 0.0, False, False, batch_first
    )
    return [y.flip(steps) if reverse else y, *(s.squeeze(0) for s in last)]


def _shapes(
    input: Tensor, state: list[Tensor], w_ih: Tensor, w_hh: Tensor, *rest: Tensor | str | bool | None
) -> list[Tensor]:
    return [input.new_empty((*input.shape[:2], w_hh.shape[1])), *(s.new_empty(s.shape) for s in state)]


torch.library.register_fake("t2n::recurrent", _shapes)
