"""See what the weights of a running model are multiplied with, wherever they are used: modules, functional calls, slices, ties."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from torch_to_nnef.tensor.quant.base import QTensor

if TYPE_CHECKING:
    from torch_to_nnef.quantize.targets import Target
    from torch_to_nnef.torch_internals import OpOverload

aten = torch.ops.aten
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
        self._by_storage = {
            t.tensor.untyped_storage().data_ptr(): t for t in targets if not isinstance(t.tensor, QTensor)
        }
        self._multiplied, self._looked_up = multiplied, looked_up

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`; if it reads a target, say with what."""
        if (see := _SEEN.get(func)) is not None:
            see(self, *args)
        return func(*args, **(kwargs or {}))

    def _target(self, tensor: Any) -> Target | None:
        known = isinstance(tensor, torch.Tensor) and tensor.device.type != "meta"
        return self._by_storage.get(tensor.untyped_storage().data_ptr()) if known else None

    def matrix(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        """`weight` [N, K] or [E, N, K], a view of a target if it is one, times x [R, K] or [E, R, K]."""
        if (target := self._target(weight)) is None:
            return
        rows = target.tensor.mT if target.transposed else target.tensor
        if rows.dim() < 2 or weight.shape[-1] != rows.shape[-1] or weight.stride()[-2:] != rows.stride()[-2:]:
            return  # not the matrix itself: how it was used instead is not ours to learn from
        offset = weight.storage_offset() - rows.storage_offset()
        count, start = (len(rows), int(offset) // rows.stride(0)) if rows.dim() == 3 else (1, 0)
        self._multiplied(target, x[:, None] if x.dim() == 2 else x.transpose(0, 1), start, count)

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


_SEEN: Mapping[OpOverload, Callable[..., None]] = {
    aten.mm.default: _products,
    aten.bmm.default: _products,
    aten.addmm.default: lambda watch, bias, a, b: _products(watch, a, b),
    aten.baddbmm.default: lambda watch, bias, a, b: _products(watch, a, b),
    aten.linear.default: lambda watch, x, weight, *bias: watch.matrix(weight, x.reshape(-1, x.shape[-1])),
    aten.embedding.default: Watch.embedding,
    aten.convolution.default: lambda watch, x, weight, bias, *geometry: (
        None if geometry[3] else watch.convolution(weight, x, geometry[:3], geometry[5])
    ),
}
