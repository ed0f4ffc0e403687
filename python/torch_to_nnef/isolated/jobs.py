"""What the child process is asked to do. Answers are JSON; arrays go through files in its working folder."""

from __future__ import annotations

import ast
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorTract
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.isolated.arrays import load_arrays, save_arrays
from torch_to_nnef.isolated.describe import describe
from torch_to_nnef.tract_model import Fact, TractModel

INPUTS, OUTPUTS = "inputs.npz", "outputs.npz"
_SIZE = 3  # of a symbol that has none
_LONGEST_DIM = 1000  # characters
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def verify(folder: Path, archive: Path, npz: Sequence[str], sizes: Mapping[str, int], tolerance: str) -> dict[str, Any]:
    """Load and run; arrays of `npz` are inputs and expected outputs by name, inputs that are not given are zeros."""
    model = _load(folder, archive)
    given = {name: array for path in npz for name, array in load_arrays(Path(path)).items()}
    wanted = {fact.name: given.pop(fact.name) for fact in model.outputs if fact.name in given}
    _refuse_unknown(given, model)
    symbols = {name for fact in model.inputs for dim in fact.shape for name in re.findall(r"[A-Za-z_]\w*", str(dim))}
    if unknown := sorted(sizes.keys() - symbols):
        raise T2NErrorInvalidArgument(
            f"no input has a size {', '.join(unknown)}; there are {sorted(symbols) or 'none'}"
        )
    _stage(folder, "running it")
    inputs = {fact.name: given[fact.name] if fact.name in given else _zeros(fact, sizes) for fact in model.inputs}
    began = time.perf_counter()
    try:
        outputs = model.run(**inputs)
    except T2NErrorTract as error:
        if zeros := [name for name in inputs if name not in given]:
            raise T2NErrorTract(f"{error}; {', '.join(zeros)} were zeros (--npz gives others)") from error
        raise
    took = time.perf_counter() - began
    compared = {n: _compare(array, outputs[n], TractCheckTolerance(tolerance)) for n, array in wanted.items()}
    return {
        "ok": all(found["ok"] for found in compared.values()),
        "archive": str(archive),
        "inputs": [_shown(name, array) for name, array in inputs.items()],
        "outputs": [
            _shown(name, array) | {"non_finite": _non_finite(array), "expected": compared.get(name)}
            for name, array in outputs.items()
        ],
        "given": sorted(given),
        "weight_bytes": model.weight_bytes,
        "seconds": took,
        "tolerance": tolerance,
    }


def run(folder: Path, archive: Path, npz: str | None) -> None:
    """Run on the arrays of `npz`, or of `INPUTS` in the folder; outputs are in `OUTPUTS` there."""
    model = _load(folder, archive)
    given = load_arrays(Path(npz) if npz is not None else folder / INPUTS)
    _refuse_unknown(given, model)
    _stage(folder, "running it")
    save_arrays(folder / OUTPUTS, model.run(**given))


def inspect(folder: Path, archive: Path) -> dict[str, Any]:
    """What is in it, by its headers and its text."""
    _stage(folder, "reading it")
    return describe(archive)


JOBS: Mapping[str, Callable[..., Any]] = {"verify": verify, "run": run, "inspect": inspect}


def _stage(folder: Path, text: str) -> None:
    (folder / "stage").write_text(text, encoding="utf-8")


def _load(folder: Path, archive: Path) -> TractModel:
    _stage(folder, "loading it")
    return TractModel.load(archive)


def _refuse_unknown(given: Mapping[str, object], model: TractModel) -> None:
    if unknown := sorted(given.keys() - {fact.name for fact in model.inputs}):
        facts = (", ".join(map(str, facts)) or "none" for facts in (model.inputs, model.outputs))
        inputs, outputs = facts
        raise T2NErrorInvalidArgument(
            f"neither input nor output: {', '.join(unknown)}; inputs: {inputs}; outputs: {outputs}"
        )


def _zeros(fact: Fact, sizes: Mapping[str, int]) -> NDArray[Any]:
    shape = [_extent(fact, dim, sizes) for dim in fact.shape]
    try:
        return np.zeros(shape, np.dtype(fact.dtype))
    except (ValueError, TypeError) as error:  # a size beyond all limits, a dtype that numpy does not know
        raise T2NErrorInvalidArgument(f"input {fact}: there are no zeros of it: {error}") from error


def _extent(fact: Fact, dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension, symbols being what `sizes` says, or `_SIZE`."""
    try:
        if isinstance(dim, int):
            return dim
        size = _value(ast.parse(dim[:_LONGEST_DIM], mode="eval").body, sizes)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError) as error:
        raise T2NErrorInvalidArgument(f"input {fact.name}: its size {str(dim)[:100]} has no value: {error}") from error
    if not 0 <= size < 1 << 48:
        raise T2NErrorInvalidArgument(f"input {fact.name}: its size {dim[:100]} would be {size}")
    return size


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes.get(name, _SIZE)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_value(left, sizes), _value(right, sizes))
        case _:
            raise ValueError("sums and products of numbers and symbols have values here")


def _shown(name: str, array: NDArray[Any]) -> dict[str, Any]:
    return {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}


def _non_finite(array: NDArray[Any]) -> int:
    return int(array.size - np.isfinite(array).sum())


def _compare(expected: NDArray[Any], actual: NDArray[Any], tolerance: TractCheckTolerance) -> dict[str, Any]:
    """Whether `actual` is within the tolerance; what is not finite must be the same."""
    if expected.shape != actual.shape or expected.dtype.kind != actual.dtype.kind:
        sides = " and ".join(f"{array.dtype}{list(array.shape)}" for array in (expected, actual))
        return {"ok": False, "outside": None, "max_abs": None, "reason": f"expected and computed: {sides}"}
    bounds = tolerance.bounds(min(expected.dtype, actual.dtype, key=lambda dtype: dtype.itemsize).name)
    want, got = (array.astype(np.float64) for array in (expected, actual))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where((want == got) | (np.isnan(want) & np.isnan(got)), 0.0, np.abs(want - got))
        beyond = ~(gap <= bounds.atol + bounds.rtol * np.abs(want)) | np.isinf(gap)
    # f64 merges neighbouring large integers.
    outside = int((beyond if expected.dtype.kind == "f" else expected != actual).sum())
    worst = float(gap.max(initial=0.0))
    ok = outside <= bounds.outliers * want.size
    return {"ok": ok, "outside": outside, "max_abs": worst if np.isfinite(worst) else None, "reason": None}
