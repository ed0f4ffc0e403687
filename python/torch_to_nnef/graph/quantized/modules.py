"""Each converted module and what stands in for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.nn.quantized.reference as nnqr
from torch import fx, nn
from torch.nn import functional

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.graph.quantized import CONVERTED, graphs
from torch_to_nnef.graph.quantized.values import Quantized, onto, per_tensor
from torch_to_nnef.graph.quantized.weights import Weight, as_int8, product_of
from torch_to_nnef.tensor.quant import as_half
from torch_to_nnef.torch_internals import pytree

_WINDOW = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_WINDOW = (*_WINDOW, "output_padding")


def copied(model: nn.Module) -> nn.Module:
    """A copy of `model` with something else in the place of every converted module and packed weight."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        cls = type(module)
        if id(module) not in shared and cls.__module__.startswith(CONVERTED) and cls not in _AS_THEY_ARE:
            if cls not in STAND_INS:
                raise _refused(path, module)
            try:
                shared[id(module)] = _named(STAND_INS[cls](module), cls)
            except T2NErrorNotImplemented as error:
                raise T2NErrorNotImplemented(f"module `{path}`: {error}") from None
            shared.update((id(part), part) for part in module.modules() if part is not module)
        if isinstance(module, fx.GraphModule):
            shared.update(graphs.packed_weights(module))
    result = copy.deepcopy(model, shared)
    for module in result.modules():
        if isinstance(module, fx.GraphModule):
            graphs.rewrite(module)
    result.register_forward_hook(_only_floats)
    return result


def _named(made: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Reports say the class of a module: let it be the one that was converted."""
    made.__class__ = type(cls.__name__, (type(made),), {})
    return made


class Quantize(nn.Module):
    """Stands for `nnq.Quantize`."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.qparams = per_tensor(source.scale, source.zero_point, source.dtype)

    def forward(self, x: torch.Tensor) -> Quantized:
        """Round to codes."""
        return onto(x, self.qparams)


class Bag(nn.Module):
    """Stands for `nnq.EmbeddingBag`, which sums rows whatever its mode."""

    def __init__(self, weight: torch.Tensor, include_last_offset: bool) -> None:
        super().__init__()
        self.weight, self.include_last_offset = nn.Parameter(weight, requires_grad=False), include_last_offset

    def forward(
        self, indices: torch.Tensor, offsets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sums of the rows of each bag, each row times its weight if there are weights."""
        return functional.embedding_bag(
            indices,
            self.weight,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=self.include_last_offset,
        )


def _linear(source: Any, operator: str, *arguments: Any) -> Weight:
    weight, bias = source._weight_bias()
    return Weight(as_int8(weight), bias, functional.linear, operator, arguments)


def _static_linear(operator: str, *names: str) -> Callable[[Any], Weight]:
    return lambda source: _linear(
        source, operator, source.scale, source.zero_point, *(getattr(source, name) for name in names)
    )


def _dynamic_linear(operator: str) -> Callable[[Any], Weight]:
    def made(source: Any) -> Weight:
        if source._packed_params.dtype == torch.float16:
            weight, bias = source._weight_bias()
            return Weight(as_half(weight), bias, functional.linear, operator.replace("_dynamic", "_dynamic_fp16"))
        # From version 4 on, activations have 7 bits, but never for qnnpack.
        seven = (source.version or 0) >= 4 and torch.backends.quantized.engine != "qnnpack"
        return _linear(source, operator, seven)

    return made


def _conv(operator: str, function: Callable[..., torch.Tensor]) -> Callable[[Any], Weight]:
    def made(source: Any) -> Weight:
        weight, bias = source._weight_bias()
        arguments = source.scale, source.zero_point
        options = {name: getattr(source, name) for name in _WINDOW}
        if source.padding_mode == "zeros":
            return Weight(as_int8(weight), bias, product_of(function, **options), operator, arguments)
        around = [size for size in reversed(source.padding) for _ in range(2)]
        product = product_of(function, **{**options, "padding": 0})
        before = partial(functional.pad, pad=around, mode=source.padding_mode)
        return Weight(as_int8(weight), bias, product, operator, arguments, before)

    return made


def _transposed(operator: str, function: Callable[..., torch.Tensor]) -> Callable[[Any], Weight]:
    def made(source: Any) -> Weight:
        weight, bias = source._weight_bias()
        product = product_of(function, **{name: getattr(source, name) for name in _TRANSPOSED_WINDOW})
        return Weight(as_int8(weight), bias, product, operator, (source.scale, source.zero_point))

    return made


def _reference(function: Callable[..., torch.Tensor], *names: str) -> Callable[[Any], Weight]:
    """For modules of `convert_to_reference_fx`, which compute in floats."""

    def made(source: Any) -> Weight:
        product = product_of(function, **{name: getattr(source, name) for name in names})
        return Weight(as_int8(source.get_quantized_weight()), source.bias, product)

    return made


def _embedding(source: Any) -> Weight:
    return Weight(as_int8(source.weight()), None, lambda indices, weight, _: functional.embedding(indices, weight))


def _bag(source: Any) -> nn.Module:
    return Bag(as_int8(source.weight()), source.include_last_offset)


def _numbered(source: nn.Module) -> nn.Module:
    """The module itself, its scale and zero point as numbers instead of buffers, since a graph holds them as such."""
    made: nn.Module = source.__class__.__new__(source.__class__)
    made.__dict__ = {name: copy.copy(held) if isinstance(held, dict) else held for name, held in vars(source).items()}
    for name, number in (("scale", float), ("zero_point", int)):
        value: Any = made._buffers.pop(name, None)
        value = getattr(source, name) if value is None else value
        made.__dict__[name] = number(value)
    return made


def _prelu(source: Any) -> nn.Module:
    made = _numbered(source)
    made.weight = nn.Parameter(source.weight.dequantize(), requires_grad=False)
    return made


STAND_INS: Mapping[type, Callable[[Any], nn.Module]] = {
    nnq.Quantize: Quantize,
    nnq.Linear: _static_linear("quantized::linear"),
    nniq.LinearReLU: _static_linear("quantized::linear_relu"),
    nniq.LinearLeakyReLU: _static_linear("quantized::linear_leaky_relu", "negative_slope"),
    nniq.LinearTanh: _static_linear("quantized::linear_tanh"),
    nnqd.Linear: _dynamic_linear("quantized::linear_dynamic"),
    nniqd.LinearReLU: _dynamic_linear("quantized::linear_relu_dynamic"),
    nnq.Conv1d: _conv("quantized::conv1d", functional.conv1d),
    nnq.Conv2d: _conv("quantized::conv2d", functional.conv2d),
    nnq.Conv3d: _conv("quantized::conv3d", functional.conv3d),
    nniq.ConvReLU1d: _conv("quantized::conv1d_relu", functional.conv1d),
    nniq.ConvReLU2d: _conv("quantized::conv2d_relu", functional.conv2d),
    nniq.ConvReLU3d: _conv("quantized::conv3d_relu", functional.conv3d),
    nniq.ConvAdd2d: _conv("quantized::conv2d_add", functional.conv2d),
    nniq.ConvAddReLU2d: _conv("quantized::conv2d_add_relu", functional.conv2d),
    nnq.ConvTranspose1d: _transposed("quantized::conv_transpose1d", functional.conv_transpose1d),
    nnq.ConvTranspose2d: _transposed("quantized::conv_transpose2d", functional.conv_transpose2d),
    nnq.ConvTranspose3d: _transposed("quantized::conv_transpose3d", functional.conv_transpose3d),
    nnq.Embedding: _embedding,
    nnq.EmbeddingBag: _bag,
    **dict.fromkeys(
        (
            *(nnq.BatchNorm2d, nnq.BatchNorm3d, nniq.BNReLU2d, nniq.BNReLU3d, nnq.LayerNorm, nnq.GroupNorm),
            *(nnq.InstanceNorm1d, nnq.InstanceNorm2d, nnq.InstanceNorm3d),
            *(nnq.Hardswish, nnq.ELU, nnq.LeakyReLU, nnq.Sigmoid, nnq.Softmax, nnq.QFunctional),
        ),
        _numbered,
    ),
    nnq.PReLU: _prelu,
    nnqr.Linear: _reference(functional.linear),
    nnqr.Conv1d: _reference(functional.conv1d, *_WINDOW),
    nnqr.Conv2d: _reference(functional.conv2d, *_WINDOW),
    nnqr.Conv3d: _reference(functional.conv3d, *_WINDOW),
    nnqr.ConvTranspose1d: _reference(functional.conv_transpose1d, *_TRANSPOSED_WINDOW),
    nnqr.ConvTranspose2d: _reference(functional.conv_transpose2d, *_TRANSPOSED_WINDOW),
    nnqr.ConvTranspose3d: _reference(functional.conv_transpose3d, *_TRANSPOSED_WINDOW),
}
# Their own code does, given `Quantized` values.
_AS_THEY_ARE = (
    nnq.DeQuantize,
    nnq.Dropout,
    nnq.ReLU6,
    nnq.FloatFunctional,
    nnq.FXFloatFunctional,
    nnq.MultiheadAttention,
)


def _refused(path: str, module: nn.Module) -> T2NErrorNotImplemented:
    cls = type(module)
    return T2NErrorNotImplemented(
        f"module `{path}` is a {cls.__module__}.{cls.__name__}, which has no reference form: "
        "leave it float when you convert the model, or give the float model to "
        'quantize_and_verify(method="int8", calibration=...)'
    )


def _only_floats(module: nn.Module, args: Any, output: Any) -> None:
    if any(isinstance(leaf, Quantized) for leaf in pytree.tree_leaves(output)):
        raise T2NErrorNotImplemented("the model returns a quantized tensor: end it with a DeQuantStub")
