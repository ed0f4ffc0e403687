"""The four ways a step is used, run in torch and compared with tract: as traced, a prompt, more of a prompt, a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument, T2NErrorIoQuantity, T2NErrorTract
from torch_to_nnef.llm_tract.precision import check_finite
from torch_to_nnef.verify import Comparison, InputSet, compare
from torch_to_nnef.verify.compare import as_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from torch_to_nnef.inference_target import TractCheckTolerance
    from torch_to_nnef.llm_tract.causal import Signature
    from torch_to_nnef.tract_model import TractModel

DEFAULT_TOTAL = 32


@dataclass(frozen=True)
class Scenario:
    """One run of a step: inputs, and torch's outputs, by name. sizes: symbol -> size."""

    name: str
    sizes: dict[str, int]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    @property
    def arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Inputs and outputs as tract takes and gives them: bf16 is f32."""
        return ({k: as_array(v) for k, v in self.inputs.items()}, {k: as_array(v) for k, v in self.outputs.items()})

    @property
    def input_set(self) -> InputSet:
        """The inputs as `verify.raise_on_mismatch` takes them."""
        return InputSet(self.sizes, tuple(self.inputs.values()), traced=self.name == "export")


@torch.no_grad()
def scenarios(
    step: nn.Module, signature: Signature, sample: Sequence[torch.Tensor], ids: Sequence[int], total: int | None = None
) -> tuple[Scenario, ...]:
    """`export` (sizes as the traced `sample`), `prompt`, `prompt_with_past` and `text_generation`, with the outputs of `step` in torch.

    ids: tokens of a text. total: most of them that are used, past and new; by default `DEFAULT_TOTAL`, or the context if that is less.
    The past is always what `step` itself makes of the text before: noise is nothing that it was trained on, and in f16 its rounding is too.
    Raises `T2NErrorInvalidArgument` if the text or `total` is too short for a past and new tokens, or `total` exceeds the context, and
    `T2NErrorRuntime` where torch gives no numbers.
    """
    new = max(signature.logits or 1, 1)
    ids = _bounded(ids, total, signature.context, least=max(2 * new, 3))
    count, dtype = len(ids), sample[-1].dtype

    def run(name: str, inputs: Sequence[torch.Tensor]) -> Scenario:
        given = dict(zip(signature.input_names, inputs, strict=True))
        # Clones, because a model may write into its inputs.
        outputs = dict(zip(signature.output_names, step(*(tensor.clone() for tensor in inputs)), strict=True))
        check_finite(outputs["outputs"])
        sizes = {s: given[i].shape[axis] for i, axes in signature.dynamic_axes.items() for axis, s in axes.items()}
        return Scenario(name, sizes, given, outputs)

    def going_on(name: str, past: int, following: Sequence[int]) -> Scenario:
        # Attention is causal: the caches of a beginning are the beginning of the caches.
        caches = [prompt.outputs[output][:, :, :past].contiguous() for output in signature.carried.values()]
        return run(name, [*_tokens(following, signature), *caches])

    prompt = run("prompt", [*_tokens(ids, signature), *signature.past(0, dtype)])
    length, past = sample[0].shape[1], sample[-1].shape[2]
    traced = going_on("export", past, [ids[at % count] for at in range(past, past + length)])
    more = going_on("prompt_with_past", count // 2, ids[count // 2 :])
    return traced, prompt, more, going_on("text_generation", count - new, ids[count - new :])


def verify_scenarios(
    archive: TractModel,
    runs: Sequence[Scenario],
    tolerance: TractCheckTolerance,
    slack: Callable[[InputSet], Mapping[str, float]] | None = None,
) -> tuple[Comparison, ...]:
    """Run each scenario in tract: one `Comparison` each, in order, named by it.

    slack: by output, what rounding to 8 bits adds to the tolerance.

    Raises `T2NErrorTract` when tract fails, `T2NErrorIoQuantity` when the archive lacks an output.
    """
    comparisons = []
    for scenario in runs:
        inputs, _ = scenario.arrays
        try:
            actual = archive.run(**inputs)
        except T2NError as error:
            raise T2NErrorTract(f"tract failed on the archive in scenario {scenario.name}: {error}") from error
        if missing := [name for name in scenario.outputs if name not in actual]:
            raise T2NErrorIoQuantity(f"the archive has no output {missing}; it has {list(actual)}")
        more = slack(scenario.input_set) if slack else {}
        outputs = tuple(
            compare(e, actual[name], tolerance, name=name, slack=more.get(name, 0.0))
            for name, e in scenario.outputs.items()
        )
        traced = scenario.input_set.traced
        comparisons.append(Comparison("archive", scenario.sizes, traced, outputs, tolerance, name=scenario.name))
    return tuple(comparisons)


def _bounded(ids: Sequence[int], total: int | None, context: int | None, least: int) -> Sequence[int]:
    most = DEFAULT_TOTAL if total is None else total
    if context is not None and most > context:
        if total is not None:
            raise T2NErrorInvalidArgument(f"a sample of {total} tokens exceeds the {context} that the model takes")
        most = context
    if min(most, len(ids)) < least:
        raise T2NErrorInvalidArgument(
            f"{min(most, len(ids))} tokens are too few for a text with a past: {least} are needed"
        )
    return ids[:most]


def _tokens(ids: Sequence[int], signature: Signature) -> list[torch.Tensor]:
    positions = [torch.arange(max(len(ids) - 2, 0), len(ids))] if signature.logits is None else []
    return [torch.tensor([list(ids)]), *positions]
