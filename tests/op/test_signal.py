"""Fourier transforms, spectrograms and windows: a row a call, and the front ends of speech models at any length."""

import pytest
import torch
from rows import B, Row, check, ids, x
from torch import nn

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF

fft = torch.fft
BT = {0: "B", 1: "T"}
WINDOW = torch.hann_window(16)
SHORT = x(10).abs() + 0.2
NARROW = {"window": SHORT, "win_length": 10}


def z(*shape, seed=0):
    return torch.complex(x(*shape, seed=seed), x(*shape, seed=seed + 1))


def spectra(t, n_fft=16, hop=4, **options):
    return torch.stft(t, n_fft, hop, **{"window": WINDOW, "return_complex": True, **options})


def signal(t, n_fft=16, hop=4, **options):
    return torch.istft(t, n_fft, hop, **{"window": WINDOW, **options})


def row(name, function, *inputs, axes=BT):
    return Row(name, function, inputs, {"args_0": axes})


ROWS = [
    *[row(f"fft_{norm}", lambda t, norm=norm: fft.fft(t, norm=norm), z(2, 12)) for norm in ("backward", "ortho", "forward")],
    *[row(f"irfft_{norm}", lambda t, norm=norm: fft.irfft(t, norm=norm), z(2, 7)) for norm in ("backward", "ortho", "forward")],
    row("fft_of_real", lambda t: fft.fft(t).abs(), x(2, 12)),
    row("fft_of_integers", lambda t: fft.rfft(t), ids(2, 12)),
    row("fft_cut", lambda t: fft.fft(t, n=7), z(2, 12), axes=B),
    row("fft_padded", lambda t: fft.rfft(t, n=20, dim=0), x(12, 2), axes={1: "B"}),
    row("ifft", lambda t: fft.ifft(t).real, z(2, 12)),
    row("ifft_of_real", lambda t: fft.ifft(t).resolve_conj(), x(2, 12)),
    row("ihfft", lambda t: fft.ihfft(t).imag, x(2, 12)),
    row("hfft", lambda t: fft.hfft(t, norm="ortho"), z(2, 7)),
    row("irfft_odd", lambda t: fft.irfft(t, n=11), z(2, 7), axes=B),
    row("irfft_cut", lambda t: fft.irfft(t, n=6), z(2, 7), axes=B),
    row("fft2", lambda t: fft.ifft2(fft.fft2(t, norm="ortho")).real, x(2, 12)),
    row("rfftn", lambda t: fft.rfftn(t, dim=(0, 1), norm="forward"), x(3, 12, 2)),
    row("irfftn", lambda t: fft.irfftn(t, dim=(-2, -1)), z(2, 5, 6)),
    row("hfftn", lambda t: fft.hfftn(t, dim=(1, 2)), z(2, 5, 6), axes=B),
    row("fftshift", lambda t: (fft.fftshift(t), fft.ifftshift(t), fft.fftshift(t, (0,)), fft.ifftshift(t, 1)), x(3, 12)),
    row("fftshift_complex", lambda t: fft.ifftshift(fft.fftshift(t, 1)), z(2, 12)),
    row("fftfreq", lambda t: t * fft.fftfreq(12) + fft.rfftfreq(22, d=0.1), x(2, 12), axes=B),
    row("round_trip_any_length", lambda t: fft.irfft(fft.rfft(t) * (1 + 1j), n=t.shape[1]), x(2, 13)),
    row("convolution_any_length", lambda t: fft.irfft(fft.rfft(t, n=2 * t.shape[1]) ** 2, n=2 * t.shape[1]), x(2, 13)),
    row("stft", lambda t: spectra(t).abs().pow(2), x(2, 64)),
    row("stft_of_one", spectra, x(64), axes={0: "T"}),
    row("stft_without_window", lambda t: torch.stft(t, 16, normalized=True, return_complex=True), x(2, 64)),
    row("stft_short_window", lambda t: spectra(t, 16, 5, window=SHORT, win_length=10, center=False), x(2, 64)),
    row("stft_window_made_here", lambda t: spectra(t, 16, 5, window=torch.hann_window(16, periodic=False)), x(2, 64)),
    row("stft_as_real", lambda t: spectra(t, return_complex=False), x(2, 64)),
    row("stft_two_sided", lambda t: spectra(t, onesided=False), x(2, 64)),
    row("stft_of_complex", lambda t: spectra(t, center=False), z(2, 64)),
    row("stft_padded_with_zeros", lambda t: spectra(t, pad_mode="constant"), x(2, 64)),
    row("stft_window_given", lambda t, w: spectra(t, 16, 5, window=w, win_length=10), x(2, 64), SHORT),
    row("stft_cut", lambda t: spectra(t)[:, 2:5, :-1].abs(), x(2, 64)),
    row("istft", lambda t: signal(spectra(t) * (0.5 + 1j)), x(2, 64)),
    row("istft_of_spectra", signal, z(2, 9, 7), axes={0: "B", 2: "F"}),
    row("istft_length", lambda t: signal(spectra(t), length=t.shape[1]), x(2, 66)),
    row("istft_length_method", lambda t: spectra(t).istft(16, 4, window=WINDOW, length=t.shape[1]), x(2, 66)),
    row("istft_longer_than_frames", lambda t: signal(spectra(t), length=80), x(2, 66), axes=B),
    row("istft_short_window", lambda t: signal(spectra(t, 16, 3, **NARROW), 16, 3, **NARROW), x(2, 66)),
    row("istft_normalized", lambda t: signal(spectra(t, normalized=True), normalized=True), x(2, 66)),
    row("istft_without_window", lambda t: signal(spectra(t, 16, 5, window=None, center=False), 16, 5, window=None, center=False), x(2, 66)),
    row("istft_complex", lambda t: signal(t, onesided=False, return_complex=True), z(2, 16, 7), axes={0: "B", 2: "F"}),
    row("istft_two_sided", lambda t: signal(t, onesided=False), z(16, 7), axes={1: "F"}),
    *[
        row(window, lambda t, w=window: t * getattr(torch, w)(12) - getattr(torch, w)(12, periodic=False), x(2, 12), axes=B)
        for window in ("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window")
    ],
    *[
        row(f"windows_{window}", lambda t, w=window: t * getattr(torch.signal.windows, w)(12), x(2, 12), axes=B)
        for window in ("cosine", "exponential", "gaussian", "hann", "kaiser", "nuttall")
    ],
]  # fmt: skip


# torch warns of windows left out, of real results, and of zeros behind the last frame.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_op_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


def test_a_window_is_stored_not_computed(tmp_path):
    check(row("stft", lambda t: spectra(t, window=torch.hann_window(16)), x(2, 64)), tmp_path)
    text = (tmp_path / "op.nnef" / "graph.nnef").read_text()
    assert 'label = "constant.hann_window"' in text
    assert "window = constant_hann_window)" in text
    assert "cos(" not in text


def test_a_complex_window_is_refused(tmp_path):
    window = z(16)
    with pytest.raises(T2NErrorNotImplemented, match="complex window"):
        check(row("stft", lambda t: spectra(t, window=window, onesided=False), x(2, 64)), tmp_path)


class Spectrogram(nn.Module):
    def __init__(self, n_fft=64, mels=10):
        super().__init__()
        self.n_fft, self.hop = n_fft, n_fft // 4
        self.register_buffer("window", torch.hann_window(n_fft))
        self.register_buffer("mel", torch.rand(mels, n_fft // 2 + 1, generator=torch.Generator().manual_seed(0)))

    def spectra(self, wave):
        return torch.stft(wave, self.n_fft, self.hop, window=self.window, return_complex=True)


class LogMel(Spectrogram):
    """Power, mel bands, log."""

    def forward(self, wave):
        return torch.log(torch.clamp(self.mel @ self.spectra(wave).abs().pow(2), min=1e-10))


class WhisperLogMel(Spectrogram):
    """As Whisper has it: without the last frame, at most 8 decades below the loudest."""

    def forward(self, wave):
        mel = torch.clamp(self.mel @ (self.spectra(wave)[..., :-1].abs() ** 2), min=1e-10).log10()
        return (torch.maximum(mel, mel.amax((-2, -1), keepdim=True) - 8.0) + 4.0) / 4.0


class Enhancer(Spectrogram):
    """A mask on the spectra, and back to a wave of the same length."""

    def __init__(self):
        super().__init__()
        bins = self.n_fft // 2 + 1
        self.net = nn.Sequential(nn.Conv1d(bins, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, bins, 3, padding=1))

    def forward(self, wave):
        spectra = self.spectra(wave)
        mask = torch.sigmoid(self.net(spectra.abs()))
        return torch.istft(spectra * mask, self.n_fft, self.hop, window=self.window, length=wave.shape[-1])


class PhaseEnhancer(Enhancer):
    """Magnitude and phase apart."""

    def forward(self, wave):
        spectra = self.spectra(wave)
        masked = torch.polar(spectra.abs() * torch.sigmoid(self.net(spectra.abs())), spectra.angle())
        return torch.istft(masked, self.n_fft, self.hop, window=self.window)


class Filter(nn.Module):
    """A low pass with a delay, in the frequency domain."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor([0.1]))

    def forward(self, wave):
        spectrum = fft.rfft(wave)
        k = torch.arange(spectrum.shape[-1])
        response = torch.polar(torch.exp(-self.decay * k), 0.3 * k.float())
        return fft.irfft(spectrum * response, n=wave.shape[-1])


class GlobalFilter(nn.Module):
    """The token mixer of GFNet: complex weights, stored as pairs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5, 3, 2) * 0.02)

    def forward(self, image):
        spectrum = fft.rfft2(image, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        return fft.irfft2(spectrum, s=image.shape[1:3], dim=(1, 2), norm="ortho")


@pytest.mark.parametrize(
    ("module", "inputs", "axes"),
    [
        (LogMel, x(2, 400), BT),
        (WhisperLogMel, x(2, 400), BT),
        (Enhancer, x(2, 400), BT),
        (PhaseEnhancer, x(2, 400), BT),
        (Filter, x(2, 41), BT),
        (GlobalFilter, x(2, 8, 8, 3), B),
    ],
)
def test_front_end_gives_the_same_in_tract(module, inputs, axes, tmp_path):
    torch.manual_seed(0)
    target = TractNNEF.latest(dynamic_axes={"x": axes})
    export_model_to_nnef(module(), inputs, tmp_path / "module.nnef.tar", target, input_names=["x"])
