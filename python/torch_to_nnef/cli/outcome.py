"""What all commands have in common: logs on stderr, and how an end becomes an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
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
        with _terminated_tidily(), _logs_on_stderr(verbose):
            yield
    except KeyboardInterrupt:
        _exit("interrupted", Outcome.INTERRUPTED, verbose)
    except _Terminated as terminated:
        _exit("terminated", 128 + terminated.signal, verbose)  # as shells say of what a signal ended
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


class _Terminated(BaseException):
    def __init__(self, signal: int) -> None:
        self.signal = signal


@contextmanager
def _terminated_tidily() -> Iterator[None]:
    """In the block, what asks the process to end raises instead, so that what is unfinished goes; asking again changes nothing."""

    def terminate(number: int, _frame: FrameType | None) -> NoReturn:
        for name in before:
            signal.signal(name, signal.SIG_IGN)
        raise _Terminated(number)

    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # An ignored one, as by nohup, stays so; only the main thread may set any.
    main = threading.current_thread() is threading.main_thread()
    before = {name: signal.getsignal(name) for name in names if main and signal.getsignal(name) is signal.SIG_DFL}
    for name in before:
        signal.signal(name, terminate)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _exit(message: str, code: int, with_traceback: bool) -> NoReturn:
    if with_traceback:
        traceback.print_exc()
    print(printable(message), file=sys.stderr)
    sys.exit(code)


def printable(text: str) -> str:
    """`text`, in which names come from files: they must not speak to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


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
