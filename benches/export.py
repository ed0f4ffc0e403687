"""Exporting beside `torch.export.export` and its decompositions on the same model, and text and linting over the number of nodes.

CPU seconds of one process, in turns, the best of each: what else the machine does counts little. The check in tract is left out.
"""

import argparse
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.export import Dim

from torch_to_nnef.export import Naming, Steps, plan_export
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.nnef.linter import lint
from torch_to_nnef.nnef.text import graph_text
from torch_to_nnef.nnef.writer import write_archive

PROMISE = 1.3
NODES = (1_250, 2_500, 5_000, 10_000)


def resnet50():
    """The model, its arguments, and which axes are dynamic."""
    import torchvision

    return torchvision.models.resnet50().eval(), {"x": torch.randn(2, 3, 224, 224)}, {"x": {0: "B"}}


def bert():
    """12 layers, hidden size 768."""
    from transformers import BertConfig, BertModel

    inputs = {"input_ids": torch.arange(32).reshape(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    return BertModel(BertConfig()).eval(), inputs, {name: {0: "B", 1: "S"} for name in inputs}


MODELS = {"ResNet-50": resnet50, "BERT, 12 layers": bert}


def cpu(call):
    """CPU seconds of `call`, and what it returns."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def by_torch(model, inputs, axes):
    """Seconds of the capture and of its decompositions."""
    dims = {name: dict.fromkeys(axes[name], Dim.DYNAMIC) for name in inputs}
    with torch.no_grad():
        exported, program = cpu(lambda: torch.export.export(model, (), inputs, dynamic_shapes=dims, strict=False))
        return exported, cpu(program.run_decompositions)[0]


def by_us(model, inputs, axes):
    """Seconds up to a written archive, and their split by the wall clock."""
    target, steps = TractNNEF.latest(dynamic_axes=axes), Steps()

    def export():
        plan = plan_export(model, inputs, target, Naming(), (), steps)
        with tempfile.TemporaryDirectory() as folder, steps("write"):
            write_archive(plan.document, Path(folder) / "model.nnef.tar", "tar", 0)

    return cpu(export)[0], steps


def beside_torch(rounds):
    table = Table(
        title="Export without the check, CPU seconds",
        caption=f"promise: at most {PROMISE} x torch",
        title_justify="left",
    )
    for column in ("", "torch.export", "decompositions", "ours", "x torch", "split (wall)"):
        table.add_column(column, justify="right" if column != "" else "left")
    for name, make in MODELS.items():
        case = make()
        by_torch(*case), by_us(*case)  # imports and caches
        theirs, ours = zip(*((by_torch(*case), by_us(*case)) for _ in range(rounds)), strict=True)
        exported, decomposed = min(theirs, key=sum)
        total, steps = min(ours, key=lambda pair: pair[0])
        ratio = total / (exported + decomposed)
        cells = (exported, decomposed, total, ratio)
        table.add_row(name, *(f"{cell:.2f}" for cell in cells), str(steps))
    return table


def over_nodes():
    table = Table(
        title="Text and linting of a graph, CPU ms", caption="linear: us a node stay the same", title_justify="left"
    )
    for column in ("nodes", "text", "us a node", "lint", "us a node"):
        table.add_column(column, justify="right")
    for nodes in NODES:
        document = plan_export(Chain(nodes), torch.ones(2), TractNNEF.latest(), Naming(), (), Steps()).document
        lines = len(document.statements)
        text, lints = (min(cpu(partial(f, document))[0] for _ in range(3)) for f in (graph_text, lint))
        cells = (1e3 * text, 1e6 * text / lines, 1e3 * lints, 1e6 * lints / lines)
        table.add_row(str(lines), *(f"{cell:.2f}" for cell in cells))
    return table


class Chain(nn.Module):
    """`nodes` additions."""

    def __init__(self, nodes):
        super().__init__()
        self.nodes = nodes

    def forward(self, x):
        for i in range(self.nodes):
            x = x + float(i)
        return x


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=150)
    console.print(beside_torch(args.rounds))
    console.print(over_nodes())


if __name__ == "__main__":
    main()
