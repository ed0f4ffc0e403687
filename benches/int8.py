"""8-bit models in tract beside the same in float, and beside torch's own: milliseconds a run, and ratios of one session.

One process, one thread; what is compared is timed in turns, round after round, and the best counts: load of the machine hits all alike.
"""

import argparse
import copy
import tempfile
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from torch_to_nnef import TractModel, TractNNEF, quantize_and_verify

TORCH, TRACT = "torch f32", "tract f32"
OURS, OURS_TENSOR = "tract int8", "tract int8_per_tensor"
TORCH_INT8, CONVERTED = "torch int8 (FX, x86)", "tract, of that model"


def conv_net():
    """3x3 convolutions with batch norm and ReLU, an image of 64 x 64: 100 million multiply-accumulates."""

    def conv(before, after, stride=1):
        return nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()

    body = *conv(3, 32, 2), *conv(32, 64), *conv(64, 64, 2), *conv(64, 128), *conv(128, 128, 2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), (3, 64, 64)


def separable_net():
    """Depthwise separable convolutions (MobileNet) with ReLU6, an image of 64 x 64."""

    def conv(before, after, kernel, stride=1, groups=1):
        layer = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        return layer, nn.BatchNorm2d(after), nn.ReLU6()

    body = [*conv(3, 32, 3, 2)]
    for before, after, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)):
        body += [*conv(before, before, 3, stride, before), *conv(before, after, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)), (3, 64, 64)


def mlp():
    """Three linear layers of 1024 with ReLU: 2.6 million multiply-accumulates a sample."""
    widths = (512, 1024, 1024, 1024, 10)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), (512,)


CASES = {
    "conv net": (conv_net, (1, 8)),
    "depthwise separable net": (separable_net, (1, 8)),
    "MLP": (mlp, (1, 64)),
}


def runners(model, shape, batch, folder):
    """A call for each form of `model`, on the same `batch` samples."""
    generator = torch.Generator().manual_seed(0)
    x, *batches = torch.randn(5, batch, *shape, generator=generator)
    converted = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    for calibration in batches:
        converted(calibration)
    converted = convert_fx(converted)
    unchecked = TractNNEF.latest(check_io=False)
    forms = {
        TRACT: (model, None),
        OURS: (model, "int8"),
        OURS_TENSOR: (model, "int8_per_tensor"),
        CONVERTED: (converted, None),
    }
    calls = {TORCH: partial(model, x), TORCH_INT8: partial(converted, x)}
    for name, (form, method) in forms.items():
        path = folder / f"{name}.nnef.tar"
        data = {"calibration": batches} if method else {}
        quantize_and_verify(form, x, path, method, inference_target=unchecked, force=True, **data)
        calls[name] = partial(TractModel.load(path, threads=1).run, x)
    return {name: calls[name] for name in (TORCH, TORCH_INT8, TRACT, OURS, OURS_TENSOR, CONVERTED)}


def best(calls, rounds, at_least=0.05):
    """Milliseconds of the fastest run of each; a turn takes `at_least` seconds."""
    taken = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            end = time.perf_counter() + at_least
            while (start := time.perf_counter()) < end:
                call()
                taken[name] = min(taken[name], 1e3 * (time.perf_counter() - start))
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(
        title=f"8 bits, one thread: best of {args.rounds} rounds",
        caption="x: times as fast as that in the same rounds",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "ms", "x tract f32", "x torch f32", "x torch int8"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for title, (make, sizes) in CASES.items():
            model, shape = make()
            for batch in sizes:
                found = best(runners(model.eval(), shape, batch, Path(folder)), args.rounds)
                table.add_section()
                table.add_row(f"[bold]{title}, batch of {batch}")
                for name, ms in found.items():
                    ratios = (found[other] / ms for other in (TRACT, TORCH, TORCH_INT8))
                    table.add_row(name, f"{ms:.3f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
