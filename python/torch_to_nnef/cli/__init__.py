"""Commands. A module a command; torch and transformers are imported when a command runs, so that `--help` is quick."""

from __future__ import annotations

import sys
from importlib import import_module


def t2n() -> None:
    """`t2n`."""
    _start("main")


def t2n_export_llm_to_tract() -> None:
    """`t2n_export_llm_to_tract`."""
    _start("llm")


def _start(module: str) -> None:
    try:
        app = import_module(f"{__name__}.{module}").app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print("error: commands need typer: pip install 'torch-to-nnef-native[llm]'", file=sys.stderr)
        sys.exit(2)
    app()
