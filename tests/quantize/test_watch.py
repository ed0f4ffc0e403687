"""What weights are multiplied with is seen however they are used."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_to_nnef.quantize.targets import Target
from torch_to_nnef.quantize.watch import Watch, unfolded
from torch_to_nnef.tensor.quant import quantize_q40

X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
ROWS = X.reshape(-1, 64)


def target(tensor, transposed=False):
    return Target(tensor, (), None, transposed)


def seen_by(run, *targets):
    """`[(target, x, start, count)]` and `[(target, indices)]` of what `run()` computes."""
    products, lookups = [], []
    with torch.no_grad(), Watch(targets, lambda *seen: products.append(seen), lambda *seen: lookups.append(seen)):
        run()
    return products, lookups


MATRIX = torch.randn(32, 64)
WAYS = {
    "linear": lambda w: functional.linear(X, w),
    "linear, bias": lambda w: functional.linear(X, w, torch.zeros(32)),
    "linear, bias, input not contiguous": lambda w: functional.linear(X.transpose(0, 1), w, torch.zeros(32)),
    "linear of vectors": lambda w: [functional.linear(row, w) for row in ROWS],
    "matrix times vector": lambda w: [w @ row for row in ROWS],
    "x @ w.T": lambda w: X @ w.T,
    "w @ x": lambda w: w @ X.mT,
    "einsum": lambda w: torch.einsum("btk,nk->nbt", X, w),
    "a view": lambda w: functional.linear(X, w.view(2, 16, 64).flatten(0, 1)),
    "addmm": lambda w: torch.addmm(torch.zeros(32), ROWS, w.t()),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_a_matrix_in_any_form(way, mode):
    def run():
        with mode():
            WAYS[way](MATRIX)

    products, lookups = seen_by(run, known := target(MATRIX))
    assert not lookups
    assert all((t, start, count) == (known, 0, 1) for t, _, start, count in products)
    inputs = torch.cat([x for _, x, _, _ in products])
    assert inputs.shape == (6, 1, 64)
    moments = inputs[:, 0].T @ inputs[:, 0]
    assert torch.allclose(moments, ROWS.T @ ROWS, atol=1e-4)


def test_conv1d_of_gpt2_is_seen_transposed():
    weight = torch.randn(64, 32)
    products, _ = seen_by(lambda: torch.addmm(torch.zeros(32), ROWS, weight), target(weight, transposed=True))
    assert torch.equal(products[0][1][:, 0], ROWS)
    square = torch.randn(64, 64)
    assert not seen_by(lambda: functional.linear(X, square), target(square, transposed=True))[0]


def test_views_are_told_apart():
    whole = torch.randn(96, 64)
    first, second = target(whole[:32]), target(whole[32:])
    products, _ = seen_by(lambda: functional.linear(X, whole[32:]), first, second)
    assert [t for t, *_ in products] == [second]
    assert not seen_by(lambda: functional.linear(X[..., :32], MATRIX[:, :32]), target(MATRIX))[0]


def test_attention_of_torch():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(64, 2, batch_first=True)
    attended, memory = torch.randn(1, 3, 64), torch.randn(1, 5, 64)
    packed, out = target(layer.in_proj_weight), target(layer.out_proj.weight)
    products, _ = seen_by(lambda: layer(attended, attended, attended), packed, out)
    assert [t for t, *_ in products] == [packed, out]
    assert torch.equal(products[0][1][:, 0], attended[0])
    products, _ = seen_by(lambda: layer(attended, memory, memory), packed)
    assert [len(x) for _, x, *_ in products] == [3, 5]


def test_experts_one_by_one_batched_and_grouped():
    stack = torch.randn(4, 32, 64)
    known = target(stack)
    products, _ = seen_by(lambda: [functional.linear(ROWS[:2], stack[3]), functional.linear(ROWS, stack[1])], known)
    assert [(x.shape, start, count) for _, x, start, count in products] == [((2, 1, 64), 3, 4), ((6, 1, 64), 1, 4)]

    batched = torch.randn(4, 5, 64)
    ((_, x, start, count),), _ = seen_by(lambda: batched @ stack.mT, known)
    assert (start, count) == (0, 4)
    assert torch.equal(x, batched.transpose(0, 1))
    kept = target(stack.mT.contiguous(), transposed=True)
    ((_, x, _, _),), _ = seen_by(lambda: batched @ kept.tensor, kept)
    assert torch.equal(x, batched.transpose(0, 1))


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="newer torch")
def test_grouped_experts():
    stack, ends = torch.randn(4, 32, 64), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    products, _ = seen_by(lambda: functional.grouped_mm(ROWS, stack.mT, offs=ends), target(stack))
    assert [(start, count) for _, _, start, count in products] == [(0, 4), (2, 4), (3, 4)]
    assert torch.equal(torch.cat([x for _, x, _, _ in products])[:, 0], ROWS)


def test_embedding_and_tied_head():
    table = torch.randn(10, 64)
    tokens = torch.tensor([[1, 2, 1]])
    known = target(table)
    products, lookups = seen_by(lambda: functional.linear(functional.embedding(tokens, table), table), known)
    assert torch.equal(products[0][1][:, 0], table[tokens[0]])
    assert torch.equal(lookups[0][1], tokens)


CONVOLUTIONS = [
    (nn.Conv2d, (6, 8, 3), {}, (9, 11)),
    (nn.Conv2d, (6, 8, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}, (9, 11)),
    (nn.Conv2d, (6, 12, 3), {"padding": "same", "groups": 3, "padding_mode": "reflect"}, (5, 6)),
    (nn.Conv1d, (6, 8, 5), {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}, (30,)),
    (nn.Conv1d, (6, 8, 4), {"padding": "same"}, (13,)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("kind", "sizes", "options", "space"), CONVOLUTIONS)
def test_what_a_convolution_sums_is_its_product_with_the_unfolded_inputs(kind, sizes, options, space):
    """The oracle is torch's convolution: rows of the weight times what was seen must give its outputs."""
    torch.manual_seed(0)
    layer = kind(*sizes, **options, bias=False)
    x = torch.randn(2, 6, *space)
    ((_, inputs, start, count),), _ = seen_by(lambda: layer(x), target(layer.weight))
    groups = options.get("groups", 1)
    assert (start, count) == (0, groups)
    rows = layer.weight.detach().flatten(1).reshape(groups, -1, inputs.shape[-1])
    outputs = torch.einsum("rgk,gnk->rgn", inputs, rows).flatten(1)
    expected = layer(x).detach().movedim(1, -1).flatten(0, -2)
    assert torch.allclose(outputs, expected, atol=1e-5)


def test_many_positions_are_thinned_evenly(monkeypatch):
    x = torch.arange(2.0 * 100).reshape(2, 1, 100)
    monkeypatch.setattr("torch_to_nnef.quantize.watch._MOST", 4 * 50)
    inputs = unfolded(x, [1], [[1], [0], [1]], 1).flatten()
    assert torch.equal(inputs, torch.arange(0.0, 200, 4))


def test_transposed_convolutions_are_left_out():
    layer = nn.ConvTranspose2d(4, 4, 3)
    assert seen_by(lambda: layer(torch.randn(1, 4, 5, 5)), target(layer.weight)) == ([], [])


def test_packed_weights_and_meta_tensors_are_passed_by():
    packed = quantize_q40(MATRIX)
    products, _ = seen_by(lambda: functional.linear(functional.linear(X, packed), torch.randn(64, 32)), target(packed))
    assert not products
    assert not seen_by(lambda: functional.linear(X.to("meta"), MATRIX.to("meta")), target(MATRIX.to("meta")))[0]
