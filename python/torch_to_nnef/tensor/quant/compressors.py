"""Lossless codecs for the u8 codes of a `QTensor`. A codec may change the length; it restores every byte.

`BitPacking`, `Lzma` and `Huffman` start their blob with the shape (one byte rank, then int64 little-endian dimensions),
so that they restore it too. `NibblePacking` has no header: its blob is the `codes` plane of Q40, and the `QTensor`
knows the shape.
"""

from __future__ import annotations

import lzma
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Self

GROUP = 32


class U8Compressor(ABC):
    """A lossless codec. Subclasses compare by value (a frozen dataclass does): `torch.compile` guards on it."""

    @abstractmethod
    def compress(self, u8_tensor: torch.Tensor) -> torch.Tensor:
        """Blob (1-D uint8) that stands for `u8_tensor` (uint8, any shape)."""

    @abstractmethod
    def decompress(self, blob: torch.Tensor) -> torch.Tensor:
        """The uint8 tensor `compress` was given; a codec without a header may return it flat."""

    def to_device(self, device: torch.device | str) -> Self:
        """A codec for blobs on `device`; itself unless it holds tensors."""
        return self


@dataclass(frozen=True)
class NibblePacking(U8Compressor):
    """4-bit codes in the order of GGUF's Q4_0: byte i of a group of 32 is element i (low nibble), i+16 (high)."""

    def compress(self, u8_tensor: torch.Tensor) -> torch.Tensor:
        """Blob of `numel / 2` bytes; `numel` must be a multiple of 32 and codes below 16."""
        if u8_tensor.numel() % GROUP:
            raise T2NErrorInvalidArgument(f"nibble packing needs a multiple of {GROUP} codes: got {u8_tensor.numel()}")
        _check_range(u8_tensor, 4)
        halves = u8_tensor.reshape(-1, 2, GROUP // 2)
        return (halves[:, 0] | (halves[:, 1] << 4)).reshape(-1)

    def decompress(self, blob: torch.Tensor) -> torch.Tensor:
        """Flat codes, `2 * len(blob)` of them."""
        pairs = blob.reshape(-1, 1, GROUP // 2)
        return torch.cat([pairs & 15, pairs >> 4], dim=1).reshape(-1)


@dataclass(frozen=True)
class BitPacking(U8Compressor):
    """Codes of `n_bits` (1 to 8) without gaps: code i is bits `[i * n_bits, (i + 1) * n_bits)`, lowest bit first."""

    n_bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_bits <= 8:
            raise T2NErrorInvalidArgument(f"n_bits must be in 1..8: got {self.n_bits}")

    def compress(self, u8_tensor: torch.Tensor) -> torch.Tensor:
        """Blob of a header and `ceil(numel / 8) * n_bits` bytes; codes must be below `2^n_bits`."""
        _check_range(u8_tensor, self.n_bits)
        codes = u8_tensor.reshape(-1)
        eights = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).reshape(-1, 8)
        # Eight codes are n_bits whole bytes: gather them in one int64, then cut it.
        word = sum(
            (eights[:, i].long() << (i * self.n_bits) for i in range(8)),
            torch.zeros_like(eights[:, 0], dtype=torch.int64),
        )
        packed = torch.stack([(word >> (8 * b)) & 255 for b in range(self.n_bits)], dim=1)
        return _with_shape(u8_tensor, packed.to(torch.uint8).reshape(-1))

    def decompress(self, blob: torch.Tensor) -> torch.Tensor:
        """The codes in their shape."""
        shape, packed = _split_shape(blob)
        if packed.numel() != -(-prod(shape) // 8) * self.n_bits:
            raise T2NErrorInconsistentTensor(
                f"{packed.numel()} bytes do not hold {prod(shape)} codes of {self.n_bits} bits"
            )
        parts = packed.reshape(-1, self.n_bits)
        word = sum(
            (parts[:, b].long() << (8 * b) for b in range(self.n_bits)),
            torch.zeros_like(parts[:, 0], dtype=torch.int64),
        )
        mask = (1 << self.n_bits) - 1
        codes = torch.stack([(word >> (i * self.n_bits)) & mask for i in range(8)], dim=1).to(torch.uint8)
        return codes.reshape(-1)[: prod(shape)].reshape(shape)


class _BytesCodec(U8Compressor):
    """A codec of the standard library, behind the shape header."""

    @abstractmethod
    def encode(self, data: memoryview) -> bytes:
        """Compress bytes."""

    @abstractmethod
    def decode(self, data: memoryview, size: int) -> bytes:
        """Restore the `size` bytes; raises if the stream is damaged or cut."""

    def compress(self, u8_tensor: torch.Tensor) -> torch.Tensor:
        """Blob of a header and the encoded bytes."""
        return _with_shape(u8_tensor, _from_bytes(self.encode(_as_bytes(u8_tensor)), u8_tensor.device))

    def decompress(self, blob: torch.Tensor) -> torch.Tensor:
        """The tensor in its shape; `T2NErrorInconsistentTensor` if the blob is damaged."""
        shape, payload = _split_shape(blob)
        try:
            data = self.decode(_as_bytes(payload), prod(shape))
        except (lzma.LZMAError, zlib.error, EOFError) as damage:
            raise T2NErrorInconsistentTensor(
                f"{type(self).__name__} blob of {blob.numel()} bytes: {damage}"
            ) from damage
        if len(data) != prod(shape):
            raise T2NErrorInconsistentTensor(f"{type(self).__name__} blob holds {len(data)} bytes of {prod(shape)}")
        return _from_bytes(data, blob.device).reshape(shape)


@dataclass(frozen=True)
class Lzma(_BytesCodec):
    """LZMA2 (xz); `preset` 0 (fast) to 9 (small)."""

    preset: int = 6

    def encode(self, data: memoryview) -> bytes:
        """Compress bytes to one xz stream."""
        return lzma.compress(data, preset=self.preset)

    def decode(self, data: memoryview, size: int) -> bytes:
        """Restore the `size` bytes; raises if the stream is damaged or cut."""
        return _whole(lzma.LZMADecompressor(format=lzma.FORMAT_XZ), data, size)


@dataclass(frozen=True)
class Huffman(_BytesCodec):
    """Entropy coding of single bytes (deflate without matches): fast, and as small as the codes' histogram allows."""

    def encode(self, data: memoryview) -> bytes:
        """Compress bytes to one zlib stream."""
        deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
        return deflate.compress(data) + deflate.flush()

    def decode(self, data: memoryview, size: int) -> bytes:
        """Restore the `size` bytes; raises if the stream is damaged or cut."""
        return _whole(zlib.decompressobj(), data, size)


def _whole(decoder: Any, data: memoryview, size: int) -> bytes:
    # One byte more than expected: the decoder then runs to the end of its stream and checks its checksum.
    restored: bytes = decoder.decompress(bytes(data), size + 1)
    if not decoder.eof:
        raise EOFError("the stream does not end where it should")
    return restored


def _check_range(codes: torch.Tensor, n_bits: int) -> None:
    if codes.dtype != torch.uint8 or (n_bits < 8 and codes.numel() and bool((codes >> n_bits).any())):
        raise T2NErrorInvalidArgument(f"codes must be uint8 below {1 << n_bits}")


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).cpu().numpy().data


def _from_bytes(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).to(device)


def _with_shape(tensor: torch.Tensor, payload: torch.Tensor) -> torch.Tensor:
    header = bytes([tensor.dim()]) + np.asarray(tensor.shape, dtype="<i8").tobytes()
    return torch.cat([_from_bytes(header, payload.device), payload])


def _split_shape(blob: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    rank = int(blob[0]) if blob.numel() else 0
    end = 1 + 8 * rank
    shape = tuple(np.frombuffer(bytes(_as_bytes(blob[1:end])), dtype="<i8").tolist()) if blob.numel() >= end else (-1,)
    if min(shape, default=0) < 0:
        raise T2NErrorInconsistentTensor(f"a blob of {blob.numel()} bytes does not start with a shape")
    return shape, blob[end:]
