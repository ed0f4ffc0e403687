"""What a report shows of a weight beside its error: where values and codes lie, and what plain min-max would make of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from torch_to_nnef.quantize.rows import snr_db
from torch_to_nnef.tensor.offload import OffloadedTensor, loaded
from torch_to_nnef.tensor.quant.compressors import NibblePacking
from torch_to_nnef.tensor.quant.qtract import QTensorTractScaleOnly, quantize_q40

_NIBBLES = NibblePacking()
_MOST = 1 << 20  # elements looked at
_PIECE = 1 << 16  # of them at a time: what is made of more leaves holes in malloc's memory, and it grows
_SPAN, _BINS = 4.0, 32


@dataclass(frozen=True)
class Measures:
    """Of one weight in Q40; of one with more than a million elements, of rows spread evenly over it.

    code_counts: how often each of the 16 codes is used. weight_counts: weights in 32 bins from -4 to 4 times their root mean square, those
    beyond in the outer ones. min_max_snr_db: SNR that plain min-max (extreme / -8) has, dB.
    """

    code_counts: tuple[int, ...] = ()
    weight_counts: tuple[int, ...] = ()
    min_max_snr_db: float | None = None


def measures_of(rows: torch.Tensor, packed: QTensorTractScaleOnly) -> Measures:
    """Of the float rows [N, K] that `packed` (as it is stored) stands for; nothing of a weight that is left on disk."""
    if isinstance(rows, OffloadedTensor):
        return Measures()
    flat = rows.detach().reshape(-1, math.prod(rows.shape[1:]))
    every, block = max(1, math.ceil(flat.numel() / _MOST)), max(1, _PIECE // flat.shape[1])
    some, codes = flat[::every], loaded(packed.planes()[0]).view(len(flat), -1)[::every]
    power = sum(float(piece.float().square().sum(dtype=torch.float64)) for piece in torch.split(some, block))
    size = math.sqrt(power / some.numel()) or 1.0
    code_counts, weight_counts = torch.zeros(16, dtype=torch.int64), torch.zeros(_BINS)
    signal = noise = 0.0
    for piece, packed_codes in zip(torch.split(some, block), torch.split(codes, block), strict=True):
        values = piece.float().contiguous()
        code_counts += torch.bincount(_NIBBLES.decompress(packed_codes.flatten()), minlength=16).cpu()
        weight_counts += torch.histc(
            values.clamp(-_SPAN * size, _SPAN * size), _BINS, -_SPAN * size, _SPAN * size
        ).cpu()
        sums = quantize_q40(values, "signed_extreme").squared_error(values)
        signal, noise = signal + sums[0], noise + sums[1]
    return Measures(
        code_counts=tuple(code_counts.tolist()),
        weight_counts=tuple(int(count) for count in weight_counts.tolist()),
        min_max_snr_db=snr_db(signal, noise),
    )
