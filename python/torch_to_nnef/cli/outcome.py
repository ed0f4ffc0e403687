"""What all commands have in common: logs on stderr, and how an end becomes an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NoReturn

from torch_to_nnef.exceptions import T2NError, T2NErrorIOPytorchTractNotISO
from torch_to_nnef.log import LOGGER, at_level

# Modules of the extra `llm`.
_EXTRA = {"accelerate", "gguf", "huggingface_hub", "jinja2", "peft", "sentencepiece", "tokenizers", "transformers"}


class Outcome(IntEnum):
    """Exit codes."""

    OK = 0
    NEGATIVE = 1
    """A verification was run, and said no."""
    ERROR = 2
    """Usage, or an error."""
    INTERRUPTED = 130


@contextmanager
def outcome(verbose: bool) -> Iterator[None]:
    """Log to stderr in the block, and exit as `Outcome` says if it raises; errors are a line, with `verbose` a traceback too."""
    try:
        with _logs_on_stderr(verbose):
            yield
    except KeyboardInterrupt:
        _exit("interrupted", Outcome.INTERRUPTED, verbose)
    except T2NErrorIOPytorchTractNotISO as error:
        _exit(f"verification failed: {error}", Outcome.NEGATIVE, verbose)
    except T2NError as error:
        _exit(f"error: {error}", Outcome.ERROR, verbose)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            _exit(f"error: {error}", Outcome.ERROR, with_traceback=True)
        _exit(f"error: no {error.name}: pip install 'torch-to-nnef-native[llm]'", Outcome.ERROR, verbose)
    except Exception as error:
        _exit(f"unexpected {type(error).__name__}: {error}", Outcome.ERROR, with_traceback=True)


def _exit(message: str, code: Outcome, with_traceback: bool) -> NoReturn:
    if with_traceback:
        traceback.print_exc()
    print(message, file=sys.stderr)
    sys.exit(code)


@contextmanager
def _logs_on_stderr(verbose: bool) -> Iterator[None]:
    """Ours; warnings and what libraries tell only with `verbose`, and their progress bars on terminals only."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: verbose or record.name == LOGGER.name or record.levelno >= logging.ERROR)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(capture=True)
    try:
        with at_level(logging.DEBUG if verbose else logging.INFO):
            yield
    finally:
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(handler)
