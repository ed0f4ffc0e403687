"""Small models with weights that are exact on every machine, and the hashes of their archives.

`golden.py THREADS REPEATS` prints them as JSON; `golden.py --write` commits to them, after a change that is meant to change archives.
"""

import hashlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn

from torch_to_nnef import TractNNEF, export_model_to_nnef, quantize_and_verify

sys.path.insert(0, str(Path(__file__).parent / "llm"))

from tiny import tiny_llama, tiny_model

VERSIONS = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
QUIET = logging.ERROR


def dyadic(model):
    """Multiples of 1/64 for all weights: their sums are exact in f32, in whatever order."""
    with torch.no_grad():
        for at, tensor in enumerate((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point():
                steps = torch.arange(tensor.numel()) * (2 * at + 3) % 61 - 30
                tensor.copy_((steps / 64).reshape(tensor.shape))
    return model.eval()


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True, bidirectional=True), nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def mlp():
    return dyadic(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 8)))


def linear():
    """Nothing before the weight: what a calibration sees of it, squares included, is exact too."""
    return dyadic(nn.Sequential(nn.Linear(64, 32)))


def convolutional():
    return dyadic(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))


def ramp(*shape):
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 17 - 8).reshape(shape) / 8


def exported(model, x, suffix, axes=None):
    def write(folder):
        path = folder / f"net.nnef{suffix}"
        level = None if suffix == "" else 6 if suffix == ".tgz" else 0
        target = TractNNEF(TractNNEF.latest_version(), dynamic_axes=axes or {})
        export_model_to_nnef(model(), x, path, target, compression_level=level, log_level=QUIET)

    return write


def quantized(model, x, method, **extra):
    return lambda folder: quantize_and_verify(model(), x, folder / "net.nnef.tar", method=method, **extra)


def llama(folder):
    from torch_to_nnef.llm_tract.export import export_llm
    from torch_to_nnef.llm_tract.options import LlmOptions

    turns = {"rope_type": "default", "rope_theta": 1.0}  # all 1: other powers are rounded by each CPU in its own way
    source = tiny_llama(folder / "source", dyadic(tiny_model(rope_parameters=turns)))
    options = {"local_dir": source, "export_dirpath": folder / "llm", "compression_method": "min_max_q4_0_all"}
    export_llm(LlmOptions(**options, no_verify=True))
    (folder / "llm" / "model" / "model.nnef.tgz").rename(folder / "net.nnef.tgz")


MODELS = {
    "mlp in a folder": exported(mlp, ramp(2, 64), "", {"input": {0: "B"}}),
    "mlp in a tar": exported(mlp, ramp(2, 64), ".tar"),
    "mlp in a tgz": exported(mlp, ramp(2, 64), ".tgz"),
    "lstm": exported(lambda: dyadic(Tagger()), ramp(1, 5, 8), ".tar"),
    "q40": quantized(mlp, ramp(2, 64), "q40"),
    "q40 of an lstm": quantized(lambda: dyadic(Tagger()), ramp(1, 5, 8), "q40"),
    "q40 weighted by inputs": quantized(linear, ramp(2, 64), "q40_imatrix", calibration=[ramp(2, 64)]),
    "int8": quantized(convolutional, ramp(1, 4, 9, 9), "int8_min_max", calibration=[ramp(1, 4, 9, 9)]),
    "tiny llama": llama,
}


def digest(write):
    """Of the archive that `write` leaves as `net.nnef*` in a folder of its own: names and contents."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        (path,) = Path(folder).glob("net.nnef*")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        whole = hashlib.sha256()
        for file in files:
            if file.is_file():
                whole.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
        return whole.hexdigest()


def digests(names=tuple(MODELS)):
    return {name: digest(MODELS[name]) for name in names}


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        made = json.dumps({"versions": VERSIONS, "sha256": digests()}, indent=2)
        sys.exit(Path(__file__).with_name("golden.json").write_text(f"{made}\n") == 0)
    threads, repeats = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    for _ in range(repeats):
        print(json.dumps(digests()))
