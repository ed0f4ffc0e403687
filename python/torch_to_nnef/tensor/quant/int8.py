"""`QTensorInt8`: a weight held as 8-bit affine codes.

One that knows the `QParams` of its inputs rounds them where it is multiplied, so that torch computes in floats what integer kernels do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import (
    T2NErrorImpossibleQuantization,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
)
from torch_to_nnef.tensor.chunks import flat_chunks
from torch_to_nnef.tensor.offload import loaded
from torch_to_nnef.tensor.quant.affine import RANGES, Affine8, QParams
from torch_to_nnef.tensor.quant.base import QTensor, refuse_writes
from torch_to_nnef.torch_internals import in_backward, is_composite, no_torch_function, pytree

if TYPE_CHECKING:
    from typing_extensions import Self

# Scales of a weight are at least this part of the largest: else the bias of a channel of zeros, which is counted in them,
# would not fit 32 bits.
_SMALLEST_SCALE = 2.0**-16


class QTensorInt8(QTensor):
    """A weight as 8-bit codes; `qscheme` is an `Affine8`.

    With `input_qparams`, whatever is multiplied or convolved with the weight is first rounded to those codes, also where the weight was
    transposed, cut or reshaped on the way (such views are no plain tensors until something else is computed with them). Gradients pass as
    if inputs were not rounded.
    """

    storage_name = "int8"
    qscheme: Affine8

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        axis: int | None,
        input_qparams: QParams | None = None,
        nnef_name: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        quant_min: int | None = None,
    ) -> Self:
        """Wrap codes that exist.

        Args:
            codes: int8 or uint8, in the shape of the weight.
            scale: `(1,)`, or `(n,)` with one for each index of `axis`; positive and finite.
            zero_point: Integers or floats, in the shape of `scale`.
            axis: None for one scale.
            input_qparams: Codes of what the weight is multiplied with.
            nnef_name: Name in messages and files.
            dtype: Float dtype this tensor shows and computes in.
            quant_min: Smallest code, if it is not that of the dtype.

        Raises:
            T2NErrorInvalidArgument: Codes of another dtype, a scale that is not positive and finite, an axis that does not exist.
            T2NErrorInconsistentTensor: Not as many scales or zero points as there must be.

        """
        if codes.dtype not in RANGES:
            raise T2NErrorInvalidArgument(f"codes must be int8 or uint8: got {codes.dtype}")
        if axis is not None and not -codes.dim() <= axis < codes.dim():
            raise T2NErrorInvalidArgument(f"codes of shape {tuple(codes.shape)} have no axis {axis}")
        scale = scale.detach().to(torch.float32).reshape(-1)
        if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise T2NErrorInvalidArgument(f"`{nnef_name or 'weight'}`: a scale is not positive and finite")
        exact = torch.float32 if zero_point.is_floating_point() else torch.int32
        low, high = RANGES[codes.dtype]
        scheme = Affine8(
            scale,
            zero_point.detach().to(exact).reshape(-1),
            None if axis is None else axis % codes.dim(),
            low if quant_min is None else quant_min,
            high,
            input_qparams,
        )
        blob = codes.detach().contiguous().view(torch.uint8).reshape(-1)
        return cls.from_packed(blob, codes.shape, scheme, dtype, nnef_name=nnef_name)

    def check_layout(self) -> None:
        """Raise `T2NErrorInconsistentTensor` unless there is a code for each value, and a scale for each index of the axis."""
        super().check_layout()
        scheme = self.qscheme
        if not isinstance(scheme, Affine8):
            raise T2NErrorInconsistentTensor(f"8-bit codes need Affine8: got {scheme}")
        n_scales = 1 if scheme.axis is None else self.shape[scheme.axis]
        sizes = {tuple(scheme.scale.shape), tuple(scheme.zero_point.shape)}
        if sizes != {(n_scales,)} or (not self.u8_compressors and self.u8_blob.numel() != self.numel()):
            raise T2NErrorInconsistentTensor(
                f"{self.u8_blob.numel()} codes with scales and zero points of shape {sizes} are not a weight of "
                f"shape {tuple(self.shape)} with {n_scales} scales"
            )

    @property
    def codes(self) -> torch.Tensor:
        """Codes (int8 or uint8) in the shape of the weight."""
        return loaded(self.decompress_to_u8()).view(self.qscheme.dtype)

    @property
    def axis(self) -> int | None:
        """Axis of the scales; None if there is one."""
        return self.qscheme.axis

    @property
    def input_qparams(self) -> QParams | None:
        """Codes of what the weight is multiplied with; None if that stays float."""
        return self.qscheme.input_qparams

    def decompress_slice(self, start: int, stop: int) -> torch.Tensor:
        """`decompress().flatten()[start:stop]`, reading only those codes."""
        if self.u8_compressors:
            return super().decompress_slice(start, stop)
        scheme, index = self.qscheme, torch.zeros(1, dtype=torch.long)
        if scheme.axis is not None:
            inner = self.shape[scheme.axis + 1 :].numel()
            index = torch.arange(start, stop) // inner % self.shape[scheme.axis]
        scale, zero_point = (loaded(p)[index] for p in (scheme.scale, scheme.zero_point))
        part = Affine8(scale, zero_point, None if scheme.axis is None else 0, scheme.quant_min, scheme.quant_max)
        return part.dequantize(self.u8_blob[start:stop], self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates a static default
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = pytree.tree_map_only(QTensorInt8, QTensorInt8._as_factor, args)
        if func not in _SAME and pytree.tree_any(lambda leaf: isinstance(leaf, _Factor), factors):
            refuse_writes(func, args, kwargs or {})
            return _Factor.__torch_dispatch__(func, types, factors, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _as_factor(self) -> torch.Tensor:
        return self if self.input_qparams is None else _Factor(self.decompress(), self.input_qparams)


class _Factor(torch.Tensor):
    """The values of a weight, or a view of them, that still know how the other factor is rounded."""

    value: torch.Tensor
    qparams: QParams

    __torch_function__ = no_torch_function  # type: ignore[assignment]  # torch annotates a method

    @staticmethod
    def __new__(cls: type[Self], value: torch.Tensor, qparams: QParams) -> Self:
        """Wrap `value`, a plain tensor."""
        factor = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.device,
        )
        factor.value, factor.qparams = value, qparams
        return factor

    def __tensor_flatten__(self) -> tuple[list[str], QParams]:
        return ["value"], self.qparams

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], qparams: QParams, outer_size: Any, outer_stride: Any
    ) -> _Factor:
        return _Factor(inner["value"], qparams)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates a static default
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):  # as in inference mode
            return func.decompose(*args, **kwargs)
        plain_args, kwargs = pytree.tree_map_only(_Factor, lambda factor: factor.value, (list(args), kwargs))
        if func in _VIEWS and isinstance(args[0], _Factor):
            views, qparams = func(*plain_args, **kwargs), args[0].qparams
            return pytree.tree_map_only(torch.Tensor, lambda view: _Factor(view, qparams), views)
        # Products of a backward pass have a gradient for the other factor.
        if func in _FACTORS and not in_backward():
            first, second = _FACTORS[func]
            for weight, other in ((first, second), (second, first)):
                if isinstance(args[weight], _Factor) and not isinstance(args[other], _Factor):
                    plain_args[other] = args[weight].qparams.fake(args[other])
        return func(*plain_args, **kwargs)


_aten = torch.ops.aten
# What gives the packed weight back: not what computes with it.
_SAME = {_aten.alias.default, _aten.clone.default, _aten.copy_.default, _aten.detach.default, _aten._to_copy.default}
_VIEWS = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}
# Positions of the two factors.
_FACTORS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.convolution.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.addmv.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}


def quantize_int8(
    weight: torch.Tensor,
    *,
    per_channel: bool = True,
    axis: int = 0,
    input_qparams: QParams | None = None,
    name: str = "",
) -> QTensorInt8:
    """`weight` (any float dtype) in codes from -127 to 127 with zero point 0; each scale is the largest magnitude / 127.

    Args:
        weight: Weight to quantize; walked in pieces.
        per_channel: One scale for each index of `axis`; else one for the tensor.
        axis: Axis of the output channels.
        input_qparams: Codes of what the weight is multiplied with.
        name: Name in messages and files.

    Raises:
        T2NErrorImpossibleQuantization: No values, NaN or Inf.

    """
    if not weight.numel() or not weight.dim():
        raise T2NErrorImpossibleQuantization(f"`{name}`: shape {tuple(weight.shape)} has no channels")
    axis = axis % weight.dim()
    # Channels first, so that a piece holds whole ones.
    rows = weight.detach() if axis == 0 else loaded(weight).detach().movedim(axis, 0)
    width = rows[0].numel()
    peaks = torch.cat([p.float().view(-1, width).abs().amax(1) for _, p in flat_chunks(rows, width)])
    if not bool(torch.isfinite(peaks).all()):
        raise T2NErrorImpossibleQuantization(f"`{name}` of shape {tuple(weight.shape)} has NaN or infinite values")
    largest = peaks.max()
    peaks = peaks.clamp(min=largest * _SMALLEST_SCALE) if per_channel else largest.reshape(1)
    scale = torch.where(largest / 127 >= torch.finfo(torch.float32).tiny, peaks / 127, torch.ones(()))
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    codes = torch.empty(rows.shape, dtype=torch.int8)
    flat = codes.view(-1)
    for start, piece in flat_chunks(rows, width):
        channels = slice(start // width, (start + len(piece)) // width) if per_channel else slice(1)
        scheme = Affine8(scale[channels], zero_point[channels], 0 if per_channel else None, -127, 127)
        flat[start : start + len(piece)] = scheme.quantize_as_u8(piece.view(-1, width)).view(torch.int8).view(-1)
    return QTensorInt8.from_codes(
        codes.movedim(0, axis),
        scale,
        zero_point,
        axis if per_channel else None,
        input_qparams,
        name or None,
        dtype=weight.dtype,
        quant_min=-127,
    )
