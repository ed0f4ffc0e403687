"""Dynamic dimensions: what a model computes from its sizes, run in tract at other sizes than traced."""

import math

import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorDynamicShapeValue,
    T2NErrorInvalidArgument,
)
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.tract_model import TractModel

F = nn.functional


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def export(folder, function, *inputs, axes, **options):
    model = function if isinstance(function, nn.Module) else Call(function)
    names = [f"args_{i}" for i in range(len(inputs))]
    target = TractNNEF.latest(dynamic_axes=dict(zip(names, axes, strict=True)))
    return export_model_to_nnef(
        model, inputs, folder / "m.nnef", target, input_names=names, compression_level=None, **options
    )


def run(path, function, *inputs):
    """The archive at these sizes, against torch."""
    with torch.no_grad():
        expected = function(*inputs)
    (actual,) = TractModel.load(path).run(*(i.numpy() for i in inputs)).values()
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=5e-4, atol=1e-4)


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# name -> (function of x [B, S], the smallest S it takes)
OF_ONE = {
    "double": (lambda x: torch.cat([x, x], 1), 1),
    "plus constant": (lambda x: F.pad(x, (1, 2)), 1),
    "half": (lambda x: x[:, : x.shape[1] // 2], 2),
    "other half": (lambda x: x[:, x.shape[1] // 2 :], 1),
    "every second": (lambda x: x[:, ::2], 1),
    "every second, from one": (lambda x: x[:, 1::2], 2),
    "all but one": (lambda x: x[:, 1:] - x[:, :-1], 2),
    "all but the last": (lambda x: x[:, :-1], 2),
    "last": (lambda x: x[:, -1], 1),
    "last three": (lambda x: x[:, -3:], 3),
    "convolution of stride 2": (lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3), stride=2, padding=1), 1),
    "convolutions of stride 2": (
        lambda x: F.conv1d(
            F.conv1d(x[:, None], torch.ones(1, 1, 3), stride=2, padding=1), torch.ones(1, 1, 3), stride=2, padding=1
        ),
        1,
    ),
    "pool": (lambda x: F.max_pool1d(x[:, None], 2), 2),
    "chunks": (lambda x: x.chunk(2, 1)[0], 3),
    "second chunk": (lambda x: x.chunk(2, 1)[1], 3),
    "split": (lambda x: x.split(x.shape[1] // 2, 1)[0], 4),
    "rest of four": (lambda x: F.pad(x, (0, x.shape[1] % 4)) * 2, 1),
    "up to a multiple of four": (lambda x: F.pad(x, (0, -x.shape[1] % 4)), 1),
    "up to a multiple of seven": (lambda x: F.pad(x, (0, (7 - x.shape[1] % 7) % 7)), 1),
    "rounded up": (lambda x: x[:, : math.ceil(x.shape[1] / 2)], 1),
    "at least four": (lambda x: x.new_ones(max(x.shape[1], 4)) * 2, 1),
    "at most four": (lambda x: x[:, : min(x.shape[1], 4)], 1),
    "square": (lambda x: x.new_ones(x.shape[1] ** 2) * 2, 1),
    "outer": (lambda x: (x[:, :, None] * x[:, None, :]).flatten(1), 1),
    "merged axes": (lambda x: x.reshape(-1) * 2, 1),
    "merged axes and back": (lambda x: (x.reshape(-1) * 2).reshape(x.shape), 1),
    "pairs": (lambda x: torch.cat([x, x], 1).view(x.shape[0], -1, 2).sum(-1), 1),
    "transposed": (lambda x: x.t().reshape(-1, 1), 1),
    "expanded": (lambda x: x[:, None].expand(-1, x.shape[1], -1) * 2, 1),
    "repeated": (lambda x: x.repeat(2, 3), 1),
    "repeated by itself": (lambda x: x[:1, :1].repeat(x.shape[0], x.shape[1]), 1),
    "interpolated": (lambda x: F.interpolate(x[:, None], scale_factor=2.0), 1),
    "stacked": (lambda x: torch.stack([x, x], 1).flatten(1), 1),
    "positions": (lambda x: x + torch.arange(x.shape[1]), 1),
    "positions, as many as halves": (lambda x: torch.arange(x.shape[1] // 2) * 2, 2),
    "positions from the middle": (lambda x: torch.arange(x.shape[1] // 2, x.shape[1]) * 2, 1),
    "relative positions": (lambda x: torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None], 1),
    "causal mask": (lambda x: torch.ones(x.shape[1], x.shape[1]).tril() * x[:1], 1),
    "mean": (lambda x: x.sum(1) / x.shape[1], 1),
    "scaled": (lambda x: x * x.shape[1] ** -0.5, 1),
    "root": (lambda x: x / math.sqrt(x.shape[1]), 1),
    "ratio": (lambda x: x * (x.shape[0] / x.shape[1]), 1),
    "size as a tensor": (lambda x: x + torch.tensor(x.shape[1]), 1),
    "size of the other axis": (lambda x: x + x.shape[0], 1),
    "full of a size": (lambda x: torch.full((2,), x.shape[1]) * 2, 1),
    "windows": (lambda x: F.pad(x, (0, -x.shape[1] % 4)).view(x.shape[0], -1, 4).mean(-1), 1),
    "gathered": (lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)], 1),
}


def test_samples_may_be_slices_of_a_data_set(tmp_path):
    images = torch.randn(9, 3, 8)
    path = export(tmp_path, nn.Conv1d(3, 4, 3), images[5:8], axes=[{0: "B"}])
    assert TractModel.load(path).run(images)["output"].shape == (9, 4, 6)


@pytest.mark.parametrize("name", OF_ONE)
def test_sizes_of_one_input(name, tmp_path):
    function, smallest = OF_ONE[name]
    path = export(tmp_path, function, x(2, 8), axes=[{0: "B", 1: "S"}])
    for batch, length in ((1, 1), (3, 2), (1, 3), (2, 7), (5, 16), (1, 17), (4, 30)):
        if length >= smallest:
            run(path, function, x(batch, length))


S, P, BS = {1: "S"}, {1: "P"}, {0: "B", 1: "S"}

# name -> (function, axes of each input, sizes of the samples, other sizes)
OF_SEVERAL = {
    "one size on two inputs": (torch.add, [S, S], [(2, 5), (2, 5)], [[(2, n), (2, n)] for n in (1, 2, 9)]),
    "a cache": (
        lambda x, past: torch.cat([past, x], 1).cumsum(1),
        [S, P],
        [(2, 3), (2, 4)],
        [[(2, s), (2, p)] for s, p in ((1, 0), (5, 0), (1, 1), (1, 7), (4, 2))],
    ),
    "an empty cache": (
        lambda x, past: torch.cat([past, x], 1).softmax(1),
        [S, P],
        [(2, 3), (2, 0)],
        [[(2, s), (2, p)] for s, p in ((1, 0), (2, 1), (1, 7))],
    ),
    "the new end of a cache": (
        lambda x, past: torch.cat([past, x], 1)[:, past.shape[1] :] * 2,
        [S, P],
        [(2, 3), (2, 4)],
        [[(2, s), (2, p)] for s, p in ((1, 0), (5, 0), (1, 1), (1, 7), (4, 2))],
    ),
    "a part of a table, by both sizes": (
        lambda x, past: torch.arange(40.0)[past.shape[1] : past.shape[1] + x.shape[1]] * x,
        [S, P],
        [(2, 3), (2, 4)],
        [[(2, s), (2, p)] for s, p in ((1, 0), (5, 0), (1, 1), (1, 7), (4, 2))],
    ),
    "a mask over cache and input": (
        lambda x, past, mask: torch.where(mask > 0, torch.cat([past, x], 1), -1.0),
        [S, P, {1: "P+S"}],
        [(2, 3), (2, 4), (2, 7)],
        [[(2, s), (2, p), (2, s + p)] for s, p in ((1, 0), (1, 1), (5, 2), (2, 9))],
    ),
    "a mask that comes first": (
        lambda mask, x, past: torch.where(mask > 0, torch.cat([past, x], 1), -1.0),
        [{1: "P+S"}, S, P],
        [(2, 7), (2, 3), (2, 4)],
        [[(2, s + p), (2, s), (2, p)] for s, p in ((1, 0), (1, 1), (5, 2), (2, 9))],
    ),
    "twice as long": (
        lambda x, y: x.view(2, -1, 2).sum(-1) + y,
        [{1: "2*S"}, S],
        [(2, 6), (2, 3)],
        [[(2, 2 * n), (2, n)] for n in (1, 2, 9)],
    ),
    "twice, alone": (lambda x: x.view(2, -1, 2).sum(-1), [{1: "2*S"}], [(2, 6)], [[(2, 2 * n)] for n in (1, 2, 9)]),
    "one more": (
        lambda x, y: x[:, 1:] + y,
        [{1: "S+1"}, S],
        [(2, 6), (2, 5)],
        [[(2, n + 1), (2, n)] for n in (1, 2, 9)],
    ),
    "longest of two": (
        lambda x, y: x.new_ones(max(x.shape[1], y.shape[1])) * 2,
        [S, P],
        [(2, 6), (2, 3)],
        [[(2, 1), (2, 5)], [(2, 8), (2, 2)], [(2, 3), (2, 3)]],
    ),
    "outer": (
        lambda x, y: (x[:, :, None] * y[:, None, :]).reshape(2, -1),
        [S, P],
        [(2, 6), (2, 3)],
        [[(2, 1), (2, 5)], [(2, 8), (2, 1)], [(2, 3), (2, 3)]],
    ),
    "queries and keys": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        [S, P],
        [(2, 6, 4), (2, 3, 4)],
        [[(2, 1, 4), (2, 5, 4)], [(2, 8, 4), (2, 1, 4)], [(2, 3, 4), (2, 3, 4)]],
    ),
}


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_sizes_of_several_inputs(name, tmp_path):
    function, axes, samples, others = OF_SEVERAL[name]
    path = export(tmp_path, function, *(x(*shape) for shape in samples), axes=axes)
    for shapes in others:
        run(path, function, *(x(*shape) for shape in shapes))


class UNet(nn.Module):
    """Halved twice and doubled twice: torch adds the skips at multiples of four only."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 1, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(1, 1, 2, stride=2)

    def forward(self, x):
        a = self.down(x)
        b = self.down(a)
        return self.up(a + self.up(b)) + x


def test_sizes_that_the_model_takes_are_found(tmp_path):
    model = UNet().eval()
    path = export(tmp_path, model, x(1, 1, 8, 16), axes=[{2: "H", 3: "W"}])
    for height, width in ((4, 4), (12, 8), (32, 20)):
        run(path, model, x(1, 1, height, width))


def test_a_size_that_is_assumed_larger_is_checked_where_it_is(tmp_path, caplog):
    path = export(tmp_path, lambda x: x[:, -3:] * 2, x(2, 8), axes=[S])
    run(path, lambda x: x[:, -3:] * 2, x(2, 3))
    assert "-S <= -3" in caplog.text


@pytest.mark.parametrize(
    ("function", "assertion"),
    [
        (lambda x: x[:, : int(x.shape[1] * 0.5)] * 2, "(S / 2) == 4"),
        (lambda x: x * 2 if x.shape[1] > 5 else x, "S > 5"),
        (lambda x: x * 2 if x.shape[1] < 50 else x, "S < 50"),
        (lambda x: x * 2 if x.shape[1] % 4 == 0 else x, "(S - (4 * (S / 4))) == 0"),
    ],
    ids=["a rounded size", "a smallest size", "a largest size", "a branch on the rest"],
)
def test_code_that_reads_a_size_is_named_and_asserted(function, assertion, tmp_path, caplog):
    path = export(tmp_path, function, x(2, 8), axes=[S])
    assert f"extension tract_assert {assertion};" in (path / "graph.nnef").read_text()
    assert f"holds only where {assertion}" in caplog.text
    assert "test_dynamic.py" in caplog.text


def test_a_size_that_must_divide_is_to_be_said_by_its_name(tmp_path):
    def halves(x):
        return x.reshape(x.shape[0], x.shape[1] // 2, 2).sum(-1)

    with pytest.raises(T2NErrorDynamicShapeValue, match="only where a size divides; say so by its name"):
        export(tmp_path, halves, x(2, 8), axes=[S])
    path = export(tmp_path, halves, x(2, 8), axes=[{1: "2*S"}])
    run(path, halves, x(2, 2))


def test_a_branch_that_cannot_be_asserted_is_refused(tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match=r"Ne\(S, 7\), which an archive cannot state"):
        export(tmp_path, lambda x: x if x.shape[1] == 7 else x * 2, x(2, 8), axes=[S])
    assert not any(tmp_path.iterdir())


def test_a_branch_is_right_where_it_is_asserted(tmp_path):
    extensions = ["tract_assert S > 5", "tract_assert S <= 12"]
    path = export(tmp_path, lambda x: x * 2 if x.shape[1] > 5 else x, x(2, 8), axes=[S], custom_extensions=extensions)
    assert "extension tract_assert S > 5;" in (path / "graph.nnef").read_text()


@pytest.mark.parametrize("assertion", ["S <= 8", "S == 8"])
def test_an_assertion_may_not_leave_the_samples_alone(assertion, tmp_path):
    options = {"custom_extensions": [f"tract_assert {assertion}"]}
    if assertion == "S <= 8":
        export(tmp_path, torch.relu, x(2, 8), axes=[S], **options)
        return
    with pytest.raises(T2NErrorDynamicShapeValue, match="no size but that of the samples"):
        export(tmp_path, torch.relu, x(2, 8), axes=[S], **options)


@pytest.mark.parametrize(
    ("assertion", "error", "message"),
    [
        ("S <= 4", T2NErrorDynamicShapeValue, "sample inputs are not as asserted: S=8"),
        ("S is small", T2NErrorInvalidArgument, "write one relation"),
        ("2 * S / 3 > 1", T2NErrorInvalidArgument, "write one relation"),
        ("min(S, 2) > 1", T2NErrorInvalidArgument, "write one relation"),
    ],
)
def test_assertions_that_do_not_fit(assertion, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(tmp_path, torch.relu, x(2, 8), axes=[S], custom_extensions=[f"tract_assert {assertion}"])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([{1: "S*P"}, {}], "sum of multiples of names"),
        ([{1: "3"}, {}], "sum of multiples of names"),
        ([{1: "2*S"}, S], "has size 16 by its parts but 8"),
        ([{1: "S+P"}, {}], "leaves .* open"),
        ([{1: "3*S"}, {}], "has size 8, which '3\\*S' is for no S"),
        ([{1: "args_0"}, {}], "not a free identifier"),
    ],
)
def test_axes_that_do_not_fit(axes, message, tmp_path):
    with pytest.raises(T2NErrorDynamicShapeValue, match=message):
        export(tmp_path, lambda x, y: x.sum() + y.sum(), x(2, 8), x(2, 8), axes=axes)


@pytest.mark.parametrize(
    ("function", "axes", "message"),
    [
        (
            lambda x, y: torch.cat([x, x], 1) + y,
            [S, {1: "T"}],
            r"is 'T' in dynamic_axes, but the model needs it to be 2\*S",
        ),
        (torch.add, [S, {1: "T"}], r"axis 1 of 'args_1' is 'T' in dynamic_axes, but the model needs it to be S"),
    ],
)
def test_an_axis_that_follows_from_another_says_so(function, axes, message, tmp_path):
    y = x(2, 16) if "2" in message else x(2, 8)
    with pytest.raises(T2NErrorDynamicShapeValue, match=message):
        export(tmp_path, function, x(2, 8), y, axes=axes)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:, : round(x.shape[1] * 0.5)], "computed in floating point"),
        (lambda x: x[:, : math.ceil(x.shape[1] * 0.3)], "computed in floating point"),
        (lambda x: x * math.log(x.shape[1]), "asked to be dynamic"),
        (lambda x: torch.linspace(0, 1, x.shape[1]) * x, "asked to be dynamic"),
        (lambda x: x * (x.shape[1] > 3), "read out of a tensor"),
        (lambda x: x[x > 0], "depends on the data"),
    ],
    ids=["round", "ceil of a float", "log", "linspace", "comparison as a number", "data"],
)
def test_what_cannot_be_said_of_a_size(function, message, tmp_path):
    with pytest.raises(T2NError, match=message):
        export(tmp_path, function, x(2, 8), axes=[S])
    assert not any(tmp_path.iterdir())
