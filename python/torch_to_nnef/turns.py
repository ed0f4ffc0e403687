"""Turns: what changes a model, torch or the log for the time of a call is done by one thread at a time."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# One a process: in a forked child no thread is left that could release the parent's.
_TURNS: dict[int, threading.RLock] = {}


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, waiting until no other thread of the process is in any function so decorated; calls may be nested."""

    @functools.wraps(function)
    def in_turn(*args: P.args, **kwargs: P.kwargs) -> R:
        with _TURNS.setdefault(os.getpid(), threading.RLock()):
            return function(*args, **kwargs)

    return in_turn


def in_this_thread(function: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What to put in the place of `otherwise` for a time: `function` to the thread that asks, itself to all others."""
    owner = threading.get_ident()

    @functools.wraps(otherwise)
    def either(*args: Any, **kwargs: Any) -> Any:
        # dynamo, which traces the branches of torch.cond, knows no threads
        ours = torch.compiler.is_dynamo_compiling() or threading.get_ident() == owner
        return (function if ours else otherwise)(*args, **kwargs)

    return either
