"""Which channels can be scaled: every legal pattern gives its fold, and the model computes the same; the others give none."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.folds import find_folds
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.quantize.scaling import apply_fold
from torch_to_nnef.tensor.quant import quantize_q40

WIDTH = 32


class Net(nn.Module):
    """Modules by name, and a forward that is given."""

    def __init__(self, call, **modules):
        super().__init__()
        for name, module in copy.deepcopy(modules).items():
            (self.register_parameter if isinstance(module, nn.Parameter) else self.add_module)(name, module)
        self.call = call
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)

    def forward(self, x):
        return self.call(self, x)


def lin(n=WIDTH, k=WIDTH, **kw):
    return nn.Linear(k, n, **kw)


def vector(n=WIDTH, *shape):
    return nn.Parameter(torch.empty(n, *shape))


def folds_of(model, x, carried=None, axes=None):
    model.eval()
    return find_folds(captured_graph(model, prepare(model, (x,), ["x"], axes))[1], carried)


def sides(fold):
    def names(side):
        return " ".join(s.fqn.replace("weight", "w").replace("bias", "b") for s in side)

    return f"{names(fold.producers)} -> {names(fold.consumers)}"


def rms(x, weight, offset=0.0):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (offset + weight)


def attention(m, x, heads, shared):
    def split(y, n):
        return y.view(*y.shape[:2], n, -1).transpose(1, 2)

    q, k, v = split(m.q(x), heads), split(m.k(x), heads // shared), split(m.v(x), heads // shared)
    k, v = (y[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for y in (k, v))
    return m.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def eager_attention(m, x):
    return m.o(torch.softmax(m.q(x) @ m.k(x).mT, -1) @ m.v(x))


def self_attention(m, x):
    return m.after(m.mha(x, x, x, need_weights=False)[0])


def tied(m, x):
    return F.linear(m.n(x) + m.e((x[..., 0] > 0.5).long()), m.e.weight)


QKVO = {"q": lin(), "k": lin(WIDTH // 2), "v": lin(WIDTH // 2), "o": lin()}
ABC = {"a": lin(), "b": lin(), "c": lin()}
IMAGE = torch.rand(2, 8, 12, 12, generator=torch.Generator().manual_seed(2))
CONVS = {"a": nn.Conv2d(8, 16, 3, padding=1), "b": nn.Conv2d(16, 8, 3), "bn": nn.BatchNorm2d(16)}

# Name -> (call, modules, what folds there are).
LEGAL = {
    "linears": (lambda m, x: m.b(m.a(x)), ABC, ["a.w a.b -> b.w"]),
    "without biases": (lambda m, x: m.b(m.a(x)), {"a": lin(bias=False), "b": lin(bias=False)}, ["a.w -> b.w"]),
    "relu": (lambda m, x: m.c(F.leaky_relu(m.b(F.relu(m.a(x))))), ABC, ["a.w a.b -> b.w", "b.w b.b -> c.w"]),
    "dropout": (lambda m, x: m.b(F.dropout(m.a(x), training=m.training)), ABC, ["a.w a.b -> b.w"]),
    "gate and up": (lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), ABC, ["b.w b.b -> c.w"]),
    "of two factors one": (lambda m, x: m.c(F.relu(m.a(x)) * m.b(x)), ABC, ["b.w b.b -> c.w"]),
    "fused gate and up": (
        lambda m, x: m.b((lambda g, u: F.silu(g) * u)(*m.a(x).chunk(2, -1))),
        {"a": lin(2 * WIDTH), "b": lin()},
        ["a.w a.b -> b.w"],
    ),
    "layer norm, two readers": (
        lambda m, x: (lambda y: m.a(y) + m.b(y))(m.n(x)),
        {**ABC, "n": nn.LayerNorm(WIDTH)},
        ["n.w n.b -> a.w b.w"],
    ),
    "layer norm without bias": (
        lambda m, x: m.a(m.n(x)),
        {**ABC, "n": nn.LayerNorm(WIDTH, bias=False)},
        ["n.w -> a.w"],
    ),
    "rms norm": (lambda m, x: m.a(m.n(x)), {**ABC, "n": nn.RMSNorm(WIDTH)}, ["n.w -> a.w"]),
    "rms norm spelled out": (lambda m, x: m.a(rms(x, m.n)), {**ABC, "n": vector()}, ["n -> a.w"]),
    "rms norm of 1 + weight": (lambda m, x: m.a(rms(x, m.n, 1.0)), {**ABC, "n": vector()}, ["n -> a.w"]),
    "a bias of its own": (lambda m, x: m.a(x * m.n + m.p), {**ABC, "n": vector(), "p": vector()}, ["n p -> a.w"]),
    "matmul": (lambda m, x: (x @ m.p) @ m.r, {"p": vector(WIDTH, WIDTH), "r": vector(WIDTH, 7)}, ["p -> r"]),
    "addmm": (
        lambda m, x: torch.addmm(m.s, x[0], m.p) @ m.r,
        {"p": vector(WIDTH, WIDTH), "r": vector(WIDTH, 7), "s": vector()},
        ["p s -> r"],
    ),
    "linear of .t()": (lambda m, x: F.linear(m.a(x), m.p.t()), {**ABC, "p": vector(WIDTH, 7)}, ["a.w a.b -> p"]),
    "values": (lambda m, x: attention(m, x, 4, 1), {**QKVO, "k": lin(), "v": lin()}, ["v.w v.b -> o.w"]),
    "grouped values": (lambda m, x: attention(m, x, 4, 2), QKVO, ["v.w v.b -> o.w"]),
    "attention spelled out": (eager_attention, {**QKVO, "k": lin(), "v": lin()}, ["v.w v.b -> o.w"]),
    "in_proj": (
        self_attention,
        {"mha": nn.MultiheadAttention(WIDTH, 4, batch_first=True), "after": lin()},
        # Of what is stacked in in_proj the values; the output projection feeds a linear layer here.
        ["mha.in_proj_w mha.in_proj_b -> mha.out_proj.w", "mha.out_proj.w mha.out_proj.b -> after.w"],
    ),
    "two addends": (lambda m, x: m.c(m.a(x) + m.b(x)), ABC, ["a.w a.b b.w b.b -> c.w"]),
    "joined": (lambda m, x: m.d(torch.cat([m.a(x), m.b(x)], -1)), {**ABC, "d": lin(7, 2 * WIDTH)}, ["a.w a.b b.w b.b -> d.w"]),
    "one half of it": (lambda m, x: m.b(torch.cat([m.a(x), x], -1)), {**ABC, "b": lin(7, 2 * WIDTH)}, ["a.w a.b -> b.w"]),
    "the mean of tokens": (lambda m, x: m.b(m.a(x).mean(1)), ABC, ["a.w a.b -> b.w"]),
    "a layer used twice": (lambda m, x: m.b(m.a(x)) + m.b(m.a(2 * x)), ABC, ["a.w a.b -> b.w"]),
    "only its shape is read": (
        lambda m, x: (lambda y: m.b(y) + torch.ones_like(y))(m.a(x)),
        ABC,
        ["a.w a.b -> b.w"],
    ),
    "embedding": (
        lambda m, x: m.a(m.e((x > 0.5).long().flatten(1))),
        {**ABC, "e": nn.Embedding(2, WIDTH)},
        ["e.w -> a.w"],
    ),
    "chosen tokens": (lambda m, x: m.a(m.n(x)[:, (x[0, :3, 0] > 2).long()]), {**ABC, "n": nn.LayerNorm(WIDTH)}, ["n.w n.b -> a.w"]),
}  # fmt: skip
LEGAL_IMAGES = {
    "conv, relu, conv": (lambda m, x: m.b(F.relu(m.a(x))), CONVS, ["a.w a.b -> b.w"]),
    "batch norm": (lambda m, x: m.b(F.relu(m.bn(m.a(x)))), CONVS, ["bn.w bn.b -> b.w"]),
    "pooling": (
        lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(m.a(F.pad(x, (1, 1, 1, 1))), 2), 2)),
        CONVS,
        ["a.w a.b -> b.w"],
    ),
    "padding": (lambda m, x: m.b(F.pad(m.a(x), (2, 1, 0, 1))), CONVS, ["a.w a.b -> b.w"]),
    "residual": (
        lambda m, x: m.b((lambda y: y + m.c(F.relu(m.bn(y))))(m.a(x))),
        {**CONVS, "c": nn.Conv2d(16, 16, 1)},
        # Batch norm reads the sum, which so has no factor; what it makes itself has.
        ["bn.w bn.b -> c.w"],
    ),
    "residual without norms": (
        lambda m, x: m.b((lambda y: y + m.d(F.relu(m.c(y))))(m.a(x))),
        {**CONVS, "c": nn.Conv2d(16, 16, 1), "d": nn.Conv2d(16, 16, 1)},
        ["c.w c.b -> d.w", "a.w a.b d.w d.b -> c.w b.w"],
    ),
    "flattened into a linear": (
        lambda m, x: m.l(F.adaptive_avg_pool2d(m.a(x), 2).flatten(1)),
        {**CONVS, "l": lin(7, 64)},
        ["a.w a.b -> l.w"],
    ),
    "scale a channel": (
        lambda m, x: m.b(m.a(x) * torch.sigmoid(m.c(x))),
        {**CONVS, "c": nn.Conv2d(8, 16, 3, padding=1)},
        ["a.w a.b -> b.w"],
    ),
}
ILLEGAL = {
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), ABC),
    "silu": (lambda m, x: m.b(F.silu(m.a(x))), ABC),
    "relu6": (lambda m, x: m.b(F.relu6(m.a(x))), ABC),
    "an output": (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), ABC),
    "a part of an output": (lambda m, x: (lambda y: (m.b(y), y[:1, :1, :]))(m.a(x)), ABC),
    "a residual reads it too": (lambda m, x: (lambda y: m.a(y) + y)(m.n(x)), {**ABC, "n": nn.LayerNorm(WIDTH)}),
    "a number is added": (lambda m, x: m.b(m.a(x) + 1), ABC),
    "one addend is an input": (lambda m, x: m.b(m.a(x) + x), ABC),
    "a table of positions": (lambda m, x: m.b(m.a(x) + m.p), {**ABC, "p": vector(5, WIDTH)}),
    "a norm without weights": (lambda m, x: m.b(m.n(m.a(x))), {**ABC, "n": nn.LayerNorm(WIDTH, elementwise_affine=False)}),
    "softmax": (lambda m, x: m.b(torch.softmax(m.a(x), -1)), ABC),
    "square": (lambda m, x: m.b(m.a(x) ** 2), ABC),
    "a divisor": (lambda m, x: m.b(x / m.a(x)), ABC),
    "queries and keys": (lambda m, x: m.a(x) @ m.b(x).mT, ABC),
    "compared": (lambda m, x: m.b((m.a(x) > 1).float()), ABC),
    "filled with a number": (lambda m, x: m.b(m.a(x).masked_fill(x > 0.5, -1.0)), ABC),
    "tied with an embedding": (tied, {"n": nn.LayerNorm(WIDTH), "e": nn.Embedding(7, WIDTH)}),
    "the weight is read otherwise": (lambda m, x: m.b(m.a(x)) + m.b.weight.sum(), ABC),
    "the norm is read otherwise": (lambda m, x: m.a(m.n(x)) + m.n.weight, {**ABC, "n": nn.LayerNorm(WIDTH)}),
    "one weight as [N, K] and [K, N]": (lambda m, x: F.linear(m.a(x), m.p) + x @ m.p, {**ABC, "p": vector(WIDTH, WIDTH)}),
    "with an offset and without": (lambda m, x: m.a(x * (1 + m.n)) + m.b(x * m.n), {**ABC, "n": vector()}),
    "rolled over channels and added": (lambda m, x: m.b((lambda y: y + y.roll(1, -1))(m.a(x) + x)), ABC),
}  # fmt: skip
ILLEGAL_IMAGES = {
    "groups": (lambda m, x: m.c(m.a(x)), {**CONVS, "c": nn.Conv2d(16, 16, 3, groups=2)}),
    "transposed conv": (lambda m, x: m.c(m.a(x)), {**CONVS, "c": nn.ConvTranspose2d(16, 8, 2)}),
    "padded with a number": (lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=0.5)), CONVS),
    "instance norm without weights": (lambda m, x: m.b(F.instance_norm(m.a(x))), CONVS),
}
CASES = [
    *((LEGAL[k][:2], torch.rand(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)), LEGAL[k][2]) for k in LEGAL),
    *((LEGAL_IMAGES[k][:2], IMAGE, LEGAL_IMAGES[k][2]) for k in LEGAL_IMAGES),
]


@pytest.mark.parametrize(("net", "x", "expected"), CASES, ids=[*LEGAL, *LEGAL_IMAGES])
def test_legal(net, x, expected):
    model = Net(net[0], **net[1])
    folds = folds_of(model, x)
    assert sorted(map(sides, folds)) == sorted(expected)
    with torch.no_grad():
        before = model(x)
        generator = torch.Generator().manual_seed(3)
        undo = []
        for fold in folds:
            factors = torch.exp(torch.randn(fold.channels, generator=generator))
            undo.append(apply_fold(model, fold, factors))
        # Three roundings a weight; what is added up has 500 terms at most, all of one sign.
        torch.testing.assert_close(model(x), before, rtol=2e-5, atol=2e-5)
        for step in reversed(undo):
            step.undo()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("net", ILLEGAL.values(), ids=ILLEGAL)
def test_illegal(net):
    assert folds_of(Net(net[0], **net[1]), torch.rand(2, 5, WIDTH)) == ()


@pytest.mark.parametrize("net", ILLEGAL_IMAGES.values(), ids=ILLEGAL_IMAGES)
def test_illegal_in_images(net):
    assert folds_of(Net(net[0], **net[1]), IMAGE) == ()


def test_every_fold_is_wrong_for_other_channels():
    """The test above sees what it should: a fold with one consumer left out changes the outputs."""
    call, modules, _ = LEGAL["layer norm, two readers"]
    model, x = Net(call, **modules), torch.rand(2, 5, WIDTH)
    (fold,) = folds_of(model, x)
    before = model(x)
    apply_fold(model, type(fold)(fold.producers, fold.consumers[:1], fold.channels), torch.full((WIDTH,), 2.0))
    assert not torch.allclose(model(x), before, rtol=1e-2)


def test_heads_that_share_keys_and_values_share_factors():
    """4 heads of 8 features, two a pair of keys and values: columns of `o` read rows 0..7, 0..7, 8..15, 8..15 of `v`."""
    call, modules, _ = LEGAL["grouped values"]
    (fold,) = folds_of(Net(call, **modules), torch.rand(2, 5, WIDTH))
    assert fold.channels == 16
    assert fold.producers[0].channels == tuple(range(16))
    assert fold.consumers[0].channels == (*range(8), *range(8), *range(8, 16), *range(8, 16))


def test_only_values_of_a_stacked_projection():
    call, modules, _ = LEGAL["in_proj"]
    fold = folds_of(Net(call, **modules), torch.rand(2, 5, WIDTH))[0]
    assert fold.producers[0].channels == (-1,) * 2 * WIDTH + tuple(range(WIDTH))


def test_a_state_that_is_carried_may_be_scaled():
    def call(m, x):
        past = torch.cat([x, m.v(x[:, :1])], 1)
        return m.o(past), past

    model, x = Net(call, v=lin(), o=lin()), torch.rand(2, 5, WIDTH)
    assert folds_of(model, x, axes={"x": {1: "P"}}) == ()
    assert folds_of(model, x, {0: 0}, {"x": {1: "P"}}) == ()  # the first output is what `o` makes
    # The state is read by `v` too.
    (fold,) = folds_of(model, x, {0: 1}, {"x": {1: "P"}})
    assert sides(fold) == "v.w v.b -> v.w o.w"


def test_sizes_that_lose_more_than_a_stand_in_has():
    """The graph is followed with small numbers for dynamic sizes, of which a strided convolution may leave none."""
    net = nn.Sequential(nn.Conv1d(2, 8, 9, stride=8), nn.GELU(), nn.Conv1d(8, 8, 3))
    assert folds_of(net, torch.randn(1, 2, 200), axes={"x": {2: "T"}}) == ()


def test_dynamic_sizes():
    call, modules, expected = LEGAL["grouped values"]
    folds = folds_of(Net(call, **modules), torch.rand(2, 5, WIDTH), axes={"x": {0: "B", 1: "S"}})
    assert list(map(sides, folds)) == expected


@pytest.mark.parametrize("which", ["a", "b"])
def test_packed_weights_take_no_factors(which):
    model = Net(LEGAL["linears"][0], **ABC)
    layer = model.get_submodule(which)
    layer.weight = nn.Parameter(quantize_q40(layer.weight.detach()), requires_grad=False)
    assert folds_of(model, torch.rand(2, 5, WIDTH)) == ()


def test_a_norm_of_1_plus_weight_only_in_f32():
    call, modules, _ = LEGAL["rms norm of 1 + weight"]
    assert folds_of(Net(call, **modules).half(), torch.rand(2, 5, WIDTH).half()) == ()
