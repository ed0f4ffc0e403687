"""Tensors that know the name they have in the exported archive."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from typing_extensions import Self

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, expect
from torch_to_nnef.tensor.offload import OffloadedTensor
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater
from torch_to_nnef.torch_internals import no_torch_function


class NamedTensor(torch.Tensor):
    """A tensor that carries `nnef_name`.

    It shares memory and gradient history with `tensor`; results of operations are plain tensors.

    Args:
        tensor: Any strided tensor.
        nnef_name: Label of its variable.

    """

    nnef_name: str

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Self], tensor: torch.Tensor, nnef_name: str) -> Self:
        """Wrap `tensor`."""
        expect("tensor", tensor, torch.Tensor, "a tensor")
        if isinstance(tensor, (QTensor, OffloadedTensor)):
            raise T2NErrorInvalidArgument(f"{tensor!r} has values elsewhere: set its attribute nnef_name instead")
        named = tensor.as_subclass(cls)
        named.nnef_name = nnef_name
        return named

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedTensor:
        if id(self) not in memo:
            memo[id(self)] = NamedTensor(self.detach().clone().requires_grad_(self.requires_grad), self.nnef_name)
        return cast("NamedTensor", memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return NamedTensor, (self.as_subclass(torch.Tensor), self.nnef_name)


def apply_name_to_tensor_in_module(model: nn.Module) -> dict[str, torch.Tensor]:
    """Set `nnef_name` of every parameter and buffer to its fully qualified name; the objects stay the same.

    A tensor that several places share gets the first of its names, in the order of `model.named_modules()`.

    Returns:
        name -> tensor, one entry a tensor.

    """
    named = {}
    for name, tensor in ModTensorUpdater(model).tensors():
        tensor.nnef_name = name  # type: ignore[attr-defined]
        named[name] = tensor
    return named
