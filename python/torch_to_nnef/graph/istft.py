"""`t2n::istft`: torch.istft with a length that may be symbolic; the schema of torch's own takes a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_torch_istft = torch.istft

torch.library.define(
    "t2n::istft",
    "(Tensor self, int n_fft, int? hop_length, int? win_length, Tensor? window, bool center, bool normalized, bool? onesided,"
    " SymInt length, bool return_complex) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("t2n::istft", "CompositeExplicitAutograd")
def _compute(*args: Any) -> Tensor:
    return _torch_istft(*args)


def _shape(spectrum: Tensor, *args: Any) -> Tensor:
    length, return_complex = args[-2:]
    dtype = spectrum.dtype if return_complex else spectrum.dtype.to_real()
    return spectrum.new_empty((*spectrum.shape[:-2], length), dtype=dtype)


torch.library.register_fake("t2n::istft", _shape)


def istft(
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | torch.SymInt | None = None,
    return_complex: bool = False,
) -> Tensor:
    """torch.istft, as the operator above where the length is symbolic."""
    options = (n_fft, hop_length, win_length, window, center, normalized, onesided)
    function: Callable[..., Tensor] = _torch_istft
    if isinstance(length, torch.SymInt):
        function = torch.ops.t2n.istft.default
    return function(input, *options, length, return_complex)
