"""`t2n verify`, `run` and `inspect`: an archive of unknown origin, in a child process with limits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from torch_to_nnef.cli.arguments import Json, Verbose, archive_in
from torch_to_nnef.cli.arguments import sizes as symbols
from torch_to_nnef.cli.outcome import Outcome, outcome, printable
from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorTract,
)
from torch_to_nnef.files import staged, writing
from torch_to_nnef.inference_target import TractCheckTolerance

if TYPE_CHECKING:
    from torch_to_nnef.isolated import Limits

_Archive = Annotated[
    Path, Argument(metavar="FILE", help="A folder, tar or tgz, or a folder of t2n_export_llm_to_tract.")
]
_Memory = Annotated[
    int | None,
    Option(min=1, metavar="MIB", help="Address space of the child; none: 4096, and four times the size of FILE."),
]
_Seconds = Annotated[float, Option(min=0.1, help="Wall time of the child.")]


def verify(
    archive: _Archive,
    npz: Annotated[
        list[Path] | None,
        Option(help="Inputs, and outputs that are expected, by name; repeat it. Inputs that are in none are zeros."),
    ] = None,
    size: Annotated[
        list[str] | None, Option(metavar="SYMBOL=N", help="Of a symbol of such inputs; repeat it. Others are 3.")
    ] = None,
    tolerance: Annotated[
        TractCheckTolerance, Option("-tt", "--tract-check-io-tolerance", help="Within which outputs are as expected.")
    ] = TractCheckTolerance.APPROXIMATE,
    memory: _Memory = None,
    seconds: _Seconds = 120,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check an archive, load it in tract and run it, in a child process with limits.

    Exit code 0 if it runs and outputs are as expected; 1 if it is not sound, crashes, wants more than the limits, or computes otherwise.
    """
    with outcome(verbose):
        from torch_to_nnef import isolated

        try:
            with _errors_as_json(as_json):
                found = isolated.verify(
                    archive_in(archive),
                    npz or (),
                    sizes=symbols(size or []),
                    tolerance=tolerance,
                    limits=_limits(memory, seconds),
                )
        except (T2NErrorTract, T2NErrorInconsistentTensor) as error:
            print(printable(f"verification failed: {error}"), file=sys.stderr)
            raise SystemExit(Outcome.NEGATIVE) from None
        print(json.dumps(found, allow_nan=False) if as_json else _verified(found))
    if not found["ok"]:
        raise SystemExit(Outcome.NEGATIVE)


def run(
    archive: _Archive,
    inputs: Annotated[Path, Argument(help="An .npz file: arrays by the names of the inputs.")],
    outputs: Annotated[Path, Argument(help="The .npz file that is written.")],
    memory: _Memory = None,
    seconds: _Seconds = 120,
    force: Annotated[bool, Option("--force", help="Replace OUTPUTS if it exists.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run an archive in tract, in a child process with limits: an .npz file in, an .npz file out."""
    with outcome(verbose), _errors_as_json(as_json):
        from torch_to_nnef import isolated

        if os.path.lexists(outputs) and not force:
            raise T2NErrorInvalidArgument(f"{str(outputs)!r} exists (--force replaces it)")
        if not outputs.parent.is_dir():
            raise T2NErrorInvalidArgument(f"cannot write {str(outputs)!r}: there is no such folder")
        arrays = isolated.run(archive_in(archive), inputs, limits=_limits(memory, seconds))
        with staged(outputs) as beside, writing(outputs):
            isolated.save_arrays(beside, arrays)
        facts = [{"name": n, "dtype": a.dtype.name, "shape": list(a.shape)} for n, a in arrays.items()]
        if as_json:
            print(json.dumps({"ok": True, "path": str(outputs), "outputs": facts}))
        else:
            print(printable("\n".join(_fact(fact) for fact in facts)))


def inspect(
    archive: _Archive,
    memory: _Memory = None,
    seconds: _Seconds = 120,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what an archive holds, by its headers and its text: nothing of it is run, weights are not read."""
    with outcome(verbose), _errors_as_json(as_json):
        from torch_to_nnef import isolated

        found = isolated.inspect(archive_in(archive), limits=_limits(memory, seconds))
        print(json.dumps({"ok": True, **found}) if as_json else _inspected(found))


@contextmanager
def _errors_as_json(wanted: bool) -> Iterator[None]:
    """Errors are on stdout too, as JSON, where JSON is wanted."""
    try:
        yield
    except T2NError as error:
        if wanted:
            print(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
        raise


def _limits(memory: int | None, seconds: float) -> Limits:
    from torch_to_nnef.isolated import Limits

    return Limits(memory, seconds)


def _verified(found: dict[str, Any]) -> str:
    lines = [
        f"{found['archive']}: {'sound' if found['ok'] else 'NOT as expected'}, ran in {1e3 * found['seconds']:.1f} ms"
    ]
    zeros = {fact["name"] for fact in found["inputs"]} - set(found["given"])
    lines += [f"  input  {_fact(fact)}{', zeros' if fact['name'] in zeros else ''}" for fact in found["inputs"]]
    lines += [f"  output {_fact(fact)}{_expected(fact, found['tolerance'])}" for fact in found["outputs"]]
    return printable("\n".join(lines))


def _expected(fact: dict[str, Any], tolerance: str) -> str:
    notes = [f"{fact['non_finite']} not finite"] if fact["non_finite"] else []
    if compared := fact["expected"]:
        verdict = "as expected" if compared["ok"] else compared["reason"] or f"{compared['outside']} values differ"
        notes.append(f"{verdict} ({tolerance}; max error {compared['max_abs']})")
    return "".join(f", {note}" for note in notes)


def _inspected(found: dict[str, Any]) -> str:
    weights = found["weights"]
    bits = weights["bits_per_weight"]
    lines = [f"{found['archive']}: graph {found['graph']}, {found['bytes']} bytes"]
    lines += [f"  input    {_fact(fact)}" for fact in found["inputs"]]
    lines += [f"  output   {name}" for name in found["outputs"]]
    lines += [f"  property {name} = {value}" for name, value in found["properties"].items()]
    lines += [f"  {t['tensors']:>6} {dtype:<8} {t['bytes']:>14} bytes" for dtype, t in weights["by_dtype"].items()]
    if bits is not None:
        lines.append(f"  {weights['elements']} weights, {bits:.2f} bits each")
    lines += [f"  {_fact(entry)}, {entry['bytes']} bytes" for entry in found["entries"]]
    return printable("\n".join(lines))


def _fact(fact: dict[str, Any]) -> str:
    shape = "" if fact["shape"] is None else f"[{', '.join(map(str, fact['shape']))}]"
    return f"{fact['name']}: {fact['dtype']}{shape}" if fact["dtype"] else fact["name"]
