"""Walk a tensor in bounded pieces, so that no step needs a second copy of a large weight."""

from collections.abc import Iterator
from math import gcd

import torch

from torch_to_nnef.tensor.offload import OffloadedTensor

# Small enough to stay in a cache, and for malloc to find room in what it has.
MAX_ELEMENTS = 1 << 20


def flat_chunks(
    tensor: torch.Tensor, multiple: int = 1, max_elements: int = MAX_ELEMENTS
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(start, values)`: 1-D contiguous pieces of `tensor` in row-major order; `start` is a flat index.

    Every `start` is a multiple of `multiple`, which must divide `tensor.numel()`. Pieces hold about `max_elements`
    elements at most; a non-contiguous tensor is copied a few rows at a time, never as a whole. One that lies on disk is read a piece at
    a time, and each piece is overwritten by the next.
    """
    tensor = tensor.detach()
    if isinstance(tensor, OffloadedTensor):
        yield from tensor.pieces(max(multiple, max_elements // multiple * multiple))
        return
    if tensor.is_contiguous():
        flat, step = tensor.reshape(-1), max(multiple, max_elements // multiple * multiple)
        for start in range(0, flat.numel(), step):
            yield start, flat[start : start + step]
        return
    row = tensor.numel() // tensor.shape[0]
    aligned_rows = multiple // gcd(row, multiple)
    rows = max(1, max_elements // (row * aligned_rows)) * aligned_rows
    for first in range(0, tensor.shape[0], rows):
        yield first * row, tensor[first : first + rows].reshape(-1).contiguous()


def rows_of(stack: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a matrix, or of each in a stack of them: a view; of a tensor on disk, one of its files."""
    if isinstance(stack, OffloadedTensor) and stack.dim() == 3:
        return torch.stack([stack[i][start:stop] for i in range(stack.shape[0])])
    return stack.detach()[..., start:stop, :]
