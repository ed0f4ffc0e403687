"""See what the weights of a running model are multiplied with, wherever they are used: modules, functional calls, slices, ties."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch_to_nnef.quantize.targets import Target
    from torch_to_nnef.torch_internals import OpOverload

_MOST = 256 << 20  # bytes of the unfolded inputs of a convolution


class Watch(TorchDispatchMode):
    """While it is entered, calls `multiplied(target, x, start, count)` and `looked_up(target, indices)`.

    A weight is recognised by where its values lie, so a slice, a transpose or a view of it is too.
    x: [R, G, K], R inputs of each of G of the `count` matrices of the weight, from matrix `start` on: a linear has one,
    a convolution one a group (its inputs are unfolded), a stack of experts one an expert.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        multiplied: Callable[[Target, torch.Tensor, int, int], None],
        looked_up: Callable[[Target, torch.Tensor], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_storage: dict[int, list[Target]] = defaultdict(list)
        for target in targets:
            if _is_plain(target.tensor):
                self._by_storage[target.tensor.untyped_storage().data_ptr()].append(target)
        self._multiplied, self._looked_up = multiplied, looked_up

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`; if it reads a target, say with what."""
        if (see := _SEEN.get(str(func.name()))) is not None:  # type: ignore[no-untyped-call]
            see(self, *args, *[value for name, value in (kwargs or {}).items() if name == "offs"])
        elif torch.is_inference_mode_enabled():  # where composed operators come whole
            with self:
                if (result := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return result
        return func(*args, **(kwargs or {}))

    def _target(self, tensor: Any) -> Target | None:
        """The target whose values begin where those of `tensor` do, or lie around there."""
        if not _is_plain(tensor):
            return None
        for target in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            start = target.tensor.storage_offset()
            if start <= tensor.storage_offset() < start + target.tensor.numel():
                return target
        return None

    def matrix(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        """`weight` [N, K] or [E, N, K], a view of a target if it is one, times x [R, K] or [E, R, K]."""
        if (target := self._target(weight)) is None:
            return
        rows = target.tensor.mT if target.transposed else target.tensor
        width = rows.shape[-1]
        if rows.dim() < 2 or not weight.shape[-1] == x.shape[-1] == width or weight.stride()[-2:] != rows.stride()[-2:]:
            return  # not the matrix itself: how it was used instead is not ours to learn from
        if rows.dim() == 2:
            self._multiplied(target, x.reshape(-1, 1, x.shape[-1]), 0, 1)
            return
        start = int(weight.storage_offset() - rows.storage_offset()) // rows.stride(0)
        self._multiplied(target, x[:, None] if x.dim() == 2 else x.transpose(0, 1), start, len(rows))

    def grouped(self, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor | None = None, *_: Any) -> None:
        """Rows [ends[e - 1], ends[e]) of x [R, K] times `weight` [E, K, N][e]."""
        if ends is None:
            return
        start = 0
        for matrix, end in zip(weight.mT, ends.tolist(), strict=True):
            if end > start:
                self.matrix(matrix, x[start:end])
            start = end

    def convolution(
        self, weight: torch.Tensor, x: torch.Tensor, geometry: Sequence[Sequence[int]], groups: int
    ) -> None:
        """`weight` [O, I / groups, *kernel] over x [B, I, *sizes]."""
        target = self._target(weight)
        if target is not None and weight.shape == target.tensor.shape and weight.dim() in (3, 4):
            self._multiplied(target, unfolded(x, weight.shape[2:], geometry, groups), 0, groups)

    def embedding(self, weight: torch.Tensor, indices: torch.Tensor, *_: Any) -> None:
        """Rows of `weight`."""
        if (target := self._target(weight)) is not None:
            self._looked_up(target, indices)


def unfolded(x: torch.Tensor, kernel: Sequence[int], geometry: Sequence[Sequence[int]], groups: int) -> torch.Tensor:
    """Inputs [R, groups, K] of the positions of a convolution over x [B, I, *sizes]; geometry: stride, padding, dilation.

    Of very many positions, which are alike where they lie close, some: evenly, as many as fit in 256 MiB.
    """
    stride, padding, dilation = (list(g) * (len(kernel) // len(g)) for g in geometry)
    if len(kernel) == 1:  # functional.unfold knows images only
        x, kernel, stride, padding, dilation = x[:, :, None], (1, *kernel), [1, *stride], [0, *padding], [1, *dilation]
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    positions = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    columns = x.shape[1] * math.prod(kernel)
    every = max(1, math.ceil(len(x) * positions * columns * 4 / _MOST))
    parts = []
    for index, sample in enumerate(x):
        inputs = functional.unfold(sample[None], kernel, dilation, padding, stride)[0]  # type: ignore[arg-type]
        parts.append(inputs[:, -(index * positions) % every :: every].T)
    return torch.cat(parts).reshape(-1, groups, columns // groups)


def _products(watch: Watch, a: torch.Tensor, b: torch.Tensor) -> None:
    """`a @ b`: either side may be the weight."""
    watch.matrix(b.mT, a)
    watch.matrix(a, b.mT)


def _is_plain(tensor: Any) -> bool:
    """Whether its values lie in a storage: not on meta, packed or on disk."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type != "meta"


# By name, since not all of them are in every version of torch.
_SEEN: Mapping[str, Callable[..., None]] = {
    "aten::mm": _products,
    "aten::bmm": _products,
    "aten::mv": lambda watch, a, x: watch.matrix(a, x[None]),
    "aten::addmm": lambda watch, bias, a, b: _products(watch, a, b),
    "aten::baddbmm": lambda watch, bias, a, b: _products(watch, a, b),
    "aten::addmv": lambda watch, bias, a, x: watch.matrix(a, x[None]),
    "aten::linear": lambda watch, x, weight, *bias: watch.matrix(weight, x.reshape(-1, x.shape[-1])),
    "aten::_grouped_mm": Watch.grouped,
    "transformers::grouped_mm_fallback": Watch.grouped,
    "aten::embedding": Watch.embedding,
    "aten::convolution": lambda watch, x, weight, bias, *geometry: (
        None if geometry[3] else watch.convolution(weight, x, geometry[:3], geometry[5])
    ),
}
