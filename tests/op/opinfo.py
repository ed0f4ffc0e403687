"""torch's own samples of every operator (OpInfo), exported through the public API and run in tract against torch.

`python tests/op/opinfo.py add nn.functional.conv2d` prints what happens to each sample, with the reason.
"""

import itertools
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorNotImplemented
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractCheckTolerance, TractNNEF

DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
# torch computes f16 on a CPU in f32 and rounds once a call; tract rounds after every operator of a lowering.
TOLERANCE = {"f16": TractCheckTolerance.VERY}
PASSED, REFUSED, WRONG = ".", "r", "x"
# Some operators have thousands.
_MOST = 400
REFUSALS = (T2NErrorNotImplemented, T2NErrorDynamicShapeValue)


def ops() -> dict[str, object]:
    """Every OpInfo by name; variants of one operator are `name.variant`."""
    return {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}


@dataclass(frozen=True)
class Outcome:
    """What became of one sample: `code` is one of the constants above, `reason` the error."""

    code: str
    reason: str = ""


class Sample(nn.Module):
    """One call of an operator: tensors are inputs of the graph, all other arguments are bound."""

    def __init__(self, op, arguments, kwargs):
        super().__init__()
        leaves, self.spec = pytree.tree_flatten((arguments, kwargs))
        self.op = op
        self.bound = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        # A graph has an input, also where the operator takes no tensor.
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)) or (torch.ones(2),)
        self.slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors):
        leaves = list(self.bound)
        for slot, tensor in zip(self.slots, tensors, strict=False):
            leaves[slot] = tensor
        arguments, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(*arguments, **kwargs)


def samples(op, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples torch tests `op` with, but those of empty tensors; the same at every call."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with warnings.catch_warnings():  # torch's own, of features in beta
        warnings.simplefilter("ignore")
        found = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), _MOST))
    for sample in found:
        call = Sample(op, (sample.input, *sample.args), sample.kwargs)
        if all(tensor.numel() for tensor in call.tensors) and len(call.tensors) <= 8:
            yield call


def run(sample: Sample, axes: dict[str, dict[int, str]], tolerance: TractCheckTolerance) -> Outcome:
    """Export with the check in tract on."""
    target = TractNNEF.latest(dynamic_axes=axes, check_io_tolerance=tolerance)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            export_model_to_nnef(sample, sample.tensors, Path(folder) / "op.nnef", target, compression_level=None)
        except REFUSALS as error:
            return Outcome(REFUSED, str(error))
        except Exception as error:  # a mismatch, tract's refusal, or an error that is not ours: all are defects
            return Outcome(WRONG, f"{type(error).__name__}: {error}")
    return Outcome(PASSED)


def chosen(op, dtype: str, most: int) -> list[Sample]:
    """At most `most` of the samples, spread evenly over them; none if torch has no such dtype for the operator."""
    if DTYPES[dtype] not in op.dtypes:
        return []
    found = list(samples(op, DTYPES[dtype]))
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found


def outcome(sample: Sample, dtype: str) -> Outcome:
    """Of one sample, sizes fixed."""
    return run(sample, {}, TOLERANCE.get(dtype, TractCheckTolerance.APPROXIMATE))


def dynamic(op) -> str:
    """Which axes may be symbols, over the first samples with axes: `all` (equal sizes share one), `first`, or `none`."""
    dtype = next((dtype for dtype in (*DTYPES.values(), torch.complex64) if dtype in op.dtypes), None)
    if dtype is None:  # of GPUs only
        return "none"
    for sample in itertools.islice(samples(op, dtype), 3):
        sized = [(f"tensors_{i}", t) for i, t in enumerate(sample.tensors) if t.dim() and max(t.shape) > 1]
        if not sized:
            continue
        every = {name: {a: f"D{n}" for a, n in enumerate(t.shape) if n > 1} for name, t in sized}
        size = sized[0][1].shape[0]
        first = {name: {0: "B"} for name, t in sized if t.shape[0] == size > 1}
        for word, axes in (("all", every), ("first", first)):
            # torch itself may refuse other sizes: an index beyond the end, a shape in the arguments
            if axes and run(sample, axes, TractCheckTolerance.APPROXIMATE).code == PASSED:
                return word
    return "none"


def main(names: list[str]) -> None:
    """Print every outcome of the operators whose name starts so."""
    most = 100
    for name, op in ops().items():
        if any(name == n or (n.endswith("*") and name.startswith(n[:-1])) for n in names):
            for dtype in DTYPES:
                found = [outcome(sample, dtype) for sample in chosen(op, dtype, most)]
                print(f"{name} {dtype} {''.join(o.code for o in found)}")
                for reason, group in itertools.groupby(sorted(o.reason for o in found if o.reason)):
                    print(f"    {len(list(group))}x {reason[:600]}")
            print(f"{name} dynamic: {dynamic(op)}")


if __name__ == "__main__":
    main(sys.argv[1:])
