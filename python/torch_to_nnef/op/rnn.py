"""Recurrent layers: the input's product for all steps at once, then one scan over what needs the step before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_to_nnef.graph.recurrent import GATES, recurrent
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.linear import affine
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref


@dataclass(frozen=True, slots=True)
class _Cell:
    """One step, from what the input (`x`) and the last state (`r`) add to the gates, to the output `{y}`.

    `gates`: the fragment that puts torch's gates in the order of tract's kernel; `own_bias`: `r` has a bias apart from that of `x`.
    """

    step: str
    states: tuple[str, ...] = ("h",)
    gates: str | None = None
    own_bias: bool = False


_CELLS = {
    "lstm": _Cell(
        "[{y}, c_next] = tract_core_lstm_epilogue(x + r, c, hidden = {hidden});", ("h", "c"), gates="t2n_lstm_gates"
    ),
    "gru": _Cell("{y} = tract_core_gru_epilogue(x, r, h, hidden = {hidden});", gates="t2n_gru_gates", own_bias=True),
    "rnn_tanh": _Cell("{y} = tanh(x + r);"),
    "rnn_relu": _Cell("{y} = relu(x + r);"),
}


@lowers(recurrent)
def recurrent_layer(
    e: Emitter,
    input: Ref,
    state: list[Ref],
    w_ih: Ref,
    w_hh: Ref,
    b_ih: Ref | None,
    b_hh: Ref | None,
    w_hr: Ref | None,
    mode: str,
    reverse: bool,
    batch_first: bool,
) -> list[Ref]:
    """All outputs, then the last state. A step is a chunk of one, forwards or backwards, so the body has the layer's axes."""
    cell, hidden = _CELLS[mode], w_hh.shape[0] // GATES[mode]
    axis, step = (1 if batch_first else 0), (-1 if reverse else 1)

    if input.shape[axis] == 1 and any(
        not isinstance(s.shape[0], int) and e.before_broadcast(s) is not s for s in state
    ):
        # tract 0.23.9 puts the body of a scan of one step in its place, and then meets what `before_broadcast` is about.
        raise e.refuse("one step from a constant state over a dynamic batch; give the state as an input, or use a cell")

    def ordered(ref: Ref, axis: int) -> Ref:
        return e.op(cell.gates, ref, axis=axis, hidden=hidden, hint="gates") if cell.gates else ref

    bias = b_ih
    if b_ih is not None and b_hh is not None and not cell.own_bias:
        bias = e.binary("add", b_ih, b_hh, b_ih.dtype)
    x = ordered(affine(e, input, w_ih, bias), 2)
    body = _Body(e)
    r = body.product("w", w_hh if e.is_quantized(w_hh) else ordered(w_hh, 0), "h")
    if e.is_quantized(w_hh) and cell.gates:
        r = f"{cell.gates}({r}, axis = 2, hidden = {hidden})"
    if cell.own_bias and b_hh is not None:
        body.full.append(("b", e.lift(ordered(b_hh, 0), 3)))
        r += " + b"
    body.lines += [f"r = {r};", cell.step.format(y="y" if w_hr is not None else "h_next", hidden=hidden)]
    if w_hr is not None:
        body.lines.append(f"h_next = {body.product('p', w_hr, 'y')};")

    nexts = [f"{name}_next" for name in cell.states]
    first = [e.beside(w_hh, e.unsqueeze(s, [axis])) for s in state]
    outputs, *last = e.ops(
        "tract_core_scan",
        body.define(f"t2n_{mode}_{hidden}", cell.states, nexts),
        [("x", x, axis, step)],
        body.full,
        list(zip(cell.states, first, nexts, strict=True)),
        [(nexts[0], "full", axis, step), *((name, "last", 0, 1) for name in nexts)],
        results=[(e.out.shape, e.out.dtype), *((s.shape, s.dtype) for s in first)],
        # Else a session would go on from the state it left, whatever initial state it is given. Where none is, it may: that
        # is how a model runs on a stream (tract-pulse).
        reset_every_turn=int(not e.is_fixed(e.node.args[1])),
    )
    return [outputs, *(e.squeeze(s, [axis]) for s in last)]


class _Body:
    """The fragment of a scan: its lines, and the tensors that are the same at every step."""

    def __init__(self, e: Emitter) -> None:
        self.e = e
        self.lines: list[str] = []
        self.full: list[tuple[str, Ref]] = []
        self.dtype = tract_dtype(e.out.dtype, e.node.where())
        self._packed: list[Ref] = []

    def product(self, name: str, weight: Ref, x: str) -> str:
        """`weight` times `x`, as an expression.

        A packed weight is a variable of the body: tract 0.23.9 loads no scan that is given one from outside ("Exotic tensor
        requires an exotic_fact").
        """
        if self.e.is_quantized(weight):
            self._packed.append(weight)
            self.lines.insert(0, f'{name} = variable<scalar>(label = "{weight.fqn}", shape = {list(weight.shape)});')
        else:
            self.full.append((name, weight))
        product = f'tract_core_einsum([{name}, {x}], expr = "nk,abk->abn", acc = "f32")'
        return product if self.dtype == "f32" else f'tract_core_cast({product}, to = "{self.dtype}")'

    def define(self, cell: str, states: Sequence[str], results: Sequence[str]) -> str:
        """The fragment, under a name that says what it depends on: layers of one kind share it."""
        constants = [name for name, _ in self.full]
        parameters = ", ".join(f"{name}: tensor<scalar>" for name in ("x", *states, *constants))
        signature = f"({parameters}) -> ({', '.join(f'{name}: tensor<scalar>' for name in results)})"
        parts = [cell, self.dtype, "".join(constants), *(weight.id for weight in self._packed)]
        return self.e.define("_".join(filter(None, parts)), signature, self.lines)
