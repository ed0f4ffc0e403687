"""Fragments of ours that a graph.nnef may define: one line a call keeps the graph readable. Only those in use are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch_to_nnef.op.fragments_complex import COMPLEX_FRAGMENTS
from torch_to_nnef.op.fragments_integer import INTEGER
from torch_to_nnef.op.fragments_math import MATH
from torch_to_nnef.op.fragments_special import SPECIAL
from torch_to_nnef.op.statement import Fragment

# name -> (signature, body lines). Literals stand right of tensors: tract casts them to the tensor's type.
_FRAGMENTS: dict[str, Fragment] = {
    # Changes nothing, not even NaN; see Emitter.beside.
    "t2n_apart": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = neg(neg(x));"],
    ),
    "t2n_attention": (
        "(query: tensor<scalar>, key: tensor<scalar>, value: tensor<scalar>, scale: scalar, axis: integer)"
        " -> (y: tensor<scalar>)",
        ["y = matmul(softmax(matmul(query, key, transposeB = true) * scale, axes = [axis]), value);"],
    ),
    "t2n_attention_biased": (
        "(query: tensor<scalar>, key: tensor<scalar>, value: tensor<scalar>, bias: tensor<scalar>, scale: scalar, axis: integer)"
        " -> (y: tensor<scalar>)",
        ["y = matmul(softmax(matmul(query, key, transposeB = true) * scale + bias, axes = [axis]), value);"],
    ),
    # The second select gives a row that is masked whole zeros, as torch does.
    "t2n_attention_masked": (
        "(query: tensor<scalar>, key: tensor<scalar>, value: tensor<scalar>, mask: tensor<logical>, masked: tensor<scalar>,"
        " zero: tensor<scalar>, scale: scalar, axis: integer) -> (y: tensor<scalar>)",
        [
            "scores = select(mask, matmul(query, key, transposeB = true) * scale, masked);",
            "y = matmul(select(mask, softmax(scores, axes = [axis]), zero), value);",
        ],
    ),
    "t2n_attention_weights": (
        "(scores: tensor<scalar>, scale: scalar, axis: integer) -> (y: tensor<scalar>)",
        ["y = softmax(scores * scale, axes = [axis]);"],
    ),
    "t2n_attention_weights_biased": (
        "(scores: tensor<scalar>, bias: tensor<scalar>, scale: scalar, axis: integer) -> (y: tensor<scalar>)",
        ["y = softmax(scores * scale + bias, axes = [axis]);"],
    ),
    "t2n_attention_weights_masked": (
        "(scores: tensor<scalar>, mask: tensor<logical>, masked: tensor<scalar>, zero: tensor<scalar>, scale: scalar, axis: integer)"
        " -> (y: tensor<scalar>)",
        ["y = select(mask, softmax(select(mask, scores * scale, masked), axes = [axis]), zero);"],
    ),
    "t2n_elu": (
        "(x: tensor<scalar>, alpha: scalar, scale: scalar, input_scale: scalar) -> (y: tensor<scalar>)",
        ["y = (max(x, 0.0) + (exp(min(x, 0.0) * input_scale) - 1.0) * alpha) * scale;"],
    ),
    "t2n_gelu": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = (x * 0.5) * (tract_core_erf(x * 0.70710678) + 1.0);"],
    ),
    # Gates along an axis from torch's order to that of tract's kernels: r, z, n -> z, r, n; i, f, g, o -> i, o, f, g.
    "t2n_gru_gates": (
        "(x: tensor<scalar>, axis: integer, hidden: integer) -> (y: tensor<scalar>)",
        [
            "reset = slice(x, axes = [axis], begin = [0], end = [hidden]);",
            "update = slice(x, axes = [axis], begin = [hidden], end = [hidden * 2]);",
            "new = slice(x, axes = [axis], begin = [hidden * 2], end = [hidden * 3]);",
            "y = concat([update, reset, new], axis = axis);",
        ],
    ),
    "t2n_hardsigmoid": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = min(max(x + 3.0, 0.0), 6.0) / 6.0;"],
    ),
    "t2n_hardswish": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = x * min(max(x + 3.0, 0.0), 6.0) / 6.0;"],
    ),
    # Torch's cubic convolution of coefficient -0.75, by the distance from the near taps (up to 1) and the far ones.
    "t2n_cubic_far": (
        "(d: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = ((d * -0.75 + 3.75) * d - 6.0) * d + 3.0;"],
    ),
    "t2n_cubic_near": (
        "(d: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = (d * 1.25 - 2.25) * d * d + 1.0;"],
    ),
    "t2n_interpolate_cubic": (
        "(x: tensor<scalar>, source: tensor<scalar>, last: tensor<scalar>, axis: integer, around: integer[]) -> (y: tensor<scalar>)",
        [
            "first = floor(source);",
            "part = unsqueeze(source - first, axes = around);",
            "rest = neg(part) + 1.0;",
            "a = t2n_neighbour(x, first - 1.0, last, axis = axis) * t2n_cubic_far(part + 1.0);",
            "b = t2n_neighbour(x, first, last, axis = axis) * t2n_cubic_near(part);",
            "c = t2n_neighbour(x, first + 1.0, last, axis = axis) * t2n_cubic_near(rest);",
            "d = t2n_neighbour(x, first + 2.0, last, axis = axis) * t2n_cubic_far(rest + 1.0);",
            "y = a + b + c + d;",
        ],
    ),
    "t2n_interpolate_linear": (
        "(x: tensor<scalar>, source: tensor<scalar>, last: tensor<scalar>, axis: integer, around: integer[]) -> (y: tensor<scalar>)",
        [
            "first = floor(source);",
            "a = t2n_neighbour(x, first, last, axis = axis);",
            "b = t2n_neighbour(x, first + 1.0, last, axis = axis);",
            "y = a + (b - a) * unsqueeze(source - first, axes = around);",
        ],
    ),
    "t2n_layer_norm": (
        "(x: tensor<scalar>, axes: integer[], eps: scalar) -> (y: tensor<scalar>)",
        [
            "centered = x - mean_reduce(x, axes = axes);",
            "y = centered * rsqrt(mean_reduce(square(centered), axes = axes) + eps);",
        ],
    ),
    "t2n_layer_norm_affine": (
        "(x: tensor<scalar>, scale: tensor<scalar>, offset: tensor<scalar>, axes: integer[], eps: scalar)"
        " -> (y: tensor<scalar>)",
        ["y = t2n_layer_norm(x, axes = axes, eps = eps) * scale + offset;"],
    ),
    "t2n_linear": (
        "(filter: tensor<scalar>, x: tensor<scalar>, bias: tensor<scalar>, expr: string, lead: integer[]) -> (y: tensor<scalar>)",
        ['y = tract_core_einsum([filter, x], expr = expr, acc = "f32") + unsqueeze(bias, axes = lead);'],
    ),
    "t2n_log10": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = log(x) * 0.43429448;"],
    ),
    "t2n_log2": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = log(x) * 1.4426950;"],
    ),
    "t2n_log_sigmoid": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = min(x, 0.0) - log(exp(neg(abs(x))) + 1.0);"],
    ),
    "t2n_lstm_gates": (
        "(x: tensor<scalar>, axis: integer, hidden: integer) -> (y: tensor<scalar>)",
        [
            "input = slice(x, axes = [axis], begin = [0], end = [hidden]);",
            "forget_cell = slice(x, axes = [axis], begin = [hidden], end = [hidden * 3]);",
            "output = slice(x, axes = [axis], begin = [hidden * 3], end = [hidden * 4]);",
            "y = concat([input, output, forget_cell], axis = axis);",
        ],
    ),
    "t2n_mish": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = x * tanh(t2n_softplus(x, beta = 1.0, threshold = 20.0));"],
    ),
    # The elements of one axis at whole positions, the edge beyond it.
    "t2n_neighbour": (
        "(x: tensor<scalar>, position: tensor<scalar>, last: tensor<scalar>, axis: integer) -> (y: tensor<scalar>)",
        ['y = tract_core_gather(x, tract_core_cast(min(max(position, 0.0), last), to = "i64"), axis = axis);'],
    ),
    # tract 0.23.9 reasons on masks made of ranges and cuts a causal one wrongly; it does not look behind abs.
    "t2n_positions": (
        "(length: integer) -> (y: tensor<scalar>)",
        ["y = abs(tract_core_range(0, length, 1));"],
    ),
    "t2n_prelu": (
        "(x: tensor<scalar>, slope: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = max(x, 0.0) + min(x, 0.0) * slope;"],
    ),
    "t2n_relu6": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = min(max(x, 0.0), 6.0);"],
    ),
    "t2n_rms_norm": (
        "(x: tensor<scalar>, axes: integer[], eps: scalar) -> (y: tensor<scalar>)",
        ["y = x * rsqrt(mean_reduce(square(x), axes = axes) + eps);"],
    ),
    "t2n_selu": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = t2n_elu(x, alpha = 1.6732632, scale = 1.0507010, input_scale = 1.0);"],
    ),
    # log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)) does not overflow.
    "t2n_softplus": (
        "(x: tensor<scalar>, beta: scalar, threshold: scalar) -> (y: tensor<scalar>)",
        [
            "z = x * beta;",
            "y = select(z > threshold, x, (max(z, 0.0) + log(exp(neg(abs(z))) + 1.0)) / beta);",
        ],
    ),
    "t2n_trunc": (
        "(x: tensor<scalar>) -> (y: tensor<scalar>)",
        ["y = sign(x) * floor(abs(x));"],
    ),
}


def in_use(operators: Iterable[str], own: Mapping[str, Fragment]) -> dict[str, str]:
    """Text of every fragment that `operators` need and of all the document's `own`, those within fragments included, by name."""
    known = {**_FRAGMENTS, **COMPLEX_FRAGMENTS, **INTEGER, **MATH, **SPECIAL, **own}
    wanted, found = {*operators, *own}, set[str]()
    while new := (wanted & known.keys()) - found:
        found |= new
        wanted |= {word for name in new for line in known[name][1] for word in re.findall(r"\w+", line)}
    return {name: _text(name, *known[name]) for name in sorted(found)}


def _text(name: str, signature: str, body: Sequence[str]) -> str:
    lines = "".join(f"    {line}\n" for line in body)
    return f"fragment {name}{signature}\n{{\n{lines}}}\n"
