"""What torch.export refuses or assumes: one report, with the user's own line, the module it ran in, and what to do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_to_nnef import TractModel, export_model_to_nnef
from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.inference_target import TractNNEF

HERE = Path(__file__)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Outer(nn.Module):
    """So that the report has a module path to name."""

    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Call(function)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def export(function, folder, x=None, axes=None, **options):
    model = function if isinstance(function, nn.Module) else Outer(function)
    x = torch.ones(4, 3) if x is None else x
    target = TractNNEF.latest(dynamic_axes={"x": {0: "B"} if axes is None else axes})
    return export_model_to_nnef(model, x, folder / "m.nnef", target, compression_level=None, **options)


def line_of(text):
    """Where `text` is in this file."""
    (number,) = (i for i, line in enumerate(HERE.read_text().splitlines(), 1) if line.strip() == text)
    return f"{HERE}:{number} in "


def assert_reports(error, line, *words):
    message = str(error.value)
    assert line_of(line) in message
    assert "(module `blocks.1`)" in message
    assert line in message
    for word in words:
        assert word in message
    assert len(message) < 900  # torch's own text is behind __cause__


def branches(x):
    if x.sum() > 0:
        return x + 1
    return x


def repeats(x):
    while x.max() < 10:
        x = x * 2
    return x


def cuts(x):
    return x.reshape(-1)[: int(x[0, 0].item())]


def counts(x):
    for _ in range(int(x[0, 0])):
        x = x + 1
    return x


def scales(x):
    factor = x.max().item()
    return x * factor  # scales


def averages(x):
    return x * sum(x[0].tolist())


def selects(x):
    return x[x > 0]


def finds(x):
    return x.nonzero()


def leaves_torch(x):
    return x + torch.from_numpy(np.tanh(x.numpy()))


@pytest.mark.parametrize(
    ("function", "error", "line", "hint"),
    [
        (branches, T2NErrorNotImplemented, "if x.sum() > 0:", "torch.where"),
        (repeats, T2NErrorNotImplemented, "while x.max() < 10:", "torch.where"),
        (cuts, T2NErrorNotImplemented, "return x.reshape(-1)[: int(x[0, 0].item())]", "masks"),
        (counts, T2NErrorNotImplemented, "for _ in range(int(x[0, 0])):", "constant"),
        (scales, T2NErrorNotImplemented, "return x * factor  # scales", ".item()"),
        (averages, T2NErrorNotImplemented, "return x * sum(x[0].tolist())", ".tolist()"),
        (selects, T2NErrorDynamicShapeValue, "return x[x > 0]", "torch.where"),
        (finds, T2NErrorDynamicShapeValue, "return x.nonzero()", "masks"),
        (leaves_torch, T2NErrorNotImplemented, "return x + torch.from_numpy(np.tanh(x.numpy()))", "torch function"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_depends_on_values(function, error, line, hint, tmp_path, capfd):
    with pytest.raises(error) as raised:
        export(function, tmp_path)
    assert_reports(raised, line, hint)
    assert "def forward(self, arg0_1" not in capfd.readouterr().err  # torch's listing of half a graph


@pytest.mark.parametrize("value", ["text", 3, None], ids=repr)
def test_outputs_that_are_no_tensors(value, tmp_path):
    if value is None:
        export(lambda x: {"y": x * 2, "no": None}, tmp_path)
        return
    with pytest.raises(T2NErrorNotImplemented, match=f"output 1 of the model is {value!r}"):
        export(lambda x: {"y": x * 2, "z": value}, tmp_path)


def test_an_error_of_the_model_itself_keeps_its_words(tmp_path):
    def fails(x):
        raise KeyError("no such head")

    with pytest.raises(T2NErrorNotImplemented, match="no such head") as raised:
        export(fails, tmp_path)
    assert_reports(raised, 'raise KeyError("no such head")')
    assert isinstance(raised.value.__cause__, KeyError)


def fixes_by_reading(x):
    rows = int(x.shape[0])
    return x.new_tensor(range(rows))[:, None] + x


def fixes_by_reshaping(x):
    return x.reshape(4, 3) + 1


def fixes_by_unrolling(x):
    for row in range(x.shape[0]):
        x = x + row
    return x


def fixes_by_equality(x):
    return x * 2 if x.shape[0] == 4 else x


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (fixes_by_reading, "rows = int(x.shape[0])"),
        (fixes_by_reshaping, "return x.reshape(4, 3) + 1"),
        (fixes_by_unrolling, "for row in range(x.shape[0]):"),
        (fixes_by_equality, "return x * 2 if x.shape[0] == 4 else x"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_dimension_torch_fixed(function, line, tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match="fixed a dimension") as raised:
        export(function, tmp_path)
    assert_reports(raised, line, "axis 'B' (dimension 0 of input 'x') became 4", "hint")


def test_a_size_that_is_one_by_chance_is_not_fixed(tmp_path):
    # Traced at two rows, every other row is one row, which torch would keep as a number.
    export(lambda x: x[::2].reshape(-1)[1:], tmp_path, torch.ones(2, 3))


def fixed_below_a_bound(x):
    if x.shape[0] > 8:
        return x + 1
    return x * int(x.shape[0])


def test_a_larger_trace_that_takes_another_branch_is_no_way_out(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match="fixed a dimension") as raised:
        export(fixed_below_a_bound, tmp_path)
    assert_reports(raised, "return x * int(x.shape[0])", "became 4")


def bounded(x):
    if x.shape[0] > 6:
        return x * 2
    return x + 1


def table(x):
    return x + torch.arange(27.0).reshape(9, 3)[: x.shape[0]]


def even(x):
    return x * 2 if x.shape[0] % 2 == 0 else x


@pytest.mark.parametrize(
    ("function", "assertion", "works", "refused"),
    [
        (bounded, "B <= 6", (1, 5, 6), (7, 12)),
        (table, "B <= 9", (1, 9), (10,)),
        (even, "(B - (2 * (B / 2))) == 0", (2, 8), (3,)),
    ],
    ids=["branch", "length of a table", "modulo"],
)
def test_a_condition_on_sizes_is_asserted(function, assertion, works, refused, tmp_path, caplog):
    path = export(function, tmp_path)
    assert f"extension tract_assert {assertion};" in (path / "graph.nnef").read_text()
    (warning,) = (r for r in caplog.records if r.name.startswith("torch_to_nnef") and r.levelname == "WARNING")
    assert assertion in warning.getMessage()
    assert str(HERE) in warning.getMessage()
    model = TractModel.load(path)
    for size in works:
        x = torch.full((size, 3), 0.5)
        np.testing.assert_allclose(model.run(x)["output"], function(x))
    for size in refused:
        with pytest.raises(T2NErrorInvalidArgument, match="holds only where"):
            model.run(torch.ones(size, 3))


def special(x):
    if x.shape[0] == 7:
        return x
    return x + 1


def test_a_condition_that_cannot_be_asserted_is_refused(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match=r"Ne\(B, 7\)") as raised:
        export(special, tmp_path)
    assert_reports(raised, "if x.shape[0] == 7:", "torch.where")


def test_assertions_of_the_user_bound_the_sizes_it_is_verified_at(tmp_path):
    path = export(lambda x: x + 1, tmp_path, custom_extensions=["tract_assert B <= 4"])
    with pytest.raises(T2NErrorInvalidArgument, match=r"B\D+4"):
        TractModel.load(path).run(torch.ones(5, 3))


class Cache(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))


class InPlace(Cache):
    def forward(self, x):
        self.seen.add_(x[0])  # in place
        return x + self.seen


class Assigned(Cache):
    def forward(self, x):
        self.seen = self.seen + x[0]
        return x + self.seen


class Sliced(Cache):
    def forward(self, x):
        self.seen[1:] = x[0, 1:]
        return x + self.seen


@pytest.mark.parametrize(
    ("cache", "line"),
    [
        (InPlace, "self.seen.add_(x[0])  # in place"),
        (Assigned, "self.seen = self.seen + x[0]"),
        (Sliced, "self.seen[1:] = x[0, 1:]"),
    ],
    ids=["in place", "assigned", "sliced"],
)
def test_state_in_buffers(cache, line, tmp_path):
    model = Outer(None)
    model.blocks[1] = cache()
    with pytest.raises(T2NErrorNotImplemented, match=re.escape("`blocks.1.seen`")) as raised:
        export(model, tmp_path)
    assert_reports(raised, line, "take the old value as an input and return the new one as an output")


class Grown(Cache):
    def forward(self, x):
        self.seen = self.seen if len(self.seen) >= x.shape[1] else torch.zeros(x.shape[1])
        return x + self.seen[: x.shape[1]]


def test_a_buffer_assigned_to_itself_is_no_state(tmp_path):
    model = Outer(None)
    model.blocks[1] = Grown()
    export(model, tmp_path)


def test_torch_cond_computes_both_sides(tmp_path):
    def chooses(x):
        def small(x):
            return torch.cond(x.max() > 1, lambda x: x - 1, lambda x: x.exp(), (x,)), x.sum(1)

        return torch.cond(x.sum() > 4, lambda x: (x * 2, x.amax(1)), small, (x,))

    for scale in (0.1, 1.0, -3.0):
        export(chooses, tmp_path, scale * torch.arange(12.0).reshape(4, 3))


def test_torch_cond_on_a_size_is_refused(tmp_path):
    def chooses(x):
        return torch.cond(x.shape[0] > 5, lambda x: x + 1, lambda x: x * 2, (x,))

    with pytest.raises(T2NErrorNotImplemented, match="cond has no equivalent"):
        export(chooses, tmp_path)
