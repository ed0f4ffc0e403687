"""Handlers from outside: modules named by the user, entry points of installed packages, and whose fault an error is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument, T2NErrorNotImplemented, T2NErrorRuntime

GROUP = "torch_to_nnef.ops"


@cache
def load_entry_points() -> None:
    """Import what installed packages name in the group `torch_to_nnef.ops`, once.

    Raises `T2NErrorRuntime` that names the package whose module cannot be imported.
    """
    for point in entry_points(group=GROUP):
        _load(point)


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        package = point.dist.name if point.dist else "an unknown package"
        raise T2NErrorRuntime(
            f"the handlers of package {package!r} ({GROUP}: {point.name} = {point.value}) could not be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def load_modules(names: Sequence[str]) -> None:
    """Import the modules `names` for the handlers they register.

    Raises `T2NErrorInvalidArgument` for one that does not exist, or that fails: its own error is the cause.
    """
    if isinstance(names, str):
        raise T2NErrorInvalidArgument(f"load_extra_op_modules takes a list of module names, got the text {names!r}")
    for name in names:
        _import(name)


def _import(name: str) -> None:
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        missing = "does not exist" if error.name == name else f"needs {error.name!r}, which is not installed"
        raise T2NErrorInvalidArgument(f"load_extra_op_modules: module {name!r} {missing}") from error
    except Exception as error:
        raise T2NErrorInvalidArgument(
            f"load_extra_op_modules: importing {name!r} failed: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def blamed(lower: Callable[..., Any], what: str, where: str) -> Iterator[None]:
    """An error in a handler that is not ours says so."""
    try:
        yield
    except T2NError:
        raise
    except Exception as error:
        if lower.__module__.startswith("torch_to_nnef."):
            raise
        raise T2NErrorNotImplemented(
            f"{what} at {where}: its handler {lower.__module__}.{lower.__qualname__} failed: {type(error).__name__}: {error}"
        ) from error
