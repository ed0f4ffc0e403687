"""Q40 and export beside memory, gguf-py and, if one is given, another package importable as `torch_to_nnef`: ratios of one run.

Each measurement is a child process of its own, so that threads, memory and packages are its own too. Calls compared with each other are
timed in turns, round after round: load of the machine hits them alike.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEED = 0
MIB = 1 << 20
MEMORY_MIB = 512
EXPORTS = 2
PROMISE_PER_WEIGHT, PROMISE_MIB = 0.6, 64
ONE_THREAD = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SCAN, MEMCPY, GGUF = "read only (np.max)", "memcpy (np.copyto)", "gguf-py quantize Q4_0"
PUBLIC = "fp_to_tract_q4_0_with_min_max_calibration"


# -- children: each returns JSON


def kernels(args):
    """Times of each call on one tensor of `args.mebibytes` MiB of f32."""
    import gguf
    import numpy as np

    from torch_to_nnef import _native

    x = np.random.default_rng(SEED).standard_normal((args.mebibytes << 10, 256), dtype=np.float32)
    data, shape = x.reshape(-1).view(np.uint8), list(x.shape)
    copy, codes, scales = np.empty_like(data), np.empty(x.size // 2, np.uint8), np.empty(x.size // 16, np.uint8)
    blocks = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_0)

    def quantize(encoder):
        return lambda: _native.q40_quantize(data, "f32", encoder, 1.0, "w", codes, scales)

    def archive():
        writer = _native.ArchiveWriter(Path(folder) / "w.nnef.tar", "tar")
        writer.add_q40("w", shape, codes, scales)
        writer.finish()

    with tempfile.TemporaryDirectory() as folder:
        calls = {
            SCAN: lambda: data.view(np.int64).max(),
            MEMCPY: lambda: np.copyto(copy, data),
            "quantize, signed_extreme": quantize("signed_extreme"),
            "quantize, min_max": quantize("min_max"),
            GGUF: lambda: gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_0),
            "dequantize": lambda: _native.q40_dequantize(codes, scales, "f32", copy),
            "gguf-py dequantize": lambda: gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0),
            "quantize, scale_search": quantize("scale_search"),
            "write a .dat": lambda: _native.write_dat_q40(Path(folder) / "w.dat", shape, codes, scales),
            "write an archive (tar)": archive,
        }
        return timed(calls, args.rounds)


def public(args):
    """Times of the calls that both packages have, on the same values."""
    import torch

    from torch_to_nnef.tensor.quant import fp_to_tract_q4_0_with_min_max_calibration as quantize

    x = torch.randn(args.mebibytes << 10, 256, generator=torch.Generator().manual_seed(SEED))
    q = quantize(x)
    return timed({PUBLIC: lambda: quantize(x), "QTensor.decompress": q.decompress}, args.rounds)


def memory(args):
    """Bytes by which the peak grows while a large tensor is quantized, warmed up on a small one."""
    import torch

    from torch_to_nnef.tensor.quant import fp_to_tract_q4_0_with_min_max_calibration as quantize

    quantize(torch.ones(32, 32))
    x = torch.empty(MEMORY_MIB << 10, 256).normal_()
    before = peak_rss()
    quantized = quantize(x)
    return {"bytes": peak_rss() - before, "shape": list(quantized.shape)}


def export(args):
    """Times of exports of the float encoder, unchecked."""
    from torch_to_nnef.export import export_model_to_nnef
    from torch_to_nnef.inference_target import TractNNEF

    model, inputs = encoder()
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden"]}
    options = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.stand_in_tract:  # keeps a package from downloading one: nothing is checked, only its version is asked
            tract = options["specific_tract_binary_path"] = Path(folder) / "tract"
            tract.write_text(f"#!/bin/sh\necho tract {TractNNEF.latest_version()}\n")
            tract.chmod(0o755)
        target = TractNNEF(TractNNEF.latest_version(), check_io=False, **options)
        paths = (Path(folder) / f"encoder_{i}.nnef" for i in range(EXPORTS + 1))
        return timed({"export": lambda: export_model_to_nnef(model, inputs, next(paths), target, **names)}, EXPORTS)


def whole(args):
    """The report of the encoder quantized, exported, verified."""
    from torch_to_nnef import quantize_and_verify

    model, inputs = encoder()
    axes = {name: {0: "B", 1: "S"} for name in ("input_ids", "attention_mask")}
    with tempfile.TemporaryDirectory() as folder:
        report = quantize_and_verify(model, inputs, Path(folder) / "encoder.nnef.tar", dynamic_axes=axes)
    totals = report.totals
    return {
        "ok": report.ok,
        "steps": report.steps,
        "weights": totals.parameter_count,
        "bits": totals.bits_per_weight,
        "archive": report.archive_bytes,
    }


CHILDREN = {child.__name__: child for child in (kernels, public, memory, export, whole)}


def encoder():
    """A BERT of the size of MiniLM with random weights, and sample inputs of 16 tokens."""
    import torch
    from transformers import BertConfig, BertModel

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
            self.bert = BertModel(config, add_pooling_layer=False)

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    torch.manual_seed(SEED)
    return Encoder().eval(), (torch.arange(16).reshape(1, 16), torch.ones(1, 16, dtype=torch.int64))


def timed(calls, rounds):
    """`(wall, CPU)` seconds of each round, by name, after a round that is not counted."""
    for call in calls.values():
        call()
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def peak_rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- the parent


def measure(args, child, python=sys.executable, **env):
    """What `child` returns under `python`; `{"error": ...}` if it fails."""
    command = [python, __file__, "--child", child, "--mebibytes", str(args.mebibytes), "--rounds", str(args.rounds)]
    if python != sys.executable:
        command.append("--stand-in-tract")
    inherited = {k: v for k, v in os.environ.items() if python == sys.executable or k != "PYTHONPATH"}
    done = subprocess.run(command, env=inherited | env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def throughput(args):
    gigabytes = args.mebibytes * MIB / 1e9
    title = f"One tensor of {args.mebibytes} MiB of f32, {args.rounds} rounds; GB/s of f32"
    columns = ("best ms", "GB/s", "median", "a core", "x memcpy", "x gguf-py", "x other")
    table = table_of(
        title,
        ("", *columns),
        "median, a core: GB/s by the median, and by CPU time, whatever else the machine does; ratios are of the best times",
    )
    for threads, env in ((1, ONE_THREAD), (os.cpu_count(), {})):
        taken = measure(args, "kernels", **env) | measure(args, "public", **env)
        other = measure(args, "public", args.other, **env) if args.other else {}
        table.add_row(f"[bold]{threads} thread{'s' * (threads > 1)}")
        for error in (taken.pop("error", None), other.pop("error", None)):
            if error:
                table.add_row(f"failed: {error}")
        bests = {name: min(wall for wall, _ in rounds) for name, rounds in taken.items()}
        for name, rounds in (taken | {f"{name} (other)": rounds for name, rounds in other.items()}).items():
            walls, cpus = zip(*rounds, strict=True)
            theirs = min(wall for wall, _ in other[name]) if name in other else None
            against = [
                reference and reference / min(walls) for reference in (bests.get(MEMCPY), bests.get(GGUF), theirs)
            ]
            speeds = [gigabytes / seconds for seconds in (min(walls), statistics.median(walls), min(cpus))]
            table.add_row(
                name, *("" if cell is None else f"{cell:.2f}" for cell in (1000 * min(walls), *speeds, *against))
            )
        table.add_section()
    return table


def peaks(args):
    promise = PROMISE_PER_WEIGHT * MEMORY_MIB / 4 + PROMISE_MIB
    title = f"Memory on top of a tensor of {MEMORY_MIB} MiB while {PUBLIC} runs"
    table = table_of(title, ("", "MiB", "of the promise"))
    table.add_row(f"promise: {PROMISE_PER_WEIGHT} byte a weight + {PROMISE_MIB} MiB", f"{promise:.0f}", "1.00")
    for name, python in packages(args):
        found = measure(args, "memory", python)
        mebibytes = found.get("bytes", 0) / MIB
        table.add_row(name, *(found.get("error", f"{mebibytes:.0f}"), f"{mebibytes / promise:.2f}"))
    return table


def whole_way(args):
    found = measure(args, "whole")
    if "error" in found:
        return table_of(f"quantize_and_verify failed: {found['error']}", ("",))
    verdict = "verified" if found["ok"] else "NOT ok"
    sizes = f"{found['weights'] / 1e6:.1f} M weights at {found['bits']:.2f} bits, archive of {found['archive'] / 1e6:.1f} MB"
    table = table_of("quantize_and_verify on a BERT with random weights", ("step", "s"), f"{verdict}; {sizes}")
    for step, seconds in [*found["steps"], ("total", sum(seconds for _, seconds in found["steps"]))]:
        table.add_row(step, f"{seconds:.2f}")
    return table


def exports(args):
    table = table_of(
        f"export_model_to_nnef of the same BERT in float, not checked, best of {EXPORTS}", ("", "s", "x this")
    )
    found = {name: measure(args, "export", python) for name, python in packages(args)}
    bests = {name: min(wall for wall, _ in taken["export"]) for name, taken in found.items() if "export" in taken}
    for name, taken in found.items():
        ratio = f"{bests[name] / bests['this']:.2f}" if {name, "this"} <= bests.keys() else ""
        table.add_row(name, f"{bests[name]:.2f}" if name in bests else taken["error"], ratio)
    return table


def packages(args):
    return [("this", sys.executable), *([("other", args.other)] if args.other else [])]


def table_of(title, columns, caption=None):
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    return table


def main():
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--other", metavar="PYTHON", default=os.environ.get("T2N_OTHER_PYTHON"), help="python of another venv"
    )
    parser.add_argument("--mebibytes", type=int, default=64, help="size of the tensor (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--stand-in-tract", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    for part in (throughput, peaks, whole_way, exports):
        console.print(part(args))
    if not args.other:
        console.print("No other package to compare with: give --other PYTHON, or set T2N_OTHER_PYTHON.")


if __name__ == "__main__":
    main()
