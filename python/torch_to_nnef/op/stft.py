"""Short-time Fourier transforms and back."""

from __future__ import annotations

import torch

from torch_to_nnef.graph import istft as _  # noqa: F401  # registers t2n::istft
from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.complex_layout import as_complex, lowers_complex, promote, real_layout
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.signal import divided, filled, half_inverse, transformed
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# torch refuses to divide by an envelope below this.
_SMALLEST_ENVELOPE = 1e-11


@lowers(aten.stft.default)
@lowers_complex(aten.stft.default)
def stft(
    e: Emitter,
    x: Ref,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Ref | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
) -> Ref:
    """Spectra of windowed frames, as (*, bins, frames); torch pads the signal before."""
    signal = x if x.rank == 2 else e.unsqueeze(x, [0])
    real = e.out.dtype if not e.out.dtype.is_complex else e.out.dtype.to_real()
    bins, frames = e.out.shape[-2:] if e.out.dtype.is_complex else e.out.shape[-3:-1]
    planes = real_layout(promote(e, signal, real.to_complex()))
    batch, hop = signal.shape[0], hop_length or n_fft // 4
    window = _window(e, window, win_length or n_fft, real)
    spectra = _spectra(e, planes, window, (batch, frames, n_fft, 2), hop)
    spectra = divided(e, e.slice(spectra, 2, 0, bins), [n_fft], int(normalized))
    spectra = e.op("transpose", spectra, out=(batch, bins, frames, 2), axes=[0, 2, 1, 3])
    spectra = spectra if x.rank == 2 else e.squeeze(spectra, [0])
    return as_complex(spectra) if e.out.dtype.is_complex else spectra


def _spectra(e: Emitter, planes: Ref, window: Ref, out: tuple[Dim, ...], hop: int) -> Ref:
    """Transformed frames: by tract's own operator if the window is stored, else cut by index."""
    frames, size = out[1], int(out[2])
    if window.fqn is not None or window.id in e.variables:
        return e.op("tract_core_stft", planes, out=out, axis=1, frame=size, stride=hop, window=window)
    starts = e.unsqueeze(e.arange(0, hop, frames, torch.int64), [1])
    within = e.unsqueeze(e.arange(0, 1, size, torch.int64), [0])
    cut = e.op("tract_core_gather", planes, e.op("add", starts, within), out=out, axis=1)
    shaped = e.unsqueeze(_centered(e, window, size), [0, 1, 3])
    return real_layout(transformed(e, as_complex(e.op("mul", cut, shaped)), [2]))


def _window(e: Emitter, window: Ref | None, length: int, dtype: torch.dtype) -> Ref:
    if window is None:
        return e.constant(torch.ones(length, dtype=dtype), "window")
    if window.dtype.is_complex:
        raise e.refuse("a complex window; multiply the frames by it (torch.Tensor.unfold), then use torch.fft.fft")
    return e.cast(window, dtype)


def _centered(e: Emitter, window: Ref, size: int) -> Ref:
    """Zeros on both sides, up to a frame."""
    missing = size - int(window.shape[0])
    before = missing // 2
    padding = [(before, missing - before)]
    return window if not missing else e.op("pad", window, out=(size,), padding=padding, border="constant", value=0.0)


@lowers_complex(aten.istft.default, torch.ops.t2n.istft.default)
def istft(
    e: Emitter,
    x: Ref,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Ref | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,  # the number of bins says it
    length: Dim | None = None,
    return_complex: bool = False,
) -> Ref:
    """Frames of the inverse transform, windowed, added where they overlap, and divided by what the windows add up to."""
    spectra = x if x.rank == 3 else as_complex(e.unsqueeze(real_layout(x), [0]))
    batch, bins, frames = spectra.shape
    turned = e.op("transpose", real_layout(spectra), out=(batch, frames, bins, 2), axes=[0, 2, 1, 3])
    if return_complex:
        signal = real_layout(transformed(e, as_complex(turned), [2], inverse=True))
    else:  # of a whole spectrum torch reads one half, too
        half = turned if bins == n_fft // 2 + 1 else e.slice(turned, 2, 0, n_fft // 2 + 1)
        signal = half_inverse(e, as_complex(half), 2, n_fft)
    signal = divided(e, signal, [n_fft], 1 if normalized else 2)
    weight = _centered(e, _window(e, window, win_length or n_fft, signal.dtype), n_fft)
    weight = e.unsqueeze(weight, [0, 1, 3])
    hop, begin = hop_length or n_fft // 4, n_fft // 2 if center else 0
    size = e.out.shape[-1]
    kept = _kept(begin, size, hop * (frames - 1) + n_fft)
    squares = e.broadcast_to(e.op("square", weight), (1, frames, n_fft, 1))
    total, envelope = (
        e.slice(_overlap_add(e, part, hop), 1, begin, kept) for part in (e.op("mul", signal, weight), squares)
    )
    result = e.op("div", total, e.binary("max", envelope, _SMALLEST_ENVELOPE, envelope.dtype))
    result = filled(e, result, 1, size)
    result = result if x.rank == 3 else e.squeeze(result, [0])
    return as_complex(result) if return_complex else e.squeeze(result, [result.rank - 1])


def _kept(begin: int, size: Dim, whole: Dim) -> Dim:
    """Of `size` samples from `begin`, those there are; behind them torch gives zeros."""
    return min(size, whole - begin) if isinstance(size, int) and isinstance(whole, int) else size


def _overlap_add(e: Emitter, frames: Ref, hop: int) -> Ref:
    """(batch, frames, size, parts) -> (batch, samples, parts): frame f added at f * hop.

    A frame is cut in rows of `hop` samples; row r belongs `r` rows further down: a transposed convolution whose filter is an identity.
    """
    batch, count, size, parts = frames.shape
    rows = -(-int(size) // hop)
    frames = filled(e, frames, 2, rows * hop)
    cut = e.reshape(frames, (batch, count, rows, hop * parts))
    cut = e.op("transpose", cut, out=(batch, rows, count, hop * parts), axes=[0, 2, 1, 3])
    identity = e.constant(torch.eye(rows, dtype=frames.dtype).reshape(1, rows, rows, 1), "overlap")
    total = (batch, 1, count + rows - 1, hop * parts)
    added = e.op(
        "deconv",
        cut,
        identity,
        out=total,
        border="constant",
        padding=[(0, 0), (0, 0)],
        stride=[1, 1],
        dilation=[1, 1],
        groups=1,
    )
    return e.reshape(added, (batch, (count + rows - 1) * hop, parts))
