"""Commands. A module a command; torch and transformers are imported when a command runs, so that `--help` is quick."""

from __future__ import annotations

from importlib import import_module


def t2n() -> None:
    """`t2n`."""
    _start("main")


def t2n_export_llm_to_tract() -> None:
    """`t2n_export_llm_to_tract`."""
    _start("llm")


def _start(module: str) -> None:
    import_module(f"{__name__}.{module}").app()
