"""`t2n compare`: two archives side by side on the same inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from torch_to_nnef.cli.arguments import Json, Verbose, archive_in, inside, sizes
from torch_to_nnef.cli.outcome import Outcome, outcome
from torch_to_nnef.exceptions import T2NErrorNotFoundFile
from torch_to_nnef.inference_target import TractCheckTolerance

if TYPE_CHECKING:
    from rich.table import Table

    from torch_to_nnef.verify.side_by_side import SideBySide

_WIDTH = 160
_LLM_INPUTS = ("tests/prompt_with_past_inputs.npz", "prompt_with_past_inputs.npz")


def compare(
    first: Annotated[Path, Argument(help="The reference: an archive, or a folder of t2n_export_llm_to_tract.")],
    second: Annotated[Path, Argument(help="What is compared with it.")],
    npz: Annotated[
        Path | None,
        Option(
            help="Inputs by name; none: a language model's own test of a prompt with a past, else random ones, the same each time."
        ),
    ] = None,
    size: Annotated[
        list[str] | None, Option(metavar="SYMBOL=N", help="Of a symbol of random inputs; repeat it. Others are 3.")
    ] = None,
    tolerance: Annotated[
        TractCheckTolerance, Option("-tt", "--tract-check-io-tolerance", help="Within which outputs are the same.")
    ] = TractCheckTolerance.APPROXIMATE,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run two archives in tract on the same inputs, and say how far apart their outputs are, how large they are and how long they take.

    Exit code 0 if all outputs are within the tolerance, 1 if not.
    """
    with outcome(verbose):
        from torch_to_nnef.tract_model import TractModel
        from torch_to_nnef.verify.side_by_side import random_inputs, side_by_side

        a, b = (TractModel.load(archive_in(path)) for path in (first, second))
        if npz is None and not size:
            npz = inside(first, _LLM_INPUTS)  # a random past is no past that a model makes
        inputs = random_inputs(a.inputs, sizes(size or [])) if npz is None else _arrays(npz)
        found = side_by_side(a, b, inputs, tolerance)
        if as_json:
            from torch_to_nnef.report.data import plain

            print(json.dumps(plain(found.to_dict()), allow_nan=False))
        else:
            from rich.console import Console

            Console(width=None if sys.stdout.isatty() else _WIDTH).print(_table(found, first.name, second.name))
    if not found.ok:
        raise SystemExit(Outcome.NEGATIVE)


def _arrays(path: Path) -> dict[str, Any]:
    from torch_to_nnef.isolated import load_arrays

    if not path.is_file():
        raise T2NErrorNotFoundFile(f"no inputs at {str(path)!r}")
    return load_arrays(path)


def _table(found: SideBySide, first: str, second: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from torch_to_nnef.report.words import size

    (bytes_a, bytes_b), (took_a, took_b) = found.weight_bytes, found.seconds
    caption = (
        f"weights {size(bytes_a)} and {size(bytes_b)}; a run takes {1e3 * took_a:.1f} and {1e3 * took_b:.1f} ms (one thread); "
        f"{'all within' if found.ok else 'not all within'} the tolerance"
    )
    title = Text(f"{first} and {second}", "bold")
    table = Table(title=title, caption=Text(caption), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for name in ("output", "max error", "RMSE", "cosine", "outside", "KL", "worst KL", "top-1 same"):
        table.add_column(name, justify="left" if name == "output" else "right", no_wrap=True)
    for output in found.outputs:
        if output.reason is not None:
            table.add_row(Text(f"{output.name}: {output.reason}", "red"))
            continue
        near = [f"{output.max_abs:.1e}", f"{output.rmse:.1e}", f"{output.cosine:.6f}", f"{output.outside_share:.2%}"]
        far = found.divergences.get(output.name)
        divergence = [f"{far.kl_mean:.2g}", f"{far.kl_max:.2g}", f"{far.top1_same:.1%}"] if far else [""] * 3
        table.add_row(*map(Text, [output.name, *near, *divergence]))
    return table
