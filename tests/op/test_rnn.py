"""Recurrent layers and cells: exported through the public API, against torch at several lengths and batches."""

import re

import numpy as np
import pytest
import torch
from rows import BS, B, Row, check, x
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorNotImplemented
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF

# What torch itself says, of its own speed.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def relu_rnn(*args, **kwargs):
    return nn.RNN(*args, nonlinearity="relu", **kwargs)


KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": relu_rnn}
TB, STATE = {0: "T", 1: "B"}, {1: "B"}


def net(kind, input=8, hidden=12, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return KINDS[kind](input, hidden, **options).eval().to(dtype)


class Stateful(nn.Module):
    """A recurrent module (or cell) whose state is one flat input a tensor."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, frames, *state):
        return self.rnn(frames, state if len(state) == 2 else state[0])


FRAMES = x(5, 2, 8)


def layers(kind, axes=TB, inputs=FRAMES, dtype=torch.float32, **options):
    name = ",".join([kind, *(f"{k}={v}" for k, v in options.items()), str(dtype)[6:], *map(str, inputs.shape)])
    return Row(name, net(kind, dtype=dtype, **options), (inputs.to(dtype),), {"args_0": axes})


def stateful(kind, batch=3, **options):
    model = net(kind, **options)
    count = model.num_layers * (2 if model.bidirectional else 1)
    sizes = (model.proj_size or 12, 12) if kind == "lstm" else (12,)
    states = [x(*((count, batch, n) if batch else (count, n)), seed=i) for i, n in enumerate(sizes)]
    steps = 1 if options.get("batch_first") else 0
    frames = x(*((3, 5, 8) if steps else (5, 3, 8)) if batch else (5, 8))
    axes = {0: "T"} if not batch else BS if steps else TB
    named = {f"args_{i}": STATE if batch else {} for i in range(1, 1 + len(states))}
    return Row(f"{kind},{batch},{options}", Stateful(model), (frames, *states), {"args_0": axes, **named})


def cell(kind, dtype=torch.float32, **options):
    cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell}
    torch.manual_seed(0)
    states = [x(3, 12, seed=i).to(dtype) for i in range(2 if kind == "lstm" else 1)]
    axes = {f"args_{i}": B for i in range(1 + len(states))}
    module = Stateful(cells[kind](8, 12, **options).to(dtype))
    return Row(f"{kind}-cell,{options},{dtype}", module, (x(3, 8).to(dtype), *states), axes)


ROWS = [
    *[layers(kind, dtype=dtype) for kind in KINDS for dtype in (torch.float32, torch.float16)],
    *[layers(kind, bias=False, bidirectional=True) for kind in KINDS],
    *[layers(kind, BS, num_layers=2, bidirectional=True, batch_first=True) for kind in KINDS],
    *[layers(kind, {0: "T"}, x(5, 8)) for kind in KINDS],
    *[layers(kind, {1: "T"}, x(2, 5, 8), batch_first=True) for kind in KINDS],
    *[layers(kind, {1: "B"}) for kind in KINDS],
    *[layers(kind, {}, num_layers=3, dropout=0.5) for kind in KINDS],
    *[layers("lstm", BS, proj_size=4, batch_first=True, num_layers=2, bidirectional=flag) for flag in (False, True)],
    layers("lstm", proj_size=4, bias=False, dtype=torch.float16),
    layers("gru", bias=False, dtype=torch.float16, bidirectional=True),
    *[stateful(kind, num_layers=2, bidirectional=True) for kind in KINDS],
    *[stateful(kind, batch_first=True) for kind in KINDS],
    *[stateful(kind, batch=None) for kind in KINDS],
    stateful("lstm", proj_size=4, num_layers=2),
    *[cell(kind, dtype) for kind in ("lstm", "gru", "tanh") for dtype in (torch.float32, torch.float16)],
    *[cell(kind, bias=False) for kind in ("lstm", "gru", "tanh")],
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row, tmp_path):
    check(row, tmp_path)


def export(model, inputs, path, **axes):
    """The text of the archive written to `path`."""
    export_model_to_nnef(model, inputs, path, TractNNEF.latest(dynamic_axes=axes), compression_level=None)
    return (path / "graph.nnef").read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [{}, BS])
def test_one_scan_a_layer_and_direction_whatever_the_length(kind, axes, tmp_path):
    model = net(kind, num_layers=2, bidirectional=True, batch_first=True)
    texts = [export(model, x(2, steps, 8), tmp_path / f"{steps}.nnef", input=axes) for steps in (3, 50)]
    assert [text.count("= tract_core_scan(") for text in texts] == [4, 4]
    # The numbers of a text are its sizes: all else is the same.
    short, long = (re.sub(r"\d+", "n", text) for text in texts)
    assert short == long
    # One fragment serves the four scans: they differ in their tensors only.
    assert texts[0].count("fragment t2n_" + {"tanh": "rnn_tanh", "relu": "rnn_relu"}.get(kind, kind) + "_12") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_frame_by_frame_is_the_whole(kind, tmp_path):
    model = Stateful(net(kind, num_layers=2))
    states = [x(2, 1, 12, seed=i) for i in range(2 if kind == "lstm" else 1)]
    export(model, (x(4, 1, 8), *states), tmp_path / "m.nnef", frames={0: "T"})
    tract, frames = TractModel.load(tmp_path / "m.nnef"), x(20, 1, 8, seed=9)
    whole = list(tract.run(frames, *states).values())
    parts, threaded = [], [s.numpy() for s in states]
    for frame in frames.numpy():
        y, *threaded = tract.run(frame[None], *threaded).values()
        parts.append(y)
    # The same operations on the same numbers, but matrix kernels may differ with the number of rows: rounding only.
    for got, expected in zip([np.concatenate(parts), *threaded], whole, strict=True):
        assert np.abs(got - expected).max() < 1e-6
    with torch.no_grad():
        reference = model(frames, *states)[0].numpy()
    assert np.abs(whole[0] - reference).max() < 1e-6


def test_a_run_does_not_go_on_from_the_last(tmp_path):
    export(net("lstm"), x(4, 2, 8), tmp_path / "m.nnef", input=TB)
    tract, frames = TractModel.load(tmp_path / "m.nnef"), x(6, 2, 8)
    first, second = (tract.run(frames)["output_0"] for _ in range(2))
    assert np.array_equal(first, second)


def test_a_given_state_is_read_at_every_turn_of_a_session_and_none_lets_it_go_on(tmp_path):
    row = stateful("gru")
    given = export(row.function, row.inputs, tmp_path / "given.nnef")
    none = export(net("gru"), x(5, 2, 8), tmp_path / "none.nnef")
    assert ("reset_every_turn = 1" in given, "reset_every_turn = 0" in none) == (True, True)


class Tagger(nn.Module):
    def __init__(self, vocabulary=50, width=32, tags=7):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, tags)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", [None, "q40"])
def test_tagger(dtype, method, tmp_path):
    torch.manual_seed(0)
    model = Tagger().eval().to(dtype)
    report = quantize_and_verify(model, IDS, tmp_path / "m.nnef", method, dynamic_axes={"ids": BS})
    assert report.ok
    packed = {row.fqn for row in report.rows if row.storage == "q40"}
    lstm = {name for name, _ in model.named_parameters() if "lstm.weight" in name}
    assert packed == ({*lstm, "embedding.weight", "head.weight"} if method else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"batch_first": True, "num_layers": 2, "bidirectional": True}]
)
def test_packed_weights(kind, options, tmp_path):
    model = net(kind, 32, 64, **options)
    report = quantize_and_verify(model, x(3, 4, 32), tmp_path / "m.nnef", dynamic_axes={"input": BS})
    assert report.ok
    assert {row.storage for row in report.rows} == {"q40"}
    # tract holds them packed, those in the bodies of scans too: 4.5 bits each, and biases and states in f32.
    weights = sum(p.numel() for n, p in model.named_parameters() if "weight" in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if "bias" in n)
    assert TractModel.load(tmp_path / "m.nnef").weight_bytes < weights * 4.5 / 8 + 4 * rest + 2048


def test_packed_projection_and_its_reason_where_rows_do_not_fit(tmp_path):
    model = net("lstm", 32, 64, proj_size=16)
    report = quantize_and_verify(model, x(3, 4, 32), tmp_path / "m.nnef", dynamic_axes={"input": TB})
    storage = {row.fqn: (row.storage, row.reason) for row in report.rows}
    assert storage["weight_hr_l0"] == ("q40", None)
    assert storage["weight_hh_l0"][0] == "f32"
    assert "16 elements a row" in storage["weight_hh_l0"][1]


class Joined(nn.Module):
    """A product, or a convolution of one tap, of what is concatenated along the summed axis."""

    def __init__(self, layer, axis):
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, a, b):
        return self.layer(torch.cat([a, b], self.axis))


@pytest.mark.parametrize(("layer", "axis"), [(nn.Linear(64, 32), -1), (nn.Conv1d(64, 32, 1), 1)])
def test_packed_weights_beside_a_concatenation(layer, axis, tmp_path):
    inputs = x(2, 32, 32), x(2, 32, 32, seed=1)
    axes = {"a": B, "b": B}
    assert quantize_and_verify(Joined(layer, axis), inputs, tmp_path / "m.nnef", dynamic_axes=axes).ok


class Repeated(nn.Module):
    """Products of what is the same for every batch."""

    def __init__(self):
        super().__init__()
        self.query, self.layer = nn.Parameter(x(1, 4, 8)), nn.Linear(8, 8)

    def forward(self, frames):
        count = frames.shape[0]
        zeros = torch.zeros(count, 3, 8)[:, 1]
        return self.layer(self.query.expand(count, -1, -1)), self.layer(zeros) + frames


def test_products_of_broadcasts_keep_their_batch(tmp_path):
    export(Repeated().eval(), x(3, 8), tmp_path / "m.nnef", frames=B)


class Expanded(Repeated):
    """The product of expanded numbers: one that is no constant, though it is made with one, or one a row."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, frames):
        one = torch.maximum(torch.tensor(0.25), frames.mean())
        return self.layer((frames.mean(1, keepdim=True) if self.rows else one).expand(frames.shape[0], 8))


def test_products_of_an_expanded_number_keep_their_batch(tmp_path):
    export(Expanded(rows=False).eval(), x(3, 8), tmp_path / "m.nnef", frames=B)


def test_products_of_an_expanded_number_a_row_are_refused(tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match="all one number"):
        export(Expanded(rows=True).eval(), x(3, 8), tmp_path / "m.nnef", frames=B)


class Loop(nn.Module):
    """A cell, step by step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(8, 12)

    def forward(self, frames):
        state = None
        outputs = []
        for frame in frames.unbind(1):
            state = self.cell(frame, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


def test_a_loop_over_a_fixed_length_is_unrolled(tmp_path):
    assert "scan" not in export(Loop().eval(), x(2, 5, 8), tmp_path / "m.nnef", frames=B)


def test_a_loop_over_a_dynamic_length_says_what_to_use(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match=r"a Python loop is unrolled; .* nn\.LSTM"):
        export(Loop().eval(), x(2, 5, 8), tmp_path / "m.nnef", frames=BS)
    assert not list(tmp_path.iterdir())


class PackedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, frames, lengths):
        return self.rnn(pack_padded_sequence(frames, lengths, batch_first=True))[1]


def test_packed_sequences_are_refused(tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match="give the padded batch to the recurrent layer"):
        export(PackedBatch(), (x(2, 5, 8), torch.tensor([5, 3])), tmp_path / "m.nnef")


def test_one_step_from_a_constant_state_over_a_dynamic_batch_is_refused(tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match="one step from a constant state"):
        export(net("lstm"), x(1, 2, 8), tmp_path / "m.nnef", input={1: "B"})
    export(net("lstm"), x(1, 2, 8), tmp_path / "m.nnef")


def test_the_model_keeps_its_weights(tmp_path):
    model = net("lstm")
    before = dict(model.named_parameters())
    export(model, x(4, 2, 8), tmp_path / "m.nnef", input=TB)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    model(x(4, 2, 8))
    assert all(flat is after[name] for flat, name in zip(model._flat_weights, model._flat_weights_names, strict=True))
