"""What a handler writes with: statements, constants, rank alignment, casts. It never sees names or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.graph.ir import Dim, Node, Shape, Value
from torch_to_nnef.graph.tdim import same_everywhere
from torch_to_nnef.op.dtypes import check_storable, tract_dtype
from torch_to_nnef.op.sizes import size
from torch_to_nnef.op.statement import Fragment, Ref, Statement, Variable
from torch_to_nnef.tensor.chunks import rows_of
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant import QTensor, QTensorHalf, QTensorTractPadded, QTensorTractScaleOnly, stored_nbytes
from torch_to_nnef.torch_internals import pytree

Scalar = int | float | bool
# Operators that tract takes for another view of their operand, or for its own.
_MOVES = frozenset({"copy", "reshape", "slice", "squeeze", "tract_core_cast", "transpose", "unsqueeze"})
# Those that tract makes a concatenation of.
_JOINS = frozenset({"concat", "stack", "pad"})
# Largest constant that tract computes with beforehand although others read it too.
_FOLDED_BYTES = 4 << 20


class Emitter:
    """Collects the statements of one graph. `node` is the call being lowered; `fresh` gives unused identifiers for it.

    `forced` names the operators that an option of the target moves from f16 to f32, `shared` the weights that several calls read;
    `reify_sdpa` is the target's option for attention.
    """

    def __init__(
        self,
        fresh: Callable[[Node | None, str], str],
        producers: dict[str, Node],
        weights: Callable[[str], torch.Tensor],
        results: frozenset[str] = frozenset(),
        forced: frozenset[str] = frozenset(),
        shared: frozenset[str] = frozenset(),
        reify_sdpa: bool = False,
    ) -> None:
        self.statements: list[Statement] = []
        self.variables: dict[str, Variable] = {}
        self.fragments: dict[str, Fragment] = {}
        self._makers: dict[str, Statement] = {}
        self._constants: dict[tuple[torch.dtype, tuple[int, ...], bytes], Ref] = {}
        self.node: Node = None  # type: ignore[assignment]  # set by the lowering loop before every handler
        self.forced, self.reify_sdpa, self._shared = forced, reify_sdpa, shared
        self._fresh, self._producers, self._weights, self._results = fresh, producers, weights, results

    # -- statements

    def op(
        self,
        operator: str,
        *args: Any,
        out: Shape | None = None,
        dtype: torch.dtype | None = None,
        hint: str = "",
        **attrs: Any,
    ) -> Ref:
        """Emit `result = operator(args, attrs)`; `out` is the result's shape.

        By default the result broadcasts the tensors of `args` and has the dtype of the first.
        """
        tensors = [a for a in args if isinstance(a, Ref)]
        shape = broadcast([t.shape for t in tensors]) if out is None else tuple(out)
        return self.ops(operator, *args, results=[(shape, dtype or tensors[0].dtype)], hint=hint, **attrs)[0]

    def ops(
        self, operator: str, *args: Any, results: Sequence[tuple[Shape, torch.dtype]], hint: str = "", **attrs: Any
    ) -> list[Ref]:
        """Emit an operator with several results, given as (shape, dtype)."""
        refs = [Ref(self._fresh(self.node, hint or _op_name(self.node)), shape, dtype) for shape, dtype in results]
        ids, named = tuple(r.id for r in refs), tuple(attrs.items())
        statement = Statement(ids, operator, args, named, self.node.name, self.node.module_path)
        self.statements.append(statement)
        self._makers |= dict.fromkeys(ids, statement)
        return refs

    def define(self, name: str, signature: str, body: Sequence[str]) -> str:
        """A fragment of this graph alone, such as the body of a scan; returns its name.

        `signature` is `"(x: tensor<scalar>) -> (y: tensor<scalar>)"`, `body` its assignments. Defining the same again is fine.
        """
        if self.fragments.setdefault(name, (signature, tuple(body))) != (signature, tuple(body)):
            raise T2NErrorInvalidArgument(f"fragment {name} is defined twice, differently")
        return name

    def constant(self, tensor: torch.Tensor, hint: str) -> Ref:
        """A tensor the handler computed, stored once in the archive however many nodes need it."""
        check_storable(tensor, self.node.where())
        tract_dtype(tensor.dtype, self.node.where())
        key = (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self._constants:
            name = self._fresh(None, f"constant_{hint}")
            self._constants[key] = Ref(name, tuple(tensor.shape), tensor.dtype)
            self.variables[name] = Variable(name, name, tensor)
        return self._constants[key]

    def rows(self, weight: Ref, start: int, length: int, name: str) -> Ref:
        """Some rows of a weight, or of each matrix in a stack of them, stored on their own as `name`: tract cuts no packed weight."""
        tensor, stop = self._weights(weight.fqn or ""), start + length
        tensor = tensor.halves() if isinstance(tensor, QTensorHalf) else tensor
        cut = tensor.rows if isinstance(tensor, QTensorTractScaleOnly) else partial(rows_of, tensor)
        part = cut(start, stop)
        label = f"{weight.fqn}.{name}"
        ref = replace(weight, id=self._fresh(None, label), shape=tuple(part.shape))
        self.variables[ref.id] = Variable(ref.id, label, part)
        return ref

    def full(self, value: Scalar | Dim, dtype: torch.dtype | None = None) -> Ref:
        """A rank-0 tensor of `dtype` (the output's by default); NNEF literals cannot say infinities, and have no dtype."""
        if not isinstance(value, (int, float)):
            return size(self, value, dtype or self.out.dtype)
        return self.constant(torch.tensor(value, dtype=dtype or self.out.dtype), "scalar")

    def arange(self, start: Dim, step: Dim, length: Dim, dtype: torch.dtype) -> Ref:
        """`length` integers: start, start + step, ..."""
        if isinstance(length, int) and isinstance(start, int) and isinstance(step, int):
            return self.constant(torch.arange(length, dtype=dtype) * step + start, "arange")
        positions = self.op("t2n_positions", out=(length,), dtype=torch.int64, hint="arange", length=length)
        steps = positions if step == 1 else self.binary("mul", positions, step, torch.int64)
        return self.cast(steps if start == 0 else self.binary("add", steps, start, torch.int64), dtype)

    def tensor(self, weight: Ref) -> torch.Tensor:
        """The values of a weight."""
        return loaded(self._weights(weight.fqn or ""))

    # -- what the node says

    @property
    def out(self) -> Value:
        """First output of the node: the shape and dtype torch computed."""
        return self.node.outputs[0]

    @property
    def gives_result(self) -> bool:
        """Whether the first output of the node is one of the graph."""
        return self.out.name in self._results

    def is_quantized(self, ref: Ref) -> bool:
        """Whether `ref` is a weight that stays packed in the archive."""
        held = None if ref.fqn is None else self._weights(ref.fqn)
        return isinstance(held, QTensor) and not isinstance(held, QTensorHalf)

    def with_padding(self, weight: Ref) -> tuple[Ref, int]:
        """A matrix as it is stored, and how many zeros its packed rows have behind them."""
        held = self._weights(weight.fqn) if weight.fqn is not None else None
        if not isinstance(held, QTensorTractPadded):
            return weight, 0
        return replace(weight, shape=held.stored_shape), held.stored_shape[1] - held.shape[1]

    def is_laid_out_each_run(self, ref: Ref) -> bool:
        """Whether tract lays out `ref` for its kernels at every run, as it does with a large constant that has several readers.

        tract-core 0.23.9, optim/prop_const.rs; what is a slice of the constant it cuts beforehand, and counts as no reader.
        """
        if ref.fqn not in self._shared or self.is_quantized(ref):
            return False
        return stored_nbytes(self._weights(ref.fqn)) > _FOLDED_BYTES

    def beside(self, weight: Ref, x: Ref) -> Ref:
        """`x` as the other operand of `weight`.

        tract 0.23.9 turns the product of a matrix and a concatenation into a sum of products (optim/concat_then_einsum.rs), and
        panics where that slices packed blocks: something it does not look through keeps the two apart.
        """
        maker = self._makers.get(self._viewed(x).id)
        if self.is_quantized(weight) and maker is not None and maker.operator in _JOINS:
            return self.apart(x)
        return x

    def zeros_behind(self, x: Ref, count: int) -> Ref:
        """`x` with `count` zeros at the end of its last axis."""
        shape = (*x.shape[:-1], x.shape[-1] + count)
        sides = [*[(0, 0)] * (x.rank - 1), (0, count)]
        return self.op("pad", x, out=shape, hint="padded", padding=sides, border="constant", value=0.0)

    def apart(self, x: Ref) -> Ref:
        """`x` as it is, behind an operator that changes nothing and that no rewrite of tract looks through."""
        return self.op("t2n_apart", x, hint="apart")

    def before_broadcast(self, x: Ref) -> Ref:
        """What `x` repeats along its leading axes; `x` itself if it repeats nothing.

        For products: tract 0.23.9 drops a broadcast in front of an einsum, and with it the size of the result
        (declutter_broadcast in ops/einsum/mod.rs).
        """
        maker = self._makers.get(self._viewed(x).id)
        if maker is None or maker.operator != "tract_core_broadcast":
            return x
        repeated: Ref = maker.args[0]
        direct = maker.results == (x.id,)
        if direct and repeated.shape[-1] == x.shape[-1]:
            return repeated
        width = x.shape[-1]
        if direct and set(repeated.shape) <= {1} and isinstance(width, int):
            ones = self.constant(torch.ones([1] * (x.rank - 1) + [width], dtype=x.dtype), "row")
            return self.op("mul", ones, self.lift(repeated, x.rank), out=ones.shape, hint="row")
        scalar = self.variables.get(self._viewed(repeated).id)
        if scalar is not None and scalar.tensor.numel() == 1 and isinstance(width, int):
            row = torch.full((*[1] * (x.rank - 1), width), scalar.tensor.item(), dtype=x.dtype)
            return self.constant(row, "row")
        if direct and not all(isinstance(d, int) for d in x.shape):
            raise self.refuse("a product over numbers that are all one number, expanded; multiply it by weight.sum(-1)")
        return x

    def maker(self, x: Ref) -> Statement | None:
        """The statement that gives `x`; None for inputs and weights."""
        return self._makers.get(x.id)

    def _viewed(self, x: Ref) -> Ref:
        """What `x` is a view of, however often."""
        while (maker := self._makers.get(x.id)) and maker.operator in _MOVES and isinstance(maker.args[0], Ref):
            x = maker.args[0]
        return x

    def refuse(self, reason: str) -> T2NErrorNotImplemented:
        """The error for a call tract cannot do: `raise e.refuse("...")`."""
        return T2NErrorNotImplemented(f"{self.node.target} at {self.node.where()}: {reason}")

    def axis(self, dim: int, rank: int | None = None) -> int:
        """`dim` counted from the front, over the rank of the output unless given."""
        return dim % max(len(self.out.shape) if rank is None else rank, 1)

    # -- shapes and types

    def lift(self, ref: Ref, rank: int) -> Ref:
        """Add leading unit axes up to `rank`: NNEF aligns ranks on the left, torch on the right."""
        missing = rank - ref.rank
        return self.unsqueeze(ref, range(missing), "lift") if missing > 0 else ref

    def transpose(self, ref: Ref, order: Sequence[int]) -> Ref:
        """Axes in another order; the transpose of a packed matrix is the same identifier, seen the other way."""
        shape = tuple(ref.shape[axis] for axis in order)
        if self.is_quantized(ref) and list(order) == [1, 0]:
            return replace(ref, shape=shape, transposed=not ref.transposed)
        return self.op("transpose", ref, out=shape, axes=list(order))

    def unsqueeze(self, ref: Ref, axes: Sequence[int], hint: str = "") -> Ref:
        """Insert unit axes at positions of the result.

        Of what is stored, by a reshape: tract 0.23.9 leaves odd strides where it unsqueezes a constant (insert_axis in tensor.rs), with
        which its element-wise operators are up to thirty times as slow.
        """
        shape = list(ref.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        if not axes:
            return ref
        if self._is_stored(ref) and ref.rank:
            return self.op("reshape", ref, out=tuple(shape), hint=hint, shape=shape)
        return self.op("unsqueeze", ref, out=tuple(shape), hint=hint, axes=sorted(axes))

    def _is_stored(self, ref: Ref) -> bool:
        """Whether `ref` is a tensor of the archive, as it is, and not packed."""
        return (ref.fqn is not None or ref.id in self.variables) and not self.is_quantized(ref)

    def squeeze(self, ref: Ref, axes: Sequence[int]) -> Ref:
        """Remove unit axes."""
        shape = tuple(d for i, d in enumerate(ref.shape) if i not in axes)
        return self.op("squeeze", ref, out=shape, axes=sorted(axes)) if axes else ref

    def reshape(self, ref: Ref, shape: Shape) -> Ref:
        """View as `shape`; every dimension is written out, symbols included."""
        if not shape:  # an empty list is no shape to tract
            return self.squeeze(ref, range(ref.rank))
        before, after = math.prod(ref.shape), math.prod(shape)
        if not same_everywhere(before, after):  # torch has seen to it that the size divides, tract cannot
            raise T2NErrorDynamicShapeValue(
                f"{self.node.target} at {self.node.where()}: {before} elements are {after} only where a size divides; "
                "say so by its name: dynamic_axes={'x': {0: '2*S'}} instead of 'S'"
            )
        return ref if ref.shape == tuple(shape) else self.op("reshape", ref, out=tuple(shape), shape=list(shape))

    def broadcast_to(self, ref: Ref, shape: Shape) -> Ref:
        """Repeat unit axes up to `shape`."""
        ref = self.lift(ref, len(shape))
        if ref.shape == tuple(shape):
            return ref
        return self.op("tract_core_broadcast", ref, out=tuple(shape), shape=list(shape))

    def slice(self, ref: Ref, axis: int, begin: Dim, length: Dim, step: int = 1, end: Dim | None = None) -> Ref:
        """`length` elements of one axis from `begin`, every `step`th; tract needs explicit, non-negative bounds."""
        shape = (*ref.shape[:axis], length, *ref.shape[axis + 1 :])
        end = begin + length * step if end is None else end
        stride: dict[str, Any] = {"stride": [step]} if step != 1 else {}
        return self.op("slice", ref, out=shape, axes=[axis], begin=[begin], end=[end], **stride)

    def cast(self, ref: Ref, dtype: torch.dtype) -> Ref:
        """`ref` as `dtype`."""
        if ref.dtype == dtype:
            return ref
        return self.op("tract_core_cast", ref, dtype=dtype, hint="cast", to=tract_dtype(dtype, self.node.where()))

    def binary(
        self,
        operator: str,
        a: Ref | Scalar | Dim,
        b: Ref | Scalar | Dim,
        dtype: torch.dtype,
        result: torch.dtype | None = None,
    ) -> Ref:
        """`a operator b` with torch's broadcasting, both sides computed as `dtype`."""
        rank = max(side.rank for side in (a, b) if isinstance(side, Ref))
        sides = [self.lift(self.cast(s, dtype), rank) if isinstance(s, Ref) else self.scalar(s, dtype) for s in (a, b)]
        return self.op(operator, *sides, dtype=result or dtype)

    def scalar(self, value: Scalar | Dim, dtype: torch.dtype) -> Ref | float:
        """A number beside a tensor of `dtype`. A float literal is f32 to tract, and so the result beside a constant; an integer a TDim."""
        if not isinstance(value, (int, float)):
            return size(self, value, dtype)
        if dtype is torch.float32 and math.isfinite(value):
            return float(value)
        return self.full(value, dtype)

    # -- where values come from

    def is_fixed(self, value: Any) -> bool:
        """Whether `value`, an argument of the node, is the same whatever the inputs hold (their sizes may matter)."""
        seen, todo = set[str](), [value]
        while todo:
            for leaf in pytree.tree_leaves(todo.pop()):
                if not isinstance(leaf, Value) or leaf.name in seen:
                    continue
                seen.add(leaf.name)
                if (node := self._producers.get(leaf.name)) is None:
                    return False
                todo.append((node.args, dict(node.kwargs)))
        return True

    def is_non_negative(self, value: Value) -> bool:
        """Whether an index tensor is known to have no negative element, from how it was made."""
        node = self._producers.get(value.name)
        if node is None:
            return False
        name = _op_name(node)
        sources = [a for a in node.args if isinstance(a, Value)]
        if name == "arange":
            starts = [a for a in node.args if not isinstance(a, Value)]
            return len(starts) == 1 or (isinstance(starts[0], int) and starts[0] >= 0)
        if name in {
            "unsqueeze",
            "slice",
            "view",
            "reshape",
            "expand",
            "squeeze",
            "to",
            "clone",
            "argmax",
            "transpose",
            "permute",
        }:
            return name == "argmax" or self.is_non_negative(sources[0])
        if name in {"add", "mul"}:
            scalars = [a for a in node.args if not isinstance(a, Value)]
            return all(self.is_non_negative(s) for s in sources) and all(isinstance(s, int) and s >= 0 for s in scalars)
        return False


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """Shape of an element-wise result over shapes of one rank (unit axes stretch)."""
    rank = max(len(s) for s in shapes)
    aligned = [s for s in shapes if len(s) == rank]
    return tuple(next((d for d in dims if d != 1), 1) for dims in zip(*aligned, strict=True))


def _op_name(node: Node) -> str:
    """`linear` for aten.linear.default."""
    return node.target._schema.name.split("::")[1].strip("_")
