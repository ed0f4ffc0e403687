"""`t2n`: a verb a module."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def t2n() -> None:
    """Quantize, export, verify and use models with tract."""
