"""`t2n`: a verb a module, each of which imports torch and transformers only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from torch_to_nnef._native import __version__, tract_version
from torch_to_nnef.cli.archives import inspect, run, verify
from torch_to_nnef.cli.chat import chat
from torch_to_nnef.cli.compare import compare
from torch_to_nnef.cli.quantize_shards import quantize_shards
from torch_to_nnef.cli.sensitivity import sensitivity

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"torch-to-nnef-native {__version__}, tract {tract_version}")
        raise typer.Exit


@app.callback()
def t2n(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Say which.")
    ] = False,
) -> None:
    """Quantize, export, verify and use models with tract."""


app.command("chat")(chat)
app.command("compare")(compare)
app.command("inspect")(inspect)
app.command("quantize-shards")(quantize_shards)
app.command("run")(run)
app.command("sensitivity")(sensitivity)
app.command("verify")(verify)
