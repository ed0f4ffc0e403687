"""Q40 in torch: 4-bit codes in groups of 32 consecutive elements, one f16 scale a group; what tract and GGUF call Q4_0.

Held as two planes, `u8_blob` (`numel / 2` bytes) and `qscheme.scale` (f16, `(numel / 32, 1)`): 4.5 bits a weight.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from torch_to_nnef import _native
from torch_to_nnef.exceptions import (
    T2NErrorImpossibleQuantization,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    expect,
)
from torch_to_nnef.files import writing
from torch_to_nnef.tensor.chunks import flat_chunks, rows_of
from torch_to_nnef.tensor.extents import own_memory
from torch_to_nnef.tensor.offload import OffloadedTensor, as_stored, loaded
from torch_to_nnef.tensor.quant.base import FLOAT_DTYPES, QScalePerGroupF16, QScheme, QTensor
from torch_to_nnef.tensor.quant.compressors import GROUP, NibblePacking, U8Compressor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from torch_to_nnef.inference_target import InferenceTarget

__all__ = [
    "Encoder",
    "QTensorTract",
    "QTensorTractScaleOnly",
    "QTensorTractTransposed",
    "fp_to_tract_q4_0_with_min_max_calibration",
    "q40_dequantize",
    "q40_shape_reason",
    "qscale_per_group_f16_min_max_calibration",
    "quantize_q40",
]

Encoder = Literal["signed_extreme", "abs_max", "min_max", "scale_search"]
_NATIVE_DTYPES: dict[torch.dtype, _native.FloatName] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
_PACKING = (NibblePacking(),)


def q40_shape_reason(shape: Sequence[int]) -> str | None:
    """Why a tensor of `shape` cannot be Q40; None if it can. tract packs rows of `prod(shape[1:])` by 32."""
    if len(shape) < 2:
        return f"rank {len(shape)}: Q40 needs at least 2 dimensions"
    row = prod(shape[1:])
    if not prod(shape) or row % GROUP:
        return f"{' x '.join(map(str, shape[1:]))} = {row} elements a row: Q40 needs a positive multiple of {GROUP}"
    return None


class QTensorTract(QTensor):
    """A `QTensor` that tract can read: `write_in_file` checks where it may write, `write_dat` writes."""

    @abstractmethod
    def write_dat(self, path: Path) -> None:
        """Write the NNEF tensor file `path`, atomically."""

    def write_in_file(self, dirpath: str | Path, label: str, inference_target: InferenceTarget | None = None) -> Path:
        """Write `dirpath/label.dat` for `inference_target` (default: the latest tract); returns its path.

        Raises:
            T2NErrorInvalidArgument: A label that leaves `dirpath`, or a target that is not tract.
            T2NErrorRuntime: The system refuses to write.

        """
        if inference_target is not None:
            from torch_to_nnef.inference_target import TractNNEF

            if not isinstance(inference_target, TractNNEF):
                raise T2NErrorInvalidArgument(
                    f"{label!r}: {type(self).__name__} is read by tract only, not {inference_target!r}"
                )
        relative = Path(f"{label}.dat")
        if relative.is_absolute() or ".." in relative.parts or "\0" in label or not label.strip("/"):
            raise T2NErrorInvalidArgument(f"label {label!r} does not name a file inside {dirpath}")
        path = Path(dirpath) / relative
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.write_dat(path)
        return path


class QTensorTractScaleOnly(QTensorTract):
    """Q40: `qscheme` is a `QScalePerGroupF16` with groups of 32 and 4 bits; packed to nibbles by default.

    Raises:
        T2NErrorImpossibleQuantization: rank below 2, `prod(shape[1:])` not a multiple of 32, NaN or Inf.

    """

    storage_name = "q40"
    qscheme: QScalePerGroupF16  # type: ignore[assignment]

    @classmethod
    def default_compressors(cls) -> tuple[U8Compressor, ...]:
        """Two codes a byte, in GGUF order."""
        return _PACKING

    @classmethod
    def encode(cls, fp_tensor: torch.Tensor, qscheme: QScheme, compressors: Sequence[U8Compressor]) -> torch.Tensor:
        """Blob of `fp_tensor` on the grid of `qscheme`."""
        if reason := q40_shape_reason(fp_tensor.shape):
            raise T2NErrorImpossibleQuantization(f"tensor of shape {tuple(fp_tensor.shape)}: {reason}")
        native = isinstance(qscheme, QScalePerGroupF16) and _is_q40(qscheme) and fp_tensor.device.type == "cpu"
        if tuple(compressors) != _PACKING or not native:
            return super().encode(fp_tensor, qscheme, compressors)
        scale = qscheme.scale.contiguous()  # type: ignore[attr-defined]
        if scale.numel() * GROUP != fp_tensor.numel():
            raise T2NErrorImpossibleQuantization(
                f"tensor of shape {tuple(fp_tensor.shape)} does not have {scale.numel()} groups of {GROUP}"
            )
        codes = torch.empty(fp_tensor.numel() // 2, dtype=torch.uint8)
        for start, values, dtype in _native_chunks(fp_tensor):
            groups = slice(start // GROUP, (start + len(values)) // GROUP)
            _native.q40_quantize_with_scales(
                _bytes(values), dtype, "", _bytes(scale[groups]), _bytes(codes[start // 2 : (start + len(values)) // 2])
            )
        return codes

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file, whose rows are divided into groups."""
        return tuple(self.shape)

    @property
    def stored(self) -> QTensorTractScaleOnly:
        """The tensor in the file; it shares the planes."""
        return self

    def rows(self, start: int, stop: int) -> QTensorTractScaleOnly:
        """Rows [start, stop) of a matrix, or of each in a stack of them; K, the last axis, must be a multiple of 32."""
        *stack, rows, width = self.stored_shape
        if width % GROUP:
            raise T2NErrorInvalidArgument(f"{self!r}: groups of {GROUP} cross its rows of {width}")
        codes, scales = (rows_of(plane.view(*stack, rows, -1), start, stop).reshape(-1) for plane in self.planes())
        scheme = QScalePerGroupF16(GROUP, scales.reshape(-1, 1), n_bits=4)
        return QTensorTractScaleOnly.from_packed(codes, (*stack, stop - start, width), scheme, self.dtype, _PACKING)

    def transposed(self) -> QTensorTractTransposed:
        """The same planes as a weight of which this is the transpose (last two axes)."""
        return QTensorTractTransposed.from_packed(
            self.u8_blob, _swapped(self.shape), self.qscheme, self.dtype, self.u8_compressors, self.nnef_name
        )

    def check_layout(self) -> None:
        """Raise `T2NErrorInconsistentTensor` unless the planes have the sizes Q40 gives this shape."""
        super().check_layout()
        if not isinstance(self.qscheme, QScalePerGroupF16) or not _is_q40(self.qscheme):
            raise T2NErrorInconsistentTensor(
                f"Q40 is QScalePerGroupF16 with groups of {GROUP} and 4 bits: got {self.qscheme}"
            )
        numel = prod(self.stored_shape)
        bytes_of: dict[tuple[U8Compressor, ...], int] = {
            _PACKING: numel // 2,
            (): numel,
        }  # what other codecs leave is known once it is decompressed
        n_packed = bytes_of.get(self.u8_compressors, self.u8_blob.numel())
        if (
            q40_shape_reason(self.stored_shape)
            or self.qscheme.scale.numel() * GROUP != numel
            or self.u8_blob.numel() != n_packed
        ):
            raise T2NErrorInconsistentTensor(
                f"{self.u8_blob.numel()} bytes of codes and {self.qscheme.scale.numel()} scales are not Q40 "
                f"of {tuple(self.shape)}"
            )

    def planes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(codes, scales)`: uint8 `(numel / 2,)` and f16 `(numel / 32,)`; copied only if held otherwise."""
        packed = self.u8_compressors == _PACKING
        codes = self.u8_blob if packed else _PACKING[0].compress(self.stored.decompress_to_u8())
        return codes.contiguous(), self.qscheme.scale.reshape(-1)

    def decompress(self) -> torch.Tensor:
        """Float values: plain tensor in `dequant_to_dtype` and the logical shape."""
        codes, scales = self.planes()
        values: torch.Tensor = q40_dequantize(codes, scales, list(self.stored_shape), self.dtype)
        return values

    def decompress_slice(self, start: int, stop: int) -> torch.Tensor:
        """`decompress().flatten()[start:stop]`, reading only those groups; both must be multiples of 32."""
        if start % GROUP or stop % GROUP:
            raise T2NErrorInvalidArgument(f"[{start}:{stop}] does not fall between groups of {GROUP}")
        codes, scales = self.planes()
        part = codes[start // 2 : stop // 2]
        values: torch.Tensor = q40_dequantize(
            part, scales[start // GROUP : stop // GROUP], [2 * part.numel()], self.dtype
        )
        return values

    def squared_error(self, exact: torch.Tensor) -> tuple[float, float]:
        """As `QTensor.squared_error`, in one pass."""
        if self.dtype != exact.dtype or self.dtype not in _NATIVE_DTYPES:
            return super().squared_error(exact)
        planes = [plane.cpu() for plane in self.planes()]
        signal = noise = 0.0
        for start, values, dtype in _native_chunks(exact):
            stop = start + len(values)
            codes, scales = (loaded(p[start // n : stop // n]) for p, n in zip(planes, (2, GROUP), strict=True))
            sums = _native.q40_squared_error(
                _bytes(codes), _bytes(scales), dtype, _bytes(values), _NATIVE_DTYPES[self.dtype]
            )
            signal, noise = signal + sums[0], noise + sums[1]
        return signal, noise

    def write_dat(self, path: Path) -> None:
        """Write the planes as GGUF blocks (NNEF item type 0x3040)."""
        codes, scales = (loaded(plane).cpu() for plane in self.planes())
        _native.write_dat_q40(path, list(self.stored_shape), _bytes(codes), _bytes(scales))


class QTensorTractTransposed(QTensorTractScaleOnly):
    """Q40 of a weight [..., K, N] that is summed over K, as in `x @ weight`: groups run along K.

    Shape and values are those of the weight; planes and file are those of its transpose [..., N, K], which is `stored`.

    Raises:
        T2NErrorImpossibleQuantization: what `QTensorTractScaleOnly` raises for the transpose.

    """

    @classmethod
    def encode(cls, fp_tensor: torch.Tensor, qscheme: QScheme, compressors: Sequence[U8Compressor]) -> torch.Tensor:
        """Blob of the transpose of `fp_tensor` on the grid of `qscheme`."""
        if fp_tensor.dim() < 2:
            raise T2NErrorImpossibleQuantization(f"tensor of shape {tuple(fp_tensor.shape)}: it has no transpose")
        return super().encode(fp_tensor.mT, qscheme, compressors)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file, whose rows are divided into groups."""
        return _swapped(self.shape)

    @property
    def stored(self) -> QTensorTractScaleOnly:
        """The tensor in the file; it shares the planes."""
        return QTensorTractScaleOnly.from_packed(
            self.u8_blob, self.stored_shape, self.qscheme, self.dtype, self.u8_compressors, self.nnef_name
        )

    def decompress(self) -> torch.Tensor:
        """Float values: plain tensor in `dequant_to_dtype` and the logical shape."""
        return super().decompress().mT.contiguous()

    def decompress_to_u8(self) -> torch.Tensor:
        """Codes (uint8) in the logical shape."""
        return self.stored.decompress_to_u8().mT.contiguous()

    def decompress_slice(self, start: int, stop: int) -> torch.Tensor:
        """`decompress().flatten()[start:stop]`; groups run across the rows, so all are read."""
        return self.decompress().reshape(-1)[start:stop]

    def squared_error(self, exact: torch.Tensor) -> tuple[float, float]:
        """As `QTensor.squared_error`, in the order of the groups."""
        return self.stored.squared_error(exact.mT)


def _swapped(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


# An operator of our own: `torch.compile` and `torch.export` see one node, and each device runs its fastest code.
# The schema is written out: torch 2.6 does not infer one from `list[int]`.
@torch.library.custom_op(
    "t2n::q40_dequantize",
    mutates_args=(),
    schema="(Tensor codes, Tensor scales, SymInt[] shape, ScalarType dtype) -> Tensor",
)
def q40_dequantize(codes: torch.Tensor, scales: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Values `(code - 8) * scale` of the planes `codes` (uint8) and `scales` (f16): f32, rounded once to `dtype`."""
    if codes.device.type == "cpu":
        values = torch.empty(shape, dtype=dtype if dtype in _NATIVE_DTYPES else torch.float32)
        _native.q40_dequantize(_bytes(codes), _bytes(scales), _NATIVE_DTYPES[values.dtype], _bytes(values))
        return values.to(dtype)
    centred = _PACKING[0].decompress(codes).reshape(-1, GROUP).float() - 8
    return (centred * scales.reshape(-1, 1).float()).to(dtype).reshape(shape)


@q40_dequantize.register_fake
def _(codes: torch.Tensor, scales: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty(shape, dtype=dtype)


def quantize_q40(
    fp_tensor: torch.Tensor, encoder: Encoder = "scale_search", percentile: float = 1.0, name: str = ""
) -> QTensorTractScaleOnly:
    """Quantize a weight to Q40.

    Args:
        fp_tensor: Float tensor of rank 2 or more with `prod(shape[1:])` a multiple of 32. Read in place, never copied
            whole.
        encoder: How scales are chosen. `scale_search`: least squared error over candidate scales (default).
            `signed_extreme`: ggml's rule, extreme / -8. `min_max`: as it, on the `percentile` of magnitudes, never with
            a larger error. `abs_max`: largest magnitude / 8, which clips one sign.
        percentile: In (0, 1]; used by `min_max`.
        name: Named in errors, and kept as `nnef_name`.

    Returns:
        A tensor of the same shape, `dequant_to_dtype` the dtype of `fp_tensor`, on its device.

    Raises:
        T2NErrorImpossibleQuantization: Shape, NaN, Inf, or a scale beyond f16, with the tensor and the place.

    """
    expect("fp_tensor", fp_tensor, torch.Tensor, "a tensor")
    what = f"tensor `{name}` of shape {tuple(fp_tensor.shape)}"
    if fp_tensor.dtype not in FLOAT_DTYPES or fp_tensor.is_meta:
        raise T2NErrorImpossibleQuantization(
            f"{what}: cannot quantize {fp_tensor.dtype} values on device {fp_tensor.device}"
        )
    if reason := q40_shape_reason(fp_tensor.shape):
        raise T2NErrorImpossibleQuantization(f"{what}: {reason}. Leave it out of the quantization")
    codes = own_memory((fp_tensor.numel() // 2,), torch.uint8)
    scale = own_memory((fp_tensor.numel() // GROUP, 1), torch.float16)
    for start, values, dtype in _native_chunks(fp_tensor):
        stop = start + len(values)
        part = name if len(values) == fp_tensor.numel() else f"{name} (from flat index {start})"
        _native.q40_quantize(
            _bytes(values), dtype, encoder, percentile, part,
            _bytes(codes[start // 2 : stop // 2]), _bytes(scale[start // GROUP : stop // GROUP]),
        )  # fmt: skip
    device = fp_tensor.device
    scheme = QScalePerGroupF16(GROUP, scale.to(device), n_bits=4)
    return QTensorTractScaleOnly.from_packed(
        codes.to(device), fp_tensor.shape, scheme, fp_tensor.dtype, _PACKING, nnef_name=name or None
    )


def fp_to_tract_q4_0_with_min_max_calibration(
    fp_tensor: torch.Tensor, percentile: float = 1.0
) -> QTensorTractScaleOnly:
    """`quantize_q40` with the `min_max` encoder: scales from the `percentile` (0, 1] of each group's magnitudes."""
    return quantize_q40(fp_tensor, "min_max", percentile)


def qscale_per_group_f16_min_max_calibration(
    fp_tensor: torch.Tensor, n_bits: int, group_size: int, percentile: float = 1.0
) -> QScalePerGroupF16:
    """Scales for any width: the extreme of each group, with its sign, over `-2^(n_bits-1)`.

    So the extreme has an exact code. With `percentile` below 1, the magnitude is that quantile (linear interpolation)
    instead of the extreme, in the groups where this does not raise the squared error.

    Raises:
        T2NErrorImpossibleQuantization: `numel` not a multiple of `group_size`, NaN, Inf, or a scale beyond f16.
        T2NErrorInvalidArgument: `n_bits` outside 1..8, `percentile` outside (0, 1].

    """
    if not 0 < percentile <= 1:
        raise T2NErrorInvalidArgument(f"percentile must be in (0, 1]: got {percentile}")
    if group_size < 1 or fp_tensor.numel() % group_size:
        raise T2NErrorImpossibleQuantization(f"{tuple(fp_tensor.shape)} does not divide into groups of {group_size}")
    scale = torch.empty(fp_tensor.numel() // group_size, 1, dtype=torch.float16, device=fp_tensor.device)
    scheme = QScalePerGroupF16(group_size, scale, n_bits)
    for start, values in flat_chunks(fp_tensor, group_size):
        groups = values.float().reshape(-1, group_size)
        extreme = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
        found = (extreme / -scheme.zero_code).half()
        if not bool(torch.isfinite(found).all()):
            raise T2NErrorImpossibleQuantization(
                f"tensor of shape {tuple(fp_tensor.shape)}: NaN, Inf or a scale beyond f16 "
                f"between flat indices {start} and {start + len(values)}"
            )
        if percentile < 1:
            quantile = torch.quantile(groups.abs(), percentile, dim=1, keepdim=True)
            clipped = (torch.copysign(quantile, extreme) / -scheme.zero_code).half()
            better = _squared_error(scheme, groups, clipped) <= _squared_error(scheme, groups, found)
            found = torch.where(better, clipped, found)
        first = start // group_size
        scale[first : first + len(found)] = found
    return scheme


def _squared_error(scheme: QScalePerGroupF16, groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    restored = (scheme.codes_of(groups, scale).float() - scheme.zero_code) * scale.float()
    return (restored - groups).square().sum(dim=1, keepdim=True)


def _is_q40(scheme: QScalePerGroupF16) -> bool:
    return scheme.group_size == GROUP and scheme.n_bits == 4


def _native_chunks(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, _native.FloatName]]:
    """Yield `(start, values, dtype name)`: the whole tensor where native code can read it, else bounded pieces.

    Values are those of `tensor`; their dtype may be a narrower one that holds them.
    """
    native = tensor.dtype in _NATIVE_DTYPES
    if native and tensor.is_contiguous() and tensor.device.type == "cpu" and not isinstance(tensor, OffloadedTensor):
        yield 0, tensor.detach().reshape(-1), _NATIVE_DTYPES[tensor.dtype]
        return
    for start, values in flat_chunks(as_stored(tensor), GROUP):
        known = values.cpu() if native else values.to("cpu", torch.float32)
        yield start, known, _NATIVE_DTYPES[known.dtype]


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor as 1-D uint8; writes go through."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
