"""Weights packed for torch's integer engines, as parameters that say their codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph.quantized.values import OPERATORS, call
from torch_to_nnef.tensor.quant.int8 import QTensorInt8


def _as_is(x: Any) -> Any:
    return x


def product_of(function: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    """`function` of an input, a weight and a bias, with `options`."""
    return partial(_call, function, options)


def _call(function: Callable[..., torch.Tensor], options: Any, x: Any, weight: Any, bias: Any) -> torch.Tensor:
    return function(x, weight, bias, **options)


class Weight(nn.Module):
    """A weight packed for torch's engines, as a parameter, and the float product with it.

    It stands for a whole converted module: inputs, this weight and `arguments` go to `operator`, one of `OPERATORS`; without one, the
    product is all. `before` is done to the (first) input.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        function: Callable[..., torch.Tensor],
        operator: str = "",
        arguments: Sequence[Any] = (),
        before: Callable[[Any], Any] = _as_is,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.function, self.operator, self.arguments, self.before = function, operator, tuple(arguments), before

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, *args, **(kwargs or {}))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The linear layer, convolution or lookup itself."""
        return self.function(x, self.weight, self.bias)

    def forward(self, x: Any, *others: Any) -> Any:
        """What the converted module computes."""
        x = self.before(x)
        return OPERATORS[self.operator](x, *others, self, *self.arguments) if self.operator else self.product(x)


def as_int8(weight: torch.Tensor) -> QTensorInt8:
    """The codes of `weight`, a quantized tensor of torch.

    Raises:
        T2NErrorNotImplemented: Codes of 4 bits or less, or no codes.

    """
    if weight.dtype not in (torch.qint8, torch.quint8):
        raise T2NErrorNotImplemented(
            f"weights in {weight.dtype}: quantize them to torch.qint8 or torch.quint8, or leave them float"
        )
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero_point = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
        return QTensorInt8.from_codes(weight.int_repr(), scale, zero_point, None)
    return QTensorInt8.from_codes(
        weight.int_repr(),
        weight.q_per_channel_scales(),
        weight.q_per_channel_zero_points(),
        weight.q_per_channel_axis(),
    )
