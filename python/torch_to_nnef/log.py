"""The package's logger; quiet unless the application configures logging."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LOGGER = logging.getLogger("torch_to_nnef")


@contextlib.contextmanager
def at_level(level: int) -> Iterator[None]:
    """The package's log level for the time of one call."""
    before = LOGGER.level
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
