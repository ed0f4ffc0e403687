"""Run an archive and the torch model on the same inputs, and say whether they agree."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorDynamicShapeValue,
    T2NErrorIOPytorchTractNotISO,
    T2NErrorIoQuantity,
    T2NErrorRuntime,
    T2NErrorTract,
)
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tract_model import TractModel
from torch_to_nnef.verify.compare import Comparison, as_array, compare
from torch_to_nnef.verify.resize import InputSet

_MAX_LISTED = 20  # outputs in a message: a language model has one for every cache

TorchModel = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def verify_archive(
    path: str | PathLike[str],
    reference: TorchModel,
    input_sets: Sequence[InputSet],
    output_names: Sequence[str],
    tolerance: TractCheckTolerance,
    slack: Callable[[InputSet], Sequence[float]] | None = None,
) -> tuple[Comparison, ...]:
    """Load `path` once in tract and compare it with `reference` on every input set: one `Comparison` each, in order.

    slack: what may be added to the tolerance of each output (see `compare`). bf16 inputs are given to tract as f32. Raises
    `T2NErrorTract` when tract cannot load or run the archive, `T2NErrorIoQuantity` when outputs are missing, and what
    `compare_models` raises.
    """
    model = TractModel.load(path)

    def run_tract(inputs: InputSet) -> list[NDArray[Any]]:
        try:
            outputs = model.run(*map(as_array, inputs.tensors))
        except T2NError as error:
            raise T2NErrorTract(
                f"tract failed on the archive at sizes {_sizes(inputs.sizes)}: {error}{_outside(inputs)}"
            ) from error
        if missing := [name for name in output_names if name not in outputs]:
            raise T2NErrorIoQuantity(f"the archive has no output {missing}; it has {list(outputs)}")
        return [outputs[name] for name in output_names]

    return _compare_runs("archive", reference, run_tract, input_sets, output_names, tolerance, slack)


def compare_models(
    reference: TorchModel,
    model: TorchModel,
    input_sets: Sequence[InputSet],
    output_names: Sequence[str],
    tolerance: TractCheckTolerance,
) -> tuple[Comparison, ...]:
    """Compare two torch models, float then quantized, on every input set: one `Comparison` each, in order.

    Sizes at which `reference` itself raises are reported as refused. Raises `T2NErrorRuntime` when that is so at the
    traced sizes, `T2NErrorDynamicShapeValue` when it is so at all others.
    """

    def run_model(inputs: InputSet) -> list[NDArray[Any]]:
        return [as_array(output) for output in model([tensor.clone() for tensor in inputs.tensors])]

    return _compare_runs("quantization", reference, run_model, input_sets, output_names, tolerance)


def raise_on_mismatch(
    comparisons: Sequence[Comparison],
    input_sets: Sequence[InputSet],
    locate: Callable[[InputSet], str] | None = None,
    advice: str = "",
) -> None:
    """Raise `T2NErrorIOPytorchTractNotISO` that lists the outputs outside their tolerance, if there are any.

    `input_sets` are those the comparisons were made on, in order; `locate` describes where the first failing one
    diverges; its text, then `advice`, end the message.
    """
    failed = [(c, inputs) for c, inputs in zip(comparisons, input_sets, strict=True) if not c.ok]
    if not failed:
        return
    tolerance = failed[0][0].tolerance
    lines = [f"tract's outputs are not torch's within tolerance {tolerance.value!r} (reference: torch, actual: tract):"]
    outputs = [f"  {c.sizes_text}: {output}" for c, _ in failed for output in c.outputs if not output.ok]
    lines += outputs[:_MAX_LISTED]
    if len(outputs) > _MAX_LISTED:
        lines.append(f"  and {len(outputs) - _MAX_LISTED} more")
    lines[-1] += next((note for _, inputs in failed if (note := _outside(inputs))), "")
    if locate is not None:
        try:
            lines.append(locate(failed[0][1]))
        except T2NError as error:
            lines.append(f"where they diverge could not be found: {error}")
    lines += [advice] if advice else []
    raise T2NErrorIOPytorchTractNotISO("\n".join(lines))


@torch.no_grad()
def _compare_runs(
    kind: Literal["quantization", "archive"],
    reference: TorchModel,
    run: Callable[[InputSet], list[NDArray[Any]]],
    input_sets: Sequence[InputSet],
    output_names: Sequence[str],
    tolerance: TractCheckTolerance,
    slack: Callable[[InputSet], Sequence[float]] | None = None,
) -> tuple[Comparison, ...]:
    comparisons = []
    for inputs in input_sets:
        try:
            # Clones, because a model may write into its inputs.
            expected = reference([tensor.clone() for tensor in inputs.tensors])
        except Exception as error:
            if inputs.traced:
                raise T2NErrorRuntime(f"the torch model fails on its own sample inputs: {error}") from error
            refused = f"{type(error).__name__}: {error}"
            comparisons.append(Comparison(kind, inputs.sizes, inputs.traced, (), tolerance, refused=refused))
            continue
        try:
            actual = run(inputs)
        except T2NErrorTract as error:
            if not inputs.outside:
                raise
            # No wrong value: the archive refuses what the model was not traced for.
            LOGGER.warning("%s", error)
            comparisons.append(Comparison(kind, inputs.sizes, inputs.traced, (), tolerance, refused=str(error)))
            continue
        if not len(expected) == len(actual) == len(output_names):
            raise T2NErrorIoQuantity(
                f"{len(output_names)} outputs named, torch gives {len(expected)}, the other side {len(actual)}"
            )
        allowed = [0.0] * len(output_names) if slack is None else slack(inputs)
        pairs = zip(output_names, expected, actual, allowed, strict=True)
        outputs = tuple(compare(e, a, tolerance, name=name, slack=extra) for name, e, a, extra in pairs)
        comparisons.append(Comparison(kind, inputs.sizes, inputs.traced, outputs, tolerance))
    resized = [c for c in comparisons if not c.traced]
    if resized and all(c.refused is not None for c in resized):
        tried = "\n".join(f"  {c.sizes_text}: {c.refused}" for c in resized)
        raise T2NErrorDynamicShapeValue(
            f"the model runs at none of the other sizes tried for its dynamic axes:\n{tried}"
        )
    return tuple(comparisons)


def _outside(inputs: InputSet) -> str:
    """A note on sizes that the capture was not made for."""
    assumed = inputs.outside or inputs.beside
    if not assumed:
        return ""
    return (
        f"\nthe model was traced for sizes with {' and '.join(assumed)}, which {_sizes(inputs.sizes)} is not: "
        "its code reads a size as a number, or branches on one; or assert the sizes it is for (custom_extensions, tract_assert)"
    )


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in sizes.items()) or "as traced"
