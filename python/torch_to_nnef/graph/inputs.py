"""The user's sample inputs: flattened, named, with their dynamic axes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_to_nnef.exceptions import (
    T2NErrorDynamicShapeValue,
    T2NErrorInvalidArgument,
    T2NErrorIoQuantity,
    T2NErrorNotImplemented,
    expect,
    listed,
)
from torch_to_nnef.graph.axes import axis_expression, solved, symbol
from torch_to_nnef.torch_internals import pytree

Args = tuple[Any, ...] | list[Any] | dict[str, Any] | torch.Tensor
DynamicAxes = Mapping[str, Mapping[int, str]]

# tract 0.23.9 reads a literal at the start of such an identifier (`inflow`, `true_mask`), and fails on the rest.
MISREAD = re.compile("true|false|inf")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words of the NNEF grammar (spec 1.0.5, section 2) that cannot name a tensor.
_RESERVED = frozenset(
    {
        "version",
        "extension",
        "graph",
        "fragment",
        "tensor",
        "integer",
        "scalar",
        "logical",
        "string",
        "true",
        "false",
        "for",
        "in",
        "if",
        "else",
        "yield",
        "lengthof",
        "shape_of",
        "range_of",
    }
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Flat tensors with one name each; `axes[i]` maps an axis of input i to its size: a symbol, or an expression (`2*S`)."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    axes: tuple[Mapping[int, str], ...]
    spec: pytree.TreeSpec

    def unflatten(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of the model with `leaves` in the place of the tensors."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    def symbols(self) -> tuple[str, ...]:
        """Names of all symbols, in order of appearance."""
        sizes = (axis_expression(text) for axes in self.axes for text in axes.values())
        return tuple(dict.fromkeys(name for size in sizes for name in sorted(map(str, size.free_symbols))))

    def sizes(self) -> dict[str, int]:
        """Size of every symbol in these samples."""
        return traced_sizes(self.names, self.tensors, self.axes)

    def resized(self, sizes: Mapping[str, int]) -> Inputs:
        """Samples at other sizes: rows are repeated or cut, so that ids and masks stay legal."""
        return replace(
            self, tensors=tuple(resize(t, axis_sizes(a, sizes)) for t, a in zip(self.tensors, self.axes, strict=True))
        )


def axis_sizes(axes: Mapping[int, str], sizes: Mapping[str, int]) -> dict[int, int]:
    """Axis -> size where the symbols have these sizes."""
    values = {symbol(name): size for name, size in sizes.items()}
    return {axis: int(axis_expression(text).subs(values)) for axis, text in axes.items()}


def traced_sizes(
    names: Sequence[str], tensors: Sequence[torch.Tensor], axes: Sequence[Mapping[int, str]]
) -> dict[str, int]:
    """Size of every symbol in these samples; raises `T2NErrorDynamicShapeValue` if they disagree."""
    return solved(
        (text, tensor.shape[axis], repr(name))
        for name, tensor, by_axis in zip(names, tensors, axes, strict=True)
        for axis, text in by_axis.items()
    )


def resize(tensor: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """`tensor` with axis sizes replaced; indices cycle over the old size, an empty axis (a cache, say) grows zeros."""
    for axis, size in sizes.items():
        old = tensor.shape[axis]
        if old == 0:
            tensor = tensor.new_zeros([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
        elif size != old:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % old)
    return tensor


def prepare(
    model: torch.nn.Module,
    args: Args,
    input_names: Sequence[str] | None,
    dynamic_axes: DynamicAxes | None,
    counts_must_match: bool = True,
) -> Inputs:
    """Flatten and name `args`: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Unless counts must match, forward's own names follow where `input_names` are too few, and the rest of too many is ignored.

    Raises: `T2NErrorInvalidArgument` for what is no tensor, or for a bad or repeated name; `T2NErrorIoQuantity` when the names are not one
    a tensor; `T2NErrorDynamicShapeValue` for an axis that does not exist.
    """
    if isinstance(args, torch.Tensor):
        args = (args,)
    expect("args", args, (tuple, list, Mapping), "a tensor, a tuple of positional or a dict of keyword arguments")
    structure: tuple[tuple[Any, ...], dict[str, Any]] = (
        ((), dict(args)) if isinstance(args, Mapping) else (tuple(args), {})
    )
    leaves, spec = pytree.tree_flatten(structure)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            raise T2NErrorInvalidArgument(
                f"argument {index} of the model is {type(leaf).__name__} ({leaf!r:.80}); an exported graph takes tensors only: "
                "bind other values first, e.g. in a wrapper module or with functools.partial"
            )
        if leaf.is_quantized or leaf.layout is not torch.strided:
            raise T2NErrorNotImplemented(
                f"argument {index} of the model is a tensor of {leaf.dtype}, {leaf.layout}; inputs of an archive are dense: "
                "pass it as .dequantize() or .to_dense() gives it"
            )
    defaults = _default_names(model, structure)
    names = defaults if input_names is None else listed("input_names", input_names)
    if not counts_must_match:
        names = (names + defaults[len(names) :])[: len(leaves)]
    if len(names) != len(leaves):
        raise T2NErrorIoQuantity(f"{len(names)} input names {list(names)} for {len(leaves)} input tensors")
    check_names(names, "input")
    # torch would take the place where a slice begins for a size, and make it a symbol.
    leaves = [leaf.clone() if dynamic_axes and leaf.storage_offset() else leaf for leaf in leaves]
    return Inputs(names, tuple(leaves), _axes_by_input(names, leaves, dynamic_axes or {}), spec)


def check_names(names: Sequence[str], kind: str) -> None:
    """Refuse names that graph.nnef cannot hold, and repeated ones."""
    for name in names:
        if not _IDENTIFIER.fullmatch(name) or name in _RESERVED:
            raise T2NErrorInvalidArgument(
                f"{kind} name {name!r} is not an NNEF identifier (letters, digits, _; no keyword)"
            )
        if MISREAD.match(name):
            raise T2NErrorInvalidArgument(
                f"{kind} name {name!r}: tract cannot read names that start with true, false or inf; choose another ({kind}_names=)"
            )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise T2NErrorInvalidArgument(f"{kind} names must differ; repeated: {repeated}")


def _default_names(model: torch.nn.Module, structure: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[str, ...]:
    """Names of forward's parameters; a nested argument adds the path within it."""
    args, kwargs = structure
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.POSITIONAL_ONLY]
    named = {positional[i] if i < len(positional) else f"{variadic}_{i}": arg for i, arg in enumerate(args)} | kwargs
    paths, _ = pytree.tree_flatten_with_path(named)
    return tuple(
        "_".join(re.sub(r"\W+", "_", str(getattr(key, "key", getattr(key, "idx", key)))).strip("_") for key in path)
        for path, _ in paths
    )


def _axes_by_input(
    names: Sequence[str], leaves: Sequence[torch.Tensor], dynamic_axes: DynamicAxes
) -> tuple[dict[int, str], ...]:
    unknown = sorted(set(dynamic_axes) - set(names))
    if unknown:
        raise T2NErrorDynamicShapeValue(f"dynamic_axes names {unknown}, but the inputs are {list(names)}")
    result = []
    for name, leaf in zip(names, leaves, strict=True):
        axes: dict[int, str] = {}
        for axis, text in dynamic_axes.get(name, {}).items():
            if not isinstance(axis, int) or not -leaf.dim() <= axis < leaf.dim():
                raise T2NErrorDynamicShapeValue(
                    f"dynamic_axes[{name!r}] has axis {axis!r}, but {name!r} has rank {leaf.dim()}"
                )
            text = _axis(text, f"dynamic_axes[{name!r}][{axis}]", names)
            if axes.setdefault(axis % leaf.dim(), text) != text:
                raise T2NErrorDynamicShapeValue(
                    f"dynamic_axes[{name!r}][{axis}] = {text!r}: that axis is {axes[axis % leaf.dim()]!r} already"
                )
        result.append(axes)
    traced_sizes(names, leaves, result)
    return tuple(result)


def _axis(text: object, where: str, names: Sequence[str]) -> str:
    if not isinstance(text, str):
        raise T2NErrorDynamicShapeValue(f"{where} = {text!r} is not a name")
    for used in map(str, axis_expression(text).free_symbols):
        if not _IDENTIFIER.fullmatch(used) or used in _RESERVED or used in names or MISREAD.match(used):
            raise T2NErrorDynamicShapeValue(
                f"{where} = {text!r}: {used!r} is not a free identifier (no keyword, no input, no start with true, false or inf)"
            )
    return text
