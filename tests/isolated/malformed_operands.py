"""Tables of archives whose operators get what tract does not look at; a case is `(what it is, its bytes)`."""

from collections.abc import Iterator
from itertools import chain

from malformed import DATS, HEAD, Case, dat, text, with_weight

IMAGE = "i = unsqueeze(x, axes = [0, 1]);\n"
# Where a number belongs.
NUMBERS = [
    "tract_core_topk(x, k = {}, axis = 0, largest = true)[0]", "tract_core_trilu(x, k = {}, upper = true)",
    "tract_core_range({}, {}, {})", "unsqueeze(x, axes = [{}])", "unsqueeze(x, axes = {})", "softmax(x, axes = {})",
    "pad(x, padding = [({}, 0), (0, 0)])", "tract_core_cumsum(x, axis = {}, exclusive = false, reverse = false)",
    "external(shape = [{}])", "leaky_relu(x, alpha = {})", "tract_core_dyn_slice(x, {}, 4, 4, axis = 1)",
    "tract_core_cast(x, to = {})", "max_reduce(x, axes = [1 - {}])",
]  # fmt: skip
BODY = (
    "fragment f(a: tensor<scalar>, h: tensor<scalar>) -> (o: tensor<scalar>, n: tensor<scalar>) {{ n = {}; o = {}; }}\n"
)
ROW = "slice(x, axes = [0], begin = [0], end = [1])"
# What is scanned, the first state, the next one, the output, how it is collected.
LOOPS = [
    ('("a", x, 0, 1)', ROW, "h + a", "n", '[("o", "full", 0, 1)], skip = 1'),
    ('("a", x, 0, 1)', ROW, "h + a", "concat([a, h], axis = 0)", '[("o", "full", 0, 1)]'),
    ('("a", x, 0, -1)', ROW, "h + a", "concat([a, h], axis = 0)", '[("o", "full", 0, -1)]'),
    ('("a", x, 0, 3)', "slice(x, axes = [0], begin = [0], end = [3])", "h + a", "n", '[("o", "full", 0, 3)]'),
    ('("a", x, 0, 2)', ROW, "h", "sum_reduce(a, axes = [0])", '[("o", "full", 0, 1)]'),
    (f'("a", x, 0, 1), ("h", {ROW}, 0, 1)', "", "h + a", "n", '[("o", "full", 0, 1)]'),
    (f'("a", {ROW}, 0, 1), ("h", external<scalar>(shape = [3, 32]), 0, -1)', "", "h + a", "n", '[("o", "full", 0, 1)]'),
]  # fmt: skip


def operands() -> Iterator[Case]:
    """All of them."""
    return chain(windows(), values(), numbers(), cells(), loops(), products())


def windows() -> Iterator[Case]:
    """Sizes without batch, channel or one axis more; what does not step forward."""
    for pool in ("max_pool", "avg_pool", "box", "rms_pool", "max_pool_with_index", "local_mean_normalization"):
        for operand, size in (
            ("1.0", []),
            ("sum_reduce(x)[0]", []),
            ("squeeze(slice(x, axes = [0], begin = [0], end = [1]), axes = [0])", [1]),
            ("x", [1, 1]),
        ):
            yield f"{pool} of too few axes in {operand}", text(f"[y] = {pool}({operand}, size = {size});")
    for padding in (
        "[(0, 0)]",
        "[(0, 0), (0, 0)]",
        "[(0, 0)] * 3",
        "0",
        "[(0, 0), (0, 0), (0, 0), (0, 0)]",
        "[0, 0, 0]",
    ):
        yield (
            f"a window of 3 axes with padding {padding}",
            text(f"y = max_pool(unsqueeze(x, axes = [0]), size = [1, 1, 2], padding = {padding});"),
        )
    for padded in ([(0, 0), (0, -1)], [(-1, 0), (0, 0)]):
        box = f"box(i, size = [1, 1, 1, 3], padding = {[(0, 0), (0, 0), *padded]})"
        for call in (box, f"conv(i, i, padding = {padded})"):
            yield call, text(f"{IMAGE}y = {call};")
    for size in ([1, 1, 0, 1], [1, 1, 1, -3]):
        yield f"a window of {size}", text(f"{IMAGE}y = max_pool(i, size = {size});")
    for argument in ("stride", "dilation"):
        for steps in ([0, 1], [1, -1], [1, -(1 << 31)]):
            calls = [f"{op}(i, i, {argument} = {steps})" for op in ("conv", "deconv")]
            calls += [
                f"{op}(i, size = [1, 1, 1, 1], {argument} = {[1, 1, *steps]})" for op in ("box", "max_pool", "debox")
            ]
            yield from ((call, text(f"{IMAGE}y = {call};")) for call in calls)


def values() -> Iterator[Case]:
    """Two types where one belongs; a rank beyond reason."""
    for off, on in (("0.0", "true"), ("0", "1.0"), ("'a'", "false"), ("'a'", "'b'"), ("x", "1.0")):
        yield (
            f"one_hot of {off} and {on}",
            text(f"y = tract_core_one_hot(x, 0, dim = 4, value_off = {off}, value_on = {on});"),
        )
    for axes in (65, 1_000, 5_000):
        yield f"unsqueeze {axes} times", text(f"y = unsqueeze(x, axes = {[0] * axes});")


def numbers() -> Iterator[Case]:
    """Tensors of no element, or of two, for a number; constants without elements beside an operand."""
    for use in NUMBERS:
        for given in ("e", "slice(w, axes = [0], begin = [1], end = [1])", "w"):
            body = f"e = slice(w, axes = [0], begin = [0], end = [0]);\ny = {use.format(*[given] * 3)};"
            yield f"{use} of {given}", with_weight(dat((2,), 4, 64, 0, bytes(16)), body, "2")
    for expression in ("x ^ e", "e ^ x", "x * e", "x ^ slice(w, axes = [0, 1], begin = [0, 0], end = [0, 1])"):
        body = f"e = slice(w, axes = [0], begin = [4], end = [4]);\ny = {expression};"
        yield f"{expression} of a constant without elements", with_weight(DATS["f32"], body)


def cells() -> Iterator[Case]:
    """Operands of several types; a state wider than the cell."""
    state, gates = (f"slice(x, axes = [1], begin = [{begin}], end = [{end}])" for begin, end in ((0, 8), (8, 32)))
    for to in ("bool", "i8", "f16", "f64"):
        other, gate = (f'tract_core_cast({operand}, to = "{to}")' for operand in (state, gates))
        for call in (
            f"tract_core_lstm_epilogue(x, {other}, hidden = 8)[1]",
            f"tract_core_gru_epilogue({gates}, {gate}, {state}, hidden = 8)",
            f"tract_core_gru_epilogue({gates}, {gates}, {other}, hidden = 8)",
        ):
            yield call, text(f"y = {call};")
    wide = "tract_core_lstm_epilogue(x, slice(x, axes = [1], begin = [0], end = [9]), hidden = 8)[1]"
    yield wide, text(f"y = {wide};")


def loops() -> Iterator[Case]:
    """Steps that are skipped, or take or give more than one element; operands of several lengths."""
    for scanned, state, following, given, output in LOOPS:
        states = f'("h", {state}, "n")' if state else ""
        loop = f'tract_core_scan("f", scan = [{scanned}], full = [], state = [{states}], output = {output})'
        yield f"{loop} of {following}, {given}", text(f"y = {loop};", BODY.format(following, given))


def products() -> Iterator[Case]:
    """Sums along 1 and another size."""
    for expr, shape in (("ab,cb->ac", "4, 1"), ("ab,b->a", "1")):
        for width in ("32", "S"):
            product = f'tract_core_einsum([z, external<scalar>(shape = [{shape}])], expr = "{expr}", acc = "f32")'
            body = f"z = external<scalar>(shape = [4, {width}]);\ny = {product};"
            yield f"{product} of {width}", text(body, head=HEAD + "extension tract_symbol S;\n")
