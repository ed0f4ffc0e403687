"""What operators do to factors of the channels of their inputs.

Every element of every value has a factor that it may be scaled by: the number of an unknown, or 0 where the factor is 1. Slices of
parameters are unknowns of their own; operators pass factors on, or say that two of them are the same. What an operator that is not
known here reads has the factor 1. Factors are integer tensors of the shape of their values, so that operators which only move
values are run on them, with dynamic sizes that are primes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from torch_to_nnef.graph.experts import experts, routed_experts
from torch_to_nnef.graph.ir import Graph, Node, Value
from torch_to_nnef.graph.uses import SAME, is_transpose
from torch_to_nnef.tensor.quant.base import FLOAT_DTYPES, QTensor
from torch_to_nnef.torch_internals import OpOverload, pytree

aten = torch.ops.aten
ONE = 0  # the factor 1
ANY = -1  # of zeros, which are the same under any factor
_PRIMES = (5, 7, 11, 13, 17, 19, 23)


@dataclass
class Scaled:
    """A parameter: slices along `made_axis` make the factors `made` [n], slices along `read_axis` undo the factors `read`."""

    fqn: str
    made_axis: int | None
    made: Tensor
    read_axis: int | None
    read: Tensor
    offset: float = 0.0


class _NotFollowed(Exception):
    """What is read has the factor 1."""


class Factors:
    """Of a graph, by its values: `scaled` are the parameters that can change, `same` pairs of equal unknowns of `count` in all."""

    def __init__(self, graph: Graph, carried: Mapping[int, int]) -> None:
        self.graph = graph
        self.sizes = dict(zip(graph.symbols, itertools.cycle(_PRIMES), strict=False))
        self.numbers: dict[sympy.Expr, int] = {}  # of sizes
        self.count = 1
        self.same: list[Tensor] = []  # [2, n] each: pairs of equal factors
        self.known: dict[str, Tensor] = {}  # of values
        self.scaled: dict[int, Scaled] = {}  # id of a parameter
        self.frozen: set[int] = set()  # ids of tensors that may not change
        self.origins = {name: (fqn, False) for name, fqn in graph.weights.items()}  # whole tensors: fqn, transposed
        self.constants = set(graph.weights)  # values that weights alone give
        self.states = {end: self._state(graph.inputs[start]) for start, end in carried.items()}

    def visit(self, node: Node) -> None:
        """Say what `node` does to factors."""
        values = [leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, Value)]
        if values and all(value.name in self.constants for value in values):
            self.constants.update(output.name for output in node.outputs)
        if values and values[0].name in self.origins and (node.target in _WHOLE or is_transpose(node)):
            fqn, transposed = self.origins[values[0].name]
            self.origins[node.outputs[0].name] = (fqn, transposed != is_transpose(node))
            return
        try:
            factors = _RULES.get(node.target, _not_followed)(self, node)
            known = {
                out.name: f.expand(self.concrete(out.shape)) for out, f in zip(node.outputs, factors, strict=False)
            }
        # A call that a rule did not foresee is not followed either.
        except (_NotFollowed, RuntimeError, LookupError, TypeError, ValueError):
            known = {}
            for value in values:
                self.fix(self.of(value))
        self.known.update(known)

    def finish(self) -> None:
        """Every output of the graph has the factor 1, and so has what was frozen on the way."""
        for position, value in enumerate(self.graph.outputs):
            self.merge(self.of(value), self.states.get(position, torch.tensor(ONE)))
        for key in self.frozen & self.scaled.keys():
            self.fix(self.scaled[key].made)
            self.fix(self.scaled[key].read)

    # Factors and what is known of them.

    def of(self, value: Any, offset: float = 0.0) -> Tensor:
        """Factors of `value`, a view that spans its shape; of a number, 1."""
        if not isinstance(value, Value):
            return torch.tensor(ONE)
        shape, none = self.concrete(value.shape), torch.tensor(ONE)
        if value.name not in self.origins:
            return self.known.get(value.name, none.expand(shape))
        fqn, _ = self.origins[value.name]
        sizes = self.graph.tensors[fqn].shape
        if sizes.numel() < 2 or max(sizes) != sizes.numel():
            self.frozen.add(id(self.graph.tensors[fqn]))
            return none.expand(shape)
        return self.parameter(fqn, sizes.index(max(sizes)), None, offset).made.reshape(shape)

    def parameter(self, fqn: str, made: int | None, read: int | None, offset: float = 0.0) -> Scaled:
        """The parameter `fqn` with slices along `made` and `read`; frozen if it cannot change, or is read otherwise elsewhere."""
        tensor, none = self.graph.tensors[fqn], torch.tensor([ONE])
        if id(tensor) not in self.scaled:
            slices = (none if axis is None else self.fresh(tensor.shape[axis]) for axis in (made, read))
            self.scaled[id(tensor)] = Scaled(fqn, made, next(slices), read, next(slices), offset)
        found = self.scaled[id(tensor)]
        if (
            not isinstance(tensor, nn.Parameter)
            or isinstance(tensor, QTensor)
            or tensor.dtype not in FLOAT_DTYPES
            or (found.made_axis, found.read_axis, found.offset) != (made, read, offset)
            # Where numbers are coarse, (1 + w) / s - 1 is not w again.
            or (offset and tensor.dtype not in (torch.float32, torch.float64))
        ):
            self.frozen.add(id(tensor))
            return Scaled(fqn, made, none if made is None else none.expand(tensor.shape[made]), read, none, offset)
        return found

    def fresh(self, n: int) -> Tensor:
        """Unknowns [n]."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def _state(self, value: Value) -> Tensor:
        """Unknowns of an input, alike along its dynamic axes."""
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        factor = self.fresh(torch.Size(shape).numel()).reshape(shape)
        self.known[value.name] = factor.expand(self.concrete(value.shape))
        return factor

    def fix(self, factor: Tensor) -> None:
        """It is 1."""
        self.merge(factor, torch.tensor(ONE))

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        """They are the same; returns it."""
        left, right = _aligned(left, right)
        differ = (left != right) & (left != ANY) & (right != ANY)
        if bool(differ.any()):
            pairs = torch.unique(left[differ] << 32 | right[differ])
            self.same.append(torch.stack([pairs >> 32, pairs & 0xFFFFFFFF]))
        return torch.maximum(left, right)

    def alike(self, factor: Tensor, axes: Iterable[int]) -> Tensor:
        """Factors that are the same along `axes`, whose sizes become 1."""
        core, axes = _core(factor), [axis % factor.dim() for axis in axes]
        if not axes:
            return core
        if not factor.numel():
            raise _NotFollowed
        one = core.amax(axes, keepdim=True)
        self.merge(core, one)
        return one

    def multiplied(self, left: Tensor, right: Tensor) -> Tensor:
        """Factors of a product; of two unknowns the left is 1."""
        left, right = _aligned(left, right)
        self.fix(left[(left > 0) & (right > 0)])
        return torch.where(left == ANY, left, torch.where(right == ONE, left, right))

    def concrete(self, tree: Any) -> Any:
        """With the sizes that stand for dynamic ones."""
        return pytree.tree_map_only(sympy.Basic, self._number, tree)

    def _number(self, size: sympy.Expr) -> int:
        if size not in self.numbers:
            symbols = {symbol: self.sizes.get(str(symbol), _PRIMES[-1]) for symbol in size.free_symbols}
            number = int(size.subs(symbols))
            # Too few for what the model takes away: any other will do, since where sizes do not fit nothing is followed.
            self.numbers[size] = number if number > 1 else _PRIMES[-1]
        return self.numbers[size]

    # Rules.

    def moved(self, node: Node) -> list[Tensor]:
        """Run it on factors."""
        args, kwargs = pytree.tree_map_only(Value, self.of, (list(node.args), dict(node.kwargs)))
        target = aten.reshape.default if node.target in _VIEWS else node.target
        result = target(*self.concrete(args), **self.concrete(kwargs))
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def shaped(self, node: Node) -> list[Tensor]:
        """Of the shape of what is read, whose values do not matter."""
        return [torch.tensor(ONE)]

    def padded(self, node: Node) -> list[Tensor]:
        """Zeros around it."""
        x, widths, *rest = (*node.args, *node.kwargs.values())
        if node.kwargs or any(value not in ("constant", 0, 0.0, None) for value in rest):
            raise _NotFollowed
        return [torch.constant_pad_nd(self.of(x), self.concrete(widths), ANY)]

    def kept(self, node: Node) -> list[Tensor]:
        """Each element alone, with f(s x) = s f(x)."""
        x, *rest = node.args
        for value in rest:
            self.fix(self.of(value))
        if not node.outputs[0].dtype.is_floating_point:
            raise _NotFollowed
        return [self.of(x)]

    def product(self, node: Node) -> list[Tensor]:
        """Where both have a factor it stays that of the parameter, since many weights may read what a norm makes."""
        left, right = node.args[:2]
        if isinstance(left, Value) and left.name in self.constants:
            left, right = right, left
        return [self.multiplied(self.of(left), self.of(right))]

    def added(self, node: Node) -> list[Tensor]:
        """`weight + 1` is as good as a weight; else factors are the same."""
        left, right = node.args[:2]
        for one, number in ((left, right), (right, left)):
            if isinstance(number, (int, float)) and isinstance(one, Value):
                if number == 0:
                    return [self.of(one)]
                if one.name not in self.origins or node.target is not aten.add.Tensor or node.kwargs:
                    raise _NotFollowed
                return [self.of(one, float(number))]
        return [self.merge(self.of(left), self.of(right))]

    def chosen(self, node: Node) -> list[Tensor]:
        """`where`."""
        condition, left, right = node.args
        self.fix(self.of(condition))
        return [self.merge(self.of(left), self.of(right))]

    def masked(self, node: Node) -> list[Tensor]:
        """Zeros at some places."""
        if isinstance(node.args[2], Value) or node.args[2] != 0:
            raise _NotFollowed
        return self.kept(node)

    def reduced(self, node: Node) -> list[Tensor]:
        """A sum, mean or maximum over axes."""
        x, axes, *keep = node.args
        if node.kwargs or not axes:
            raise _NotFollowed
        axes = [axes] if isinstance(axes, int) else axes
        factor = self.alike(self.of(x), axes)
        return [factor if any(keep) else factor.squeeze([axis % factor.dim() for axis in axes])]

    def by_channel(self, node: Node, seen: int) -> list[Tensor]:
        """Each channel alone, over the last `seen` axes."""
        return [self.alike(self.of(node.args[0]), range(-seen, 0))]

    def indexed(self, node: Node) -> list[Tensor]:
        """Places along one axis that are known only when it runs."""
        x, where, *_ = node.args
        indices = [None] * where + list(node.args[2:]) if isinstance(where, int) else where
        axes = [axis for axis, index in enumerate(indices) if index is not None]
        if len(axes) != 1 or len(indices[axes[0]].shape) != 1:
            raise _NotFollowed
        return [self.alike(self.of(x), axes)]

    def linear(self, node: Node) -> list[Tensor]:
        """`x W^T + b`."""
        x, weight, *bias = node.args
        return self.weighted(x, weight, bias, (0, 1), -1)

    def matmul(self, node: Node) -> list[Tensor]:
        """`x W`, or the product of two activations."""
        x, y = node.args
        if y.name in self.origins:
            return self.weighted(x, y, (), (1, 0), -1)
        if min(len(x.shape), len(y.shape)) < 2:
            raise _NotFollowed
        return [self.multiplied(self.alike(self.of(x), [-1]), self.alike(self.of(y), [-2]))]

    def addmm(self, node: Node) -> list[Tensor]:
        """`b + x W`."""
        bias, x, weight = node.args
        if node.kwargs:
            raise _NotFollowed
        return self.weighted(x, weight, (bias,), (1, 0), -1)

    def conv(self, node: Node) -> list[Tensor]:
        """A convolution that every channel is read by."""
        x, weight, *rest = node.args
        if node.kwargs or rest[4:5] not in ([], [1]):
            raise _NotFollowed
        return self.weighted(x, weight, rest[:1], (0, 1), 1 - len(weight.shape))

    def weighted(
        self, x: Value, weight: Value, bias: Sequence[Any], axes: tuple[int, int], channel: int
    ) -> list[Tensor]:
        """A sum over the axis `channel` of x: `axes` of the weight are its outputs and inputs."""
        fqn, transposed = self.origins.get(weight.name, ("", False))
        if not fqn or len(weight.shape) != 1 - channel:
            raise _NotFollowed
        factor = self.of(x)
        columns = self.alike(factor, (axis for axis in range(-factor.dim(), 0) if axis != channel)).reshape(-1)
        parameter = self.parameter(fqn, *(reversed(axes) if transposed else axes))
        self.merge(columns, parameter.read)
        rows = parameter.made.reshape([-1] + [1] * (-1 - channel))
        for value in bias:
            if isinstance(value, Value):
                rows = self.merge(rows, self.of(value).reshape(rows.shape))
        return [rows]

    def mixture(self, node: Node, axes: Mapping[int, int]) -> list[Tensor]:
        """A mixture of experts on x: the axis of each weight, by its position, that is of the channels of x."""
        x, *rest = node.args
        factor = self.of(x)
        columns = self.alike(factor, range(factor.dim() - 1)).reshape(-1)
        for position, value in enumerate(rest, 1):
            if position in axes:
                self.merge(columns, self.parameter(self.origins[value.name][0], None, axes[position]).read)
            else:
                self.fix(self.of(value))
        return [torch.tensor(ONE)]

    def embedding(self, node: Node) -> list[Tensor]:
        """Rows of a table."""
        fqn, transposed = self.origins.get(node.args[0].name, ("", False))
        if not fqn or transposed:
            raise _NotFollowed
        return [self.parameter(fqn, 1, None).made]

    def norm(self, node: Node, axis: int, weight: int) -> list[Tensor]:
        """What it reads has no factor; weight and bias, arguments `weight` and one on, are of the channels along `axis`."""
        parameters = [value for value in node.args[weight : weight + 2] if isinstance(value, Value)]
        if node.kwargs or not parameters or parameters[0] is not node.args[weight] or len(parameters[0].shape) != 1:
            raise _NotFollowed
        for value in node.args[:weight] + node.args[weight + 2 :]:
            self.fix(self.of(value))
        factor = self.of(parameters[0])
        for value in parameters[1:]:
            factor = self.merge(factor, self.of(value))
        return [factor.reshape([-1] + [1] * (len(node.outputs[0].shape) - 1 - axis % len(node.outputs[0].shape)))]

    def attention(self, node: Node) -> list[Tensor]:
        """A mean of values, over keys."""
        query, key, value, *rest = (*node.args, *node.kwargs.values())
        for other in (query, key, *rest):
            self.fix(self.of(other))
        factor = self.alike(self.of(value), [-2])
        if (heads := len(query.shape) > 2 and query.shape[-3]) and heads != value.shape[-3]:
            factor = factor.repeat_interleave(int(heads) // int(value.shape[-3]), -3)
        return [factor]


def _not_followed(factors: Factors, node: Node) -> list[Tensor]:
    raise _NotFollowed


_Rule = Callable[[Factors, Node], list[Tensor]]
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default})
_SHAPED = frozenset(
    {
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.zeros_like.default,
    }
)
_WHOLE = SAME | _CASTS
_MOVES = SAME | _VIEWS | {
    aten.broadcast_to.default, aten.cat.default, aten.channel_shuffle.default, aten.chunk.default, aten.expand.default,
    aten.flatten.using_ints, aten.flip.default, aten.lift_fresh_copy.default, aten.movedim.int, aten.narrow.default,
    aten.numpy_T.default, aten.permute.default, aten.pixel_shuffle.default, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.reshape.default, aten.roll.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.stack.default, aten.t.default, aten.transpose.int,
    aten.unbind.int, aten.unflatten.int, aten.unsqueeze.default,
}  # fmt: skip
_RULES: Mapping[OpOverload, _Rule] = {
    **dict.fromkeys(_MOVES, Factors.moved),
    **dict.fromkeys(_CASTS, Factors.kept),
    **dict.fromkeys(_SHAPED, Factors.shaped),
    aten.dropout.default: Factors.kept,
    aten.feature_dropout.default: Factors.kept,
    aten.relu.default: Factors.kept,
    aten.leaky_relu.default: Factors.kept,
    aten.prelu.default: Factors.kept,
    aten.neg.default: Factors.kept,
    aten.abs.default: Factors.kept,
    aten.masked_fill.Scalar: Factors.masked,
    aten.div.Tensor: Factors.kept,
    aten.div.Scalar: Factors.kept,
    aten.mul.Tensor: Factors.product,
    aten.mul.Scalar: Factors.product,
    aten.add.Tensor: Factors.added,
    aten.sub.Tensor: Factors.added,
    aten.where.self: Factors.chosen,
    aten.constant_pad_nd.default: Factors.padded,
    aten.pad.default: Factors.padded,
    aten.mean.dim: Factors.reduced,
    aten.sum.dim_IntList: Factors.reduced,
    aten.amax.default: Factors.reduced,
    aten.amin.default: Factors.reduced,
    aten.index_select.default: Factors.indexed,
    aten.index.Tensor: Factors.indexed,
    aten.linear.default: Factors.linear,
    aten.matmul.default: Factors.matmul,
    aten.mm.default: Factors.matmul,
    aten.bmm.default: Factors.matmul,
    aten.addmm.default: Factors.addmm,
    aten.conv1d.default: Factors.conv,
    aten.conv1d.padding: Factors.conv,
    aten.conv2d.default: Factors.conv,
    aten.conv2d.padding: Factors.conv,
    aten.embedding.default: Factors.embedding,
    experts: partial(Factors.mixture, axes={3: 2}),
    routed_experts: partial(Factors.mixture, axes={1: 1, 2: 2}),
    aten.layer_norm.default: partial(Factors.norm, axis=-1, weight=2),
    aten.rms_norm.default: partial(Factors.norm, axis=-1, weight=2),
    aten.batch_norm.default: partial(Factors.norm, axis=1, weight=1),
    aten.group_norm.default: partial(Factors.norm, axis=1, weight=2),
    aten.instance_norm.default: partial(Factors.norm, axis=1, weight=1),
    aten.scaled_dot_product_attention.default: Factors.attention,
    aten.adaptive_avg_pool1d.default: partial(Factors.by_channel, seen=1),
    aten.adaptive_avg_pool2d.default: partial(Factors.by_channel, seen=2),
    aten.avg_pool1d.default: partial(Factors.by_channel, seen=1),
    aten.avg_pool2d.default: partial(Factors.by_channel, seen=2),
    aten.max_pool1d.default: partial(Factors.by_channel, seen=1),
    aten.max_pool2d.default: partial(Factors.by_channel, seen=2),
    aten.upsample_nearest1d.vec: partial(Factors.by_channel, seen=1),
    aten.upsample_nearest2d.vec: partial(Factors.by_channel, seen=2),
    aten.upsample_bilinear2d.vec: partial(Factors.by_channel, seen=2),
}


def _core(factor: Tensor) -> Tensor:
    """Without what `expand` repeats."""
    for axis, stride in enumerate(factor.stride()):
        if stride == 0:
            factor = factor.narrow(axis, 0, min(1, factor.shape[axis]))
    return factor


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of one shape, without what `expand` repeats in both."""
    left, right = torch.broadcast_tensors(_core(left), _core(right))  # type: ignore[no-untyped-call]
    return left, right
