"""silero-vad's own TorchScript file: exported with its state as input and output, it follows a recording frame by frame."""

from importlib.metadata import files

import numpy as np
import pytest
import torch

from torch_to_nnef import TractModel, quantize_and_verify

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")

# Sample rate -> the network for it inside the file, new samples a frame, samples kept from the frame before.
RATES = {16_000: ("_model", 512, 64), 8_000: ("_model_8k", 256, 32)}


@pytest.fixture
def silero():
    """A fresh one: the wrapper around the two networks keeps state."""
    file = next(f for f in files("silero-vad") if f.name == "silero_vad.jit").locate()
    return torch.jit.load(file, map_location="cpu").eval()


def recording(rate, seconds=6.0):
    """Syllables (a gliding voice through three formants) with noise bursts before them, and pauses with faint noise."""
    rng = np.random.default_rng(0)
    time = np.arange(int(rate * seconds)) / rate
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = np.zeros_like(time)
    for k in range(1, 30):
        partial = k * pitch
        first = 500 + 250 * np.sin(2 * np.pi * 1.3 * time)
        formants = sum(np.exp(-(((partial - f) / w) ** 2)) for f, w in ((first, 120), (1500, 200), (2500, 300)))
        voice += np.where(partial < 0.45 * rate, formants * np.sin(k * phase) / k**0.3, 0.0)
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * time), 0, None) * (np.sin(2 * np.pi * 0.4 * time) > 0)
    bursts = np.clip(np.sin(2 * np.pi * 3.1 * time + 0.9), 0, None) ** 8 * (np.sin(2 * np.pi * 0.4 * time) > 0)
    noise = rng.standard_normal(len(time))
    audio = 0.25 * syllables * voice / np.abs(voice).max() + 0.03 * bursts * noise + 0.001 * noise
    return torch.from_numpy(audio.astype(np.float32))


def follow(archive, audio, rate):
    """Probability of each frame, and the last state, from tract."""
    _, size, kept = RATES[rate]
    model = TractModel.load(archive)
    context, state, speech = torch.zeros(1, kept), torch.zeros(2, 1, 128), []
    for frame in audio.split(size)[: len(audio) // size]:
        x = torch.cat([context, frame[None]], 1)
        outputs = model.run(x, state)
        speech.append(float(outputs["speech"][0, 0]))
        context, state = x[:, -kept:], torch.from_numpy(outputs["next_state"])
    return np.array(speech), state


def follow_in_torch(silero, audio, rate):
    """The same from the file as its authors call it, which keeps context and state itself."""
    size = RATES[rate][1]
    with torch.no_grad():
        speech = [float(silero(frame[None], rate)) for frame in audio.split(size)[: len(audio) // size]]
    return np.array(speech), silero._state


def export(silero, path, rate, method):
    name, size, kept = RATES[rate]
    frame = torch.randn(2, size + kept, generator=torch.Generator().manual_seed(0))
    state = torch.zeros(2, 2, 128)
    return quantize_and_verify(
        getattr(silero, name),
        (0.1 * frame, state),
        path,
        method=method,
        dynamic_axes={"x": {0: "B"}, "state": {1: "B"}},
        output_names=["speech", "next_state"],
    )


@pytest.mark.parametrize("rate", RATES)
def test_every_frame_of_a_recording(silero, rate, tmp_path):
    export(silero, tmp_path / "vad.nnef.tgz", rate, None)
    audio = recording(rate)
    expected, expected_state = follow_in_torch(silero, audio, rate)
    assert expected.min() < 0.1 < 0.9 < expected.max()
    speech, state = follow(tmp_path / "vad.nnef.tgz", audio, rate)
    np.testing.assert_allclose(speech, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-4)


def test_in_q40(silero, tmp_path):
    report = export(silero, tmp_path / "vad.nnef.tgz", 16_000, "q40")
    assert report.ok
    stored = {row.fqn: row.storage for row in report.rows}
    # The first layer has 129 * 3 values a filter: no whole number of groups of 32.
    assert [fqn for fqn, storage in stored.items() if storage != "q40"] == ["encoder.0.reparam_conv.weight"]
    assert {"decoder.rnn.weight_ih", "decoder.rnn.weight_hh"} < stored.keys()
    assert sum(row.nbytes_after for row in report.rows) < 0.3 * sum(row.nbytes_before for row in report.rows)

    audio = recording(16_000)
    expected, _ = follow_in_torch(silero, audio, 16_000)
    speech, _ = follow(tmp_path / "vad.nnef.tgz", audio, 16_000)
    assert np.corrcoef(speech, expected)[0, 1] > 0.9
    assert ((speech > 0.5) == (expected > 0.5)).mean() > 0.95
