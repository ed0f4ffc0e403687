"""Which weights a method is asked for, and which of them may be Q40 or 8-bit codes.

tract computes with Q40 in few places only (`linear`, `matmul` or `einsum` with groups along K, `conv` filters,
`gather`); elsewhere it is silently wrong or crashes. So the use decides: of the captured graph where it is known, else
of the module's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, expect
from torch_to_nnef.quantize.folds import Fold
from torch_to_nnef.quantize.norms import Norm
from torch_to_nnef.tensor.quant.base import FLOAT_DTYPES, QTensor
from torch_to_nnef.tensor.quant.padded import row_padding
from torch_to_nnef.tensor.quant.qtract import q40_shape_reason
from torch_to_nnef.tensor.updater import ModTensorUpdater, Place


class Use(str, Enum):
    """How a graph consumes a parameter. As LINEAR it is [N, K] and summed over K; as MATMUL, `x @ weight`, it is [K, N].

    As EXPERTS it is a stack of such matrices [E, N, K].
    """

    LINEAR = "linear"
    MATMUL = "matmul"
    EXPERTS = "experts"
    ROUTER = "router of experts"
    CONV = "conv"
    DEPTHWISE_CONV = "depthwise conv"
    EMBEDDING = "embedding"
    CONV_TRANSPOSE = "conv_transpose"
    OTHER = "other operators"


Filter = str | re.Pattern[str] | Callable[[nn.Module, str], bool]
Filters = Filter | Sequence[Filter]
DEFAULT_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
_CLASS_USE: tuple[tuple[type[nn.Module], Use], ...] = (
    (nn.Linear, Use.LINEAR),
    (nn.Embedding, Use.EMBEDDING),
    (nn.Conv1d, Use.CONV),
    (nn.Conv2d, Use.CONV),
    (nn.Conv3d, Use.CONV),
    (nn.modules.conv._ConvTransposeNd, Use.CONV_TRANSPOSE),
)
# Elements from which a parameter is worth a row in a report.
_LARGE = 1024
EXCLUDED = "excluded by the caller"
_Q40_BITS = 4.5
_LEGAL = frozenset({Use.LINEAR, Use.MATMUL, Use.EXPERTS, Use.CONV, Use.EMBEDDING})
_LEGAL_INT8 = frozenset({Use.LINEAR, Use.MATMUL, Use.CONV, Use.DEPTHWISE_CONV, Use.EMBEDDING})


@dataclass(frozen=True)
class Selection:
    """Narrows what a method is asked for.

    Attributes:
        uses: Parameter name -> how the captured graph consumes it; None if no graph is known. Names of a shared weight
            may
            each be listed: their uses add up.
        include: Only weights that match; None for all.
        exclude: Not weights that match.
        folds: Where the captured graph lets inputs of weights be scaled.
        norms: Batch norms that the convolution before them can take up.
        pad: Quantize matrices too whose rows need zeros behind them, where their readers allow it and f16 is not smaller.

    A filter is a glob (on the name of the weight or of its module), a regex (compiled, or as text between slashes; searched in the
    name of the weight), or a callable `(module, name of the weight) -> bool`; a list matches if one of its filters does.

    """

    uses: Mapping[str, frozenset[Use]] | None = None
    include: Filters | None = None
    exclude: Filters | None = None
    folds: Sequence[Fold] = ()
    norms: Sequence[Norm] = ()
    pad: bool = False


@dataclass(frozen=True)
class Target:
    """A weight that a method was asked for.

    Attributes:
        tensor: The weight.
        places: Where the model holds it.
        reason: Why it cannot be quantized; None if it can.
        transposed: Whether its transpose is to be quantized, since groups run along the axis that is summed.
        padding: Zeros to put behind each of its rows.

    """

    tensor: torch.Tensor
    places: tuple[Place, ...]
    reason: str | None
    transposed: bool = False
    padding: int = 0

    @property
    def has_wrong_rows(self) -> bool:
        """Whether the shape alone is what Q40 cannot hold, of a weight in a use that it could have."""
        return self.reason is not None and self.reason == q40_shape_reason(self.rows_shape)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of the tensor whose rows are divided into groups."""
        shape = tuple(self.tensor.shape)
        return (*shape[:-2], *reversed(shape[-2:])) if self.transposed else shape

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return self.tensor.numel() * self.tensor.element_size()


def q40_reason(tensor: torch.Tensor, uses: frozenset[Use] | None) -> str | None:
    """Why tract could not use `tensor` as Q40; None if it can. `uses=None` is unknown: judged by dtype and shape."""
    if tensor.dtype not in FLOAT_DTYPES:
        return f"{tensor.dtype} values: Q40 stores floats"
    if tensor.is_meta:
        return "on the meta device: there are no values to quantize"
    if uses is not None and not uses:
        return "the graph does not use it"
    if illegal := sorted(use.value for use in (uses or frozenset()) - _LEGAL):
        return f"used by {', '.join(illegal)}: tract computes with Q40 only in linear, conv and embedding"
    uses, shape = uses or frozenset(), tuple(tensor.shape)
    if Use.MATMUL in uses:
        if len(uses) > 1:
            return (
                f"used by {', '.join(sorted(uses))}: Q40 groups run along one axis, which these sum over different ones"
            )
        shape = (*shape[:-2], *reversed(shape[-2:]))
    return q40_shape_reason(shape) or _use_shape_reason(shape, uses)


def int8_reason(tensor: torch.Tensor, uses: frozenset[Use] | None) -> str | None:
    """Why `tensor` could not be 8-bit codes; None if it can. `uses=None` is unknown: judged by dtype and shape."""
    if tensor.dtype not in FLOAT_DTYPES or tensor.is_meta or not tensor.numel():
        return f"{tensor.dtype} on {tensor.device}, shape {tuple(tensor.shape)}: there are no floats to quantize"
    if uses is not None and not uses:
        return "the graph does not use it"
    uses = uses or frozenset()
    if illegal := sorted(use.value for use in uses - _LEGAL_INT8):
        return f"used by {', '.join(illegal)}: 8-bit products are those of linear, conv and embedding"
    if Use.MATMUL in uses and len(uses) > 1:
        return f"used by {', '.join(sorted(uses))}: each has a scale for another axis"
    if uses & {Use.LINEAR, Use.MATMUL, Use.EMBEDDING} and tensor.dim() != 2:
        return f"rank {tensor.dim()}: as a linear or embedding weight 8-bit codes must be a matrix"
    return None


Reason = Callable[[torch.Tensor, frozenset[Use] | None], str | None]
"""Why a format cannot hold a tensor that is used so; None if it can."""


def find_targets(
    model: nn.Module,
    classes: Sequence[type[nn.Module]] | None,
    selection: Selection | None = None,
    reason_of: Reason = q40_reason,
) -> list[Target]:
    """Weights of `model` asked for by `classes` (default: Linear, Embedding, Conv1d, Conv2d and their subclasses).

    Asked for are the `weight` of modules of these classes and, where the graph's uses are known, whatever it uses as
    they do. With all of the default classes, that is every large parameter the graph uses, so that one in a use tract
    has no kernel for is listed too. Excluded weights stay in the list with their reason; weights outside `include` do not.

    Raises:
        T2NErrorInvalidArgument: `include` is given and selects nothing.

    """
    selection = selection or Selection()
    expect("classes", classes, (Collection, type(None)), "a list of module classes")
    wanted = DEFAULT_CLASSES if classes is None else tuple(classes)
    for cls in wanted:
        expect("classes", cls, type, "a class of modules")
    everything = set(DEFAULT_CLASSES) <= set(wanted)
    wanted_uses = {use for known, use in _CLASS_USE if issubclass(known, wanted)}
    wanted_uses |= {Use.MATMUL, Use.EXPERTS} if Use.LINEAR in wanted_uses else set()
    updater, targets = ModTensorUpdater(model), []
    for _, tensor in updater.tensors():
        places = updater.places(tensor)
        uses = _uses_of(places, selection.uses)
        asked = any(p.name == "weight" and isinstance(p.module, wanted) for p in places)
        if selection.uses is not None and uses is not None:
            asked = asked or bool(uses & wanted_uses) or bool(everything and uses and _is_large(tensor, places))
        if not asked or not (selection.include is None or _matches(selection.include, places)):
            continue
        excluded = selection.exclude is not None and _matches(selection.exclude, places)
        packed = "already quantized" if isinstance(tensor, QTensor) else None
        reason = EXCLUDED if excluded else packed or reason_of(tensor, uses)
        target = Target(tensor, places, reason, transposed=Use.MATMUL in (uses or ()))
        if selection.pad and target.has_wrong_rows and _may_be_padded(target, uses):
            target = replace(target, reason=None, padding=row_padding(tensor.shape[1]))
        targets.append(target)
    if selection.include is not None and not targets:
        names = ", ".join(c.__name__ for c in wanted)
        raise T2NErrorInvalidArgument(f"include={selection.include!r} selects none of the weights of {names} modules")
    return targets


def _may_be_padded(target: Target, uses: frozenset[Use] | None) -> bool:
    """Whether all that reads it can do with zeros behind its rows, and these take less than f16 without them."""
    shape = target.tensor.shape
    reads = bool(uses) and uses is not None and uses <= {Use.LINEAR, Use.EMBEDDING}
    recurrent = any(isinstance(p.module, (nn.RNNBase, nn.RNNCellBase)) for p in target.places)
    if not reads or recurrent or len(shape) != 2 or not shape.numel():
        return False
    return _Q40_BITS * (shape[1] + row_padding(shape[1])) < 16 * shape[1]


def _is_large(tensor: torch.Tensor, places: Sequence[Place]) -> bool:
    return places[0].is_parameter and tensor.dim() > 1 and tensor.numel() >= _LARGE


def _uses_of(places: Iterable[Place], known: Mapping[str, frozenset[Use]] | None) -> frozenset[Use] | None:
    """Union over the places; None where neither the graph nor a class tells. A parameter the graph lacks has no use."""
    if known is not None:
        return frozenset().union(*(known.get(place.fqn, frozenset()) for place in places))
    by_class = [_class_uses(p) for p in places]
    return frozenset().union(*by_class) if all(by_class) else None


def _class_uses(place: Place) -> set[Use]:
    if place.name != "weight":
        return set()
    uses = {use for known, use in _CLASS_USE if isinstance(place.module, known)}
    depthwise = (
        isinstance(place.module, nn.modules.conv._ConvNd) and place.module.groups == place.module.in_channels > 1
    )
    return {Use.DEPTHWISE_CONV} if depthwise and Use.CONV in uses else uses


def _use_shape_reason(shape: Sequence[int], uses: frozenset[Use]) -> str | None:
    if uses & {Use.LINEAR, Use.MATMUL, Use.EMBEDDING} and len(shape) != 2:
        return f"rank {len(shape)}: as a linear or embedding weight Q40 must be a matrix"
    if Use.EXPERTS in uses and (len(shape) != 3 or shape[-1] % 32):
        return f"{' x '.join(map(str, shape))}: as weights of experts Q40 must be a stack of matrices with rows of a multiple of 32"
    if Use.CONV in uses and len(shape) > 4:
        return f"rank {len(shape)}: tract's Q40 convolutions have one or two spatial dimensions"
    return None


def _matches(filters: Filters, places: Iterable[Place]) -> bool:
    return any(_match_one(one, place) for one in as_filters(filters) for place in places)


def as_filters(filters: Filters) -> Iterator[Filter]:
    """One filter or several, as several."""
    if isinstance(filters, (str, re.Pattern)) or callable(filters):
        yield filters
    elif isinstance(filters, Collection):
        yield from filters
    else:
        raise _no_filter(filters)


def _no_filter(given: object) -> T2NErrorInvalidArgument:
    return T2NErrorInvalidArgument(
        f"a filter is a glob, a compiled regex or a callable (module, name) -> bool, or a list of them: got {given!r}"
    )


def _match_one(one: Filter, place: Place) -> bool:
    if isinstance(one, str) and len(one) > 2 and one[0] == one[-1] == "/":
        one = _compiled(one[1:-1])
    if isinstance(one, str):
        return fnmatchcase(place.fqn, one) or fnmatchcase(place.fqn.rpartition(".")[0], one)
    if isinstance(one, re.Pattern):
        return one.search(place.fqn) is not None
    if not callable(one):
        raise _no_filter(one)
    return bool(one(place.module, place.fqn))


@cache
def _compiled(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise T2NErrorInvalidArgument(f"/{regex}/ is not a regex: {error}") from error
