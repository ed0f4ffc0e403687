"""What each method costs real models: held-out data, fixed seeds; numbers to `results.json` and `docs/quality.md`.

Methods are measured in torch; with --verify the archive of the same weights is run in tract and compared.
"""

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

import torch
from crepe import crepe
from minilm import minilm
from smollm2 import smollm2, smollm2_tied
from table import write_page

from torch_to_nnef import export_model_to_nnef
from torch_to_nnef.compress import DEFAULT_COMPRESSION, call_method
from torch_to_nnef.export import captured_graph
from torch_to_nnef.graph.folds import find_folds
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.quantize import Selection, quantize_
from torch_to_nnef.quantize.rows import recording
from torch_to_nnef.tensor.quant.qtract import quantize_q40

RESULTS = Path(__file__).parent / "results.json"
SUBJECTS = {
    "smollm2": smollm2,
    "smollm2_tied": smollm2_tied,
    "minilm": minilm,
    "crepe_tiny": lambda tokens: crepe("tiny"),
    "crepe_full": lambda tokens: crepe("full"),
}


def abs_max(model, selection, **kw):
    """What many tools do: the largest magnitude of a group is 8 steps, so one sign is clipped."""
    return quantize_(
        model, lambda w, name: quantize_q40(w, "abs_max", name=name), selection=selection, method="abs_max"
    )


METHODS = {"float": None, "abs_max": abs_max, "min_max_q4_0_all": DEFAULT_COMPRESSION["min_max_q4_0_all"]} | {
    key: method for key, method in DEFAULT_COMPRESSION.items() if key.startswith("q40")
}


def measured(subject, method, verify):
    """Numbers of one method on one model; of None, those of the float model."""
    if method is None:
        return {"bits": 32.0, "cpu": 0.0, **subject.measure(subject.model)}
    step = subject.step(subject.model)
    _, graph = captured_graph(
        step, prepare(step, subject.sample, subject.names.get("input_names"), subject.target.dynamic_axes)
    )
    selection = Selection(uses=weight_uses(graph), folds=find_folds(graph, subject.carried), **subject.asked)
    work, extras = copy.deepcopy(subject.model), {"calibration": list(subject.calibration), "selection": selection}
    with recording() as recorded:
        wall, cpu = time.perf_counter(), time.process_time()
        work = call_method(method, work, tokenizer=subject.tokenizer, **extras)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = [row for row in recorded if row.quantized]
    weights = sum(torch.Size(row.shape).numel() for row in rows)
    bits = 8 * sum(row.nbytes_after for row in rows) / weights
    numbers = {"tensors": len(rows), "bits": bits, "cpu": cpu, "wall": wall, **subject.measure(work)}
    return numbers | {"verified": _verified(subject, work)} if verify else numbers


def _verified(subject, quantized):
    """True: tract's outputs are those of the quantized torch model; else `T2NErrorIOPytorchTractNotISO` is raised."""
    with tempfile.TemporaryDirectory() as folder:
        export_model_to_nnef(
            subject.step(quantized), subject.sample, Path(folder) / "model.nnef.tar", subject.target, **subject.names
        )
    return True


def stored(name, subject, method, numbers):
    """Put a row into results and page; rows that other runs wrote in the meantime stay."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known = results.get(name, {}).get("rows", {}) | {method: numbers}
    rows = {key: known[key] for key in METHODS if key in known}
    results[name] = {"title": subject.title, "columns": [vars(column) for column in subject.columns], "rows": rows}
    results = {key: results[key] for key in SUBJECTS if key in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="(default: all)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration, for language models (default: 8192)")
    parser.add_argument("--verify", action="store_true", help="run each archive in tract too")
    parser.add_argument("--json", action="store_true", help="print the numbers; leave the files as they are")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    printed = {}
    for name in args.model:
        subject = SUBJECTS[name](args.tokens)
        for method in args.method:
            numbers = measured(subject, METHODS[method], args.verify)
            if args.json:
                printed.setdefault(name, {})[method] = numbers
            else:
                stored(name, subject, method, numbers)
                print(name, method, numbers, flush=True)
    if args.json:
        print(json.dumps(printed, indent=1))


if __name__ == "__main__":
    main()
