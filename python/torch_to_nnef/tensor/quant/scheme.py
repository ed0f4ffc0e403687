"""`QScheme`: what the integer codes of a quantized tensor mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument, expect
from torch_to_nnef.tensor.chunks import flat_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self


class QScheme(ABC):
    """Maps float values to u8 codes and back. Immutable.

    `tensor_names` lists the attributes that hold tensors; every other attribute must compare by value, since
    `torch.compile` guards on it.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def quantize_as_u8(self, fp_tensor: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) of `fp_tensor` (any float dtype), in its shape."""

    @abstractmethod
    def dequantize(self, u8_tensor: torch.Tensor, target_dtype: torch.dtype) -> torch.Tensor:
        """Values of the codes `u8_tensor` (uint8) in its shape, as `target_dtype`."""

    def quantize_as_torch(self, fp_tensor: torch.Tensor) -> torch.Tensor:
        """`fp_tensor` as it will be read back: the nearest values the scheme can hold, same shape and dtype."""
        return self.dequantize(self.quantize_as_u8(fp_tensor), fp_tensor.dtype)

    def map_tensors(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy in which every tensor `t` is `fn(t)`."""
        return self.rebuild({**vars(self), **{name: fn(getattr(self, name)) for name in self.tensor_names}})

    @classmethod
    def rebuild(cls, state: dict[str, Any]) -> Self:
        """A scheme with exactly the attributes of `state`."""
        scheme = cls.__new__(cls)
        scheme.__dict__.update(state)
        return scheme

    def as_plain(self) -> dict[str, Any]:
        """Attributes that are no tensors, as JSON can hold them."""
        return {name: value for name, value in vars(self).items() if name not in self.tensor_names}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> Self:
        """A scheme of what `as_plain` gave and the tensors."""
        return cls(**state)

    def to_device(self, device: torch.device | str) -> Self:
        """A copy whose tensors are on `device`."""
        return self.map_tensors(lambda t: t.to(device))


@dataclass(frozen=True, eq=False)
class QScalePerGroupF16(QScheme):
    """One f16 scale for each `group_size` consecutive elements of the flattened tensor.

    With zero = 2^(n_bits-1): `code = clamp(round(x / scale) + zero, 0, 2^n_bits - 1)`, ties away from zero, and
    `value = (code - zero) * scale` computed in f32. A group whose scale is 0 holds zeros.

    Attributes:
        group_size: Elements that share a scale.
        scale: f16, shape `(numel / group_size, 1)`.
        n_bits: Bits of a code, 1 to 8.

    """

    group_size: int
    scale: torch.Tensor
    n_bits: int

    tensor_names: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        expect("scale", self.scale, torch.Tensor, "a tensor")
        if self.group_size < 1 or not 1 <= self.n_bits <= 8:
            raise T2NErrorInvalidArgument(
                f"group_size must be positive and n_bits in 1..8: got {self.group_size} and {self.n_bits}"
            )
        if self.scale.dtype != torch.float16 or self.scale.dim() != 2 or self.scale.shape[1] != 1:
            raise T2NErrorInvalidArgument(
                f"scale must be float16 of shape (n_groups, 1): got {self.scale.dtype} {tuple(self.scale.shape)}"
            )

    @property
    def zero_code(self) -> int:
        """The code that means 0."""
        return 1 << (self.n_bits - 1)

    def quantize_as_u8(self, fp_tensor: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) of `fp_tensor`.

        Raises:
            T2NErrorImpossibleQuantization: A size the scales do not cover, NaN or Inf.

        """
        what = f"tensor of shape {tuple(fp_tensor.shape)}"
        if fp_tensor.numel() != self.scale.shape[0] * self.group_size:
            raise T2NErrorImpossibleQuantization(
                f"{what} does not have {self.scale.shape[0]} groups of {self.group_size}"
            )
        codes = torch.empty(fp_tensor.shape, dtype=torch.uint8, device=fp_tensor.device)
        flat = codes.view(-1)
        for start, values in flat_chunks(fp_tensor, self.group_size):
            first = start // self.group_size
            groups = values.float().reshape(-1, self.group_size)
            if not bool(torch.isfinite(groups).all()):
                raise T2NErrorImpossibleQuantization(f"{what} has NaN or infinite values")
            flat[start : start + len(values)] = self.codes_of(groups, self.scale[first : first + len(groups)]).view(-1)
        return codes

    def codes_of(self, groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes (uint8, same shape) of `groups` (f32, `(n, group_size)`) under `scale` (`(n, 1)`)."""
        scaled = torch.where(scale == 0, torch.zeros_like(groups), groups / scale.float())
        whole = torch.trunc(scaled)
        rounded = torch.where((scaled - whole).abs() >= 0.5, whole + torch.sign(scaled), whole)
        return torch.clamp(rounded + self.zero_code, 0, 2**self.n_bits - 1).to(torch.uint8)

    def dequantize(self, u8_tensor: torch.Tensor, target_dtype: torch.dtype) -> torch.Tensor:
        """Values of the codes, rounded once from f32 to `target_dtype`."""
        groups = u8_tensor.reshape(-1, self.group_size).float() - self.zero_code
        return (groups * self.scale.float()).to(target_dtype).reshape(u8_tensor.shape)
