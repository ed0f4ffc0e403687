"""An NNEF archive in the tract that is linked into this package: `TractModel`, and `Session`, its runs that carry state."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorMisuse, expect, listed
from torch_to_nnef.files import as_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    import torch
    from numpy.typing import NDArray

__all__ = ["Fact", "Session", "TractModel"]


@dataclass(frozen=True)
class Fact:
    """What is known of an input or output before a run.

    `dtype` is numpy's name of the item type as it crosses `TractModel.run`: quantized tensors appear as their integers,
    symbolic ones as `int64`. A dimension that is not known before the run is its expression, e.g. `"B"` or `"S+P"`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


class TractModel:
    """An archive loaded, optimized and ready to run. Immutable: threads may share it, and no run sees another's state.

    Make one with `load` or `load_bytes`. Errors: `T2NErrorNotFoundFile` if there is nothing at the path,
    `T2NErrorInconsistentTensor` for a container or `.dat` that is not what its headers say, `T2NErrorTract` for a graph
    that tract refuses, fails on, or that is kept from it because it could crash it.
    """

    def __init__(self, native: _native.Model, source: str) -> None:
        self._native = native
        self._source = source
        self.inputs: tuple[Fact, ...] = tuple(map(_fact, native.inputs))
        """In the order `run` takes them: that of the graph's signature."""
        self.outputs: tuple[Fact, ...] = tuple(map(_fact, native.outputs))
        self.properties: Mapping[str, Any] = native.properties
        """What the archive says of itself: a str, a list of them or a numpy array by name."""
        self.weight_bytes: int = native.weight_bytes
        """Bytes of constants that tract holds, packed weights as they are packed."""

    @classmethod
    def load(
        cls, path: str | PathLike[str], outputs: Sequence[str] | None = None, threads: int | None = None
    ) -> TractModel:
        """Load a folder, tar or tgz; `outputs` names assignments of graph.nnef to output instead of the graph's results.

        `threads`, at most 1024, share the work of each run, large products above all; without it a run keeps to its caller's thread.
        """
        return cls(_native.Model.load(as_path("path", path), _names(outputs), _thread_count(threads)), str(path))

    @classmethod
    def load_bytes(cls, data: bytes, outputs: Sequence[str] | None = None, threads: int | None = None) -> TractModel:
        """`load` for a tar or tgz in memory."""
        expect("data", data, (bytes, bytearray), "a tar or tgz in bytes")
        return cls(_native.Model.load_bytes(data, _names(outputs), _thread_count(threads)), f"{len(data)} bytes")

    def run(self, *args: NDArray[Any] | torch.Tensor, **named: NDArray[Any] | torch.Tensor) -> dict[str, NDArray[Any]]:
        """Run once; inputs in order or by name, numpy arrays or torch tensors, each of the dtype of its `Fact`.

        Nothing is converted: a dtype or shape that does not fit, a symbol given two sizes, an input missing or unknown
        raise `T2NErrorInvalidArgument`. Returns the outputs by name, as arrays of their own memory. The GIL is
        released during the run.
        """
        return _run(self, args, named)

    def session(self, carried: Mapping[str, str]) -> Session:
        """Runs that carry state; `carried` names inputs, each with the output that is its value in the next run."""
        expect("carried", carried, Mapping, "a dict of outputs by input")
        listed("carried", [name for pair in carried.items() for name in pair])
        return Session(self._native.session(list(carried.items())))

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, facts)) for facts in (self.inputs, self.outputs))
        return f"TractModel({self._source}: ({inputs}) -> ({outputs}), {self.weight_bytes} bytes of weights)"

    def __reduce__(self) -> NoReturn:
        raise T2NErrorMisuse("a TractModel cannot be pickled or copied; load the archive where it is needed")


class Session:
    """Runs of a `TractModel` in which some inputs have the value that an output had in the run before.

    Made by `TractModel.session`. What is carried stays in tract and is not copied between runs. It begins as zeros, symbols of
    its shapes being 0: caches of a language model are empty. Several sessions may share a model; each is for one thread
    at a time, calls from a second one meanwhile raise `T2NErrorMisuse`.
    """

    def __init__(self, native: _native.Session) -> None:
        self._native = native
        self.inputs: tuple[Fact, ...] = tuple(map(_fact, native.inputs))
        """Those not carried, in the order `run` takes them."""
        self.outputs: tuple[Fact, ...] = tuple(map(_fact, native.outputs))
        """Those not carried."""

    def run(self, *args: NDArray[Any] | torch.Tensor, **named: NDArray[Any] | torch.Tensor) -> dict[str, NDArray[Any]]:
        """`TractModel.run` with the inputs and outputs that are not carried. After an error, what is carried is what it was."""
        return _run(self, args, named)

    def reset(self) -> None:
        """Begin anew."""
        self._native.reset()

    def state(self) -> dict[str, NDArray[Any]]:
        """A copy of what is carried, by name of the input."""
        return self._native.state()

    def load_state(self, state: Mapping[str, NDArray[Any] | torch.Tensor]) -> None:
        """Put `state`, a value for each input carried, in place of what is carried; checked as by `TractModel.run`."""
        arrays = [_as_array(name, value) for name, value in state.items()]
        self._native.load_state(list(state), arrays)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, facts)) for facts in (self.inputs, self.outputs))
        return f"Session(({inputs}) -> ({outputs}))"

    def __reduce__(self) -> NoReturn:
        raise T2NErrorMisuse("a Session cannot be pickled or copied; state() and load_state() carry what it holds")


def _run(runs: TractModel | Session, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    given = _bind(runs.inputs, args, named)
    results = runs._native.run([_as_array(fact.name, given[fact.name]) for fact in runs.inputs])
    return {fact.name: result for fact, result in zip(runs.outputs, results, strict=True)}


def _bind(facts: Sequence[Fact], args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Of each input its value, by name."""
    names = [fact.name for fact in facts]
    expected = f"the model takes {', '.join(map(str, facts)) or 'no input'}"
    if len(args) > len(names):
        raise T2NErrorInvalidArgument(f"{len(args)} inputs were given; {expected}")
    given = dict(zip(names, args, strict=False))
    if twice := given.keys() & named.keys():
        raise T2NErrorInvalidArgument(f"given both by place and by name: {', '.join(sorted(twice))}; {expected}")
    given |= named
    if unknown := given.keys() - set(names):
        raise T2NErrorInvalidArgument(f"not an input: {', '.join(sorted(unknown))}; {expected}")
    if missing := [name for name in names if name not in given]:
        raise T2NErrorInvalidArgument(f"missing: {', '.join(missing)}; {expected}")
    return given


def _names(outputs: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if outputs is None else listed("outputs", outputs)


def _thread_count(threads: int | None) -> int | None:
    # Each is started at once: a slip of the finger would take all that the machine has.
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise T2NErrorInvalidArgument(f"threads: a number from 1 to 1024, not {threads!r}")
    return threads


def _fact(native: tuple[str, str, list[int | str]]) -> Fact:
    name, dtype, shape = native
    return Fact(name, NUMPY_NAMES.get(dtype, dtype), tuple(shape))


# tract's names of types -> numpy's
NUMPY_NAMES = {np.dtype(code).kind + str(8 * np.dtype(code).itemsize): np.dtype(code).name for code in "efdbBhHiIqQ"}


def _as_array(name: str, value: object) -> NDArray[Any]:
    torch = sys.modules.get("torch")  # a tensor cannot exist without it
    if torch is not None and isinstance(value, torch.Tensor):
        if value.dtype in (torch.bfloat16, torch.complex64, torch.complex128) or value.is_quantized:
            raise T2NErrorInvalidArgument(
                f"input {name!r}: tract has no {value.dtype}; convert it first, e.g. with .float() or torch.view_as_real"
            )
        if value.layout is not torch.strided or value.is_meta:
            raise T2NErrorInvalidArgument(
                f"input {name!r}: a tensor of {value.layout} on {value.device} has no array of values; load it, or .to_dense() it"
            )
        value = value.detach().cpu().numpy()
    if not isinstance(value, (np.ndarray, np.generic)):
        kind = type(value).__name__
        raise T2NErrorInvalidArgument(f"input {name!r}: a numpy array or torch tensor is expected, not {kind}")
    # Not ascontiguousarray, which makes an array of rank 0 one of rank 1.
    return np.asarray(value, order="C")
