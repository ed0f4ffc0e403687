"""Replace a tensor in every place of a module that holds it, so that shared weights stay shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument, expect
from torch_to_nnef.tensor.quant.base import QTensor

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Place:
    """Where a tensor is held: attribute `name` of `module`, called `fqn` from the root."""

    fqn: str
    module: nn.Module
    name: str

    @property
    def is_parameter(self) -> bool:
        """Whether it is registered as a parameter (else a buffer)."""
        return self.name in self.module._parameters

    def put(self, tensor: torch.Tensor) -> None:
        """Hold `tensor` here."""
        (self.module._parameters if self.is_parameter else self.module._buffers)[self.name] = tensor  # type: ignore[assignment]


class ModTensorUpdater:
    """Index of the parameters and buffers of `model`: tensor -> all places that hold it, kept up to date."""

    def __init__(self, model: nn.Module) -> None:
        expect("model", model, nn.Module, "a torch.nn.Module")
        self._entries: dict[int, tuple[torch.Tensor, list[Place]]] = {}
        self._by_name: dict[str, int] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                place = Place(f"{prefix}.{name}" if prefix else name, module, name)
                self._entries.setdefault(id(tensor), (tensor, []))[1].append(place)
                self._by_name[place.fqn] = id(tensor)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`(first name, tensor)` of each distinct tensor."""
        for tensor, places in self._entries.values():
            yield places[0].fqn, tensor

    def places(self, tensor: torch.Tensor) -> tuple[Place, ...]:
        """All places that hold `tensor`, in the order of `named_modules`.

        Raises:
            T2NErrorInvalidArgument: The model does not hold it.

        """
        expect("tensor", tensor, torch.Tensor, "a tensor")
        if id(tensor) not in self._entries:
            raise T2NErrorInvalidArgument(
                f"the model holds no such tensor (shape {tuple(tensor.shape)}, {tensor.dtype})"
            )
        return tuple(self._entries[id(tensor)][1])

    def get(self, name: str) -> torch.Tensor:
        """The tensor called `name` (any of its fully qualified names).

        Raises:
            T2NErrorInvalidArgument: No such name.

        """
        if name not in self._by_name:
            raise T2NErrorInvalidArgument(f"the model has no parameter or buffer `{name}`")
        return self._entries[self._by_name[name]][0]

    def update_by_ref(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Hold `new` wherever `old` is held; returns the object that is now held (a parameter where `old` was one).

        Raises:
            T2NErrorInvalidArgument: The model does not hold `old`.
            T2NErrorInconsistentTensor: `new` has another shape.

        """
        places = self.places(old)
        expect("new", new, torch.Tensor, "a tensor")
        if new.shape != old.shape:
            raise T2NErrorInconsistentTensor(
                f"`{places[0].fqn}` has shape {tuple(old.shape)}: cannot hold a tensor of shape {tuple(new.shape)}"
            )
        if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
            trainable = old.requires_grad and new.is_floating_point() and not isinstance(new, QTensor)
            new = nn.Parameter(new, requires_grad=trainable)
        for place in places:
            place.put(new)
        del self._entries[id(old)]
        held = self._entries.setdefault(id(new), (new, []))[1]
        held.extend(places)
        self._by_name.update({place.fqn: id(new) for place in places})
        return new

    def update_by_name(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """`update_by_ref` of the tensor called `name`."""
        return self.update_by_ref(self.get(name), new)
