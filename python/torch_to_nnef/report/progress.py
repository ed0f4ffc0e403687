"""A progress bar with bytes, speed and the time that is left: on stderr, where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from torch_to_nnef.quantize.apply import Progress


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Callable[[str], Progress]]:
    """Within the block, `bars("quantize")` is a callback `(bytes done, all bytes, name)` that draws a bar of that title.

    console: where to draw; default: stderr. Nothing is drawn where that is no terminal; bars vanish at the end of the block, also after
    an error.
    """
    from rich import progress as rich
    from rich.console import Console

    console = console or Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[name]}", style="dim", markup=False),
    )
    with rich.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as drawn:

        def bar(title: str) -> Progress:
            task = drawn.add_task(title, total=None, name="")

            def update(done: int, total: int, name: str) -> None:
                drawn.update(task, completed=done, total=total, name=name)

            return update

        yield bar
