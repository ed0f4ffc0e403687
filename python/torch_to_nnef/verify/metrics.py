"""What quantization costs a model in the terms of its kind: divergence of distributions, or angle and error of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from torch_to_nnef.quantize.targets import Use
from torch_to_nnef.torch_internals import pytree

if TYPE_CHECKING:
    from torch_to_nnef.graph.inputs import Inputs
    from torch_to_nnef.graph.ir import Graph
    from torch_to_nnef.quantize.calibration import Batch

Kind = Literal["logits", "probabilities", "log-probabilities", "chances", "choices", "values"]
Form = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""A form of the model: flat inputs to its first output."""
aten = torch.ops.aten
_TINY = torch.finfo(torch.float32).tiny
_BY_LAST_CALL: Mapping[Any, Kind] = {
    aten.softmax.int: "probabilities",
    aten._softmax.default: "probabilities",
    aten.log_softmax.int: "log-probabilities",
    aten._log_softmax.default: "log-probabilities",
    aten.sigmoid.default: "chances",
}
TITLES: Mapping[Kind, str] = {
    "logits": "next tokens",
    "probabilities": "probabilities",
    "log-probabilities": "probabilities",
    "chances": "chances, each of yes or no",
    "choices": "choices",
    "values": "values",
}


def kind_of(graph: Graph, uses: Mapping[str, frozenset[Use]]) -> tuple[Kind, int]:
    """What the first output is, by the call that makes it, and the axis of its classes.

    Logits if tokens come in and there are as many classes as embeddings; choices if it is integers or booleans.
    """
    output = graph.outputs[0]
    if not (output.dtype.is_floating_point or output.dtype.is_complex):
        return "choices", -1
    maker = next((node for node in graph.nodes if any(value.name == output.name for value in node.outputs)), None)
    if maker is not None and maker.target in _BY_LAST_CALL:
        given = dict(zip((argument.name for argument in maker.target._schema.arguments), maker.args, strict=False))
        return _BY_LAST_CALL[maker.target], {**given, **maker.kwargs}.get("dim", -1)
    tables = {graph.tensors[fqn].shape[0] for fqn, use in uses.items() if Use.EMBEDDING in use}
    takes_tokens = any(not value.dtype.is_floating_point for value in graph.inputs)
    return "logits" if takes_tokens and output.shape and output.shape[-1] in tables else "values", -1


@dataclass(frozen=True)
class MetricRow:
    """Of one form of the model, means over all inputs, against the float model.

    kl: KL(float || this) in nats, of each distribution or each chance. top1_same: share with the same likeliest class; of
    choices, share that are equal. perplexity: of the next token. cosine: of the vectors along the last axis. relative_error: |a - b|^2 /
    |a|^2 of all values.
    None where the kind of the output has no such thing.
    """

    name: str
    kl: float | None = None
    top1_same: float | None = None
    perplexity: float | None = None
    cosine: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class Metrics:
    """kind: of the first output, which is measured. inputs: what it was measured on. rows: float torch first."""

    kind: Kind
    inputs: str
    rows: tuple[MetricRow, ...]

    def table(self) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """Title, header and cells; columns without a number are left out."""
        columns = {
            "KL to float": [_text(row.kl, ".2g") for row in self.rows],
            "top-1 same": [_text(row.top1_same, ".1%") for row in self.rows],
            "perplexity": [_text(row.perplexity, ".2f") for row in self.rows],
            "cosine": [_text(row.cosine, ".6f") for row in self.rows],
            "relative error": [_text(row.relative_error, ".2g") for row in self.rows],
        }
        kept = {"model": [row.name for row in self.rows]} | {
            name: cells for name, cells in columns.items() if any(cells)
        }
        title = f"What it costs the model: {TITLES[self.kind]}, on {self.inputs}"
        return title, tuple(kept), tuple(zip(*kept.values(), strict=True))


def measure(
    kind: Kind, inputs: Sequence[Sequence[torch.Tensor]], described: str, forms: Mapping[str, Form], axis: int = -1
) -> Metrics:
    """The first of `forms` is the float model, which the others are measured against; each runs once on each of `inputs`.

    axis: of the classes. Outputs are real; a scalar counts as a vector of one.
    """
    (reference, exact), *others = forms.items()
    sums = {name: _Sums() for name in forms}
    for tensors in inputs:
        wanted = _classes_last(exact(tensors), axis)
        tokens = next((t for t in tensors if not t.is_floating_point() and t.shape == wanted.shape[:-1]), None)
        sums[reference].add_perplexity(kind, wanted, tokens)
        for name, form in others:
            found = _classes_last(form(tensors), axis)
            sums[name].add_perplexity(kind, found, tokens)
            sums[name].add(kind, wanted, found)
    return Metrics(kind, described, tuple(total.row(name) for name, total in sums.items()))


def fitting(inputs: Inputs, batch: Batch) -> tuple[torch.Tensor, ...] | None:
    """The tensors of `batch` as inputs of the graph; None where it is called in another way, or at sizes the graph fixed."""
    leaves, spec = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    if spec != inputs.spec or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    for leaf, sample, axes in zip(leaves, inputs.tensors, inputs.axes, strict=True):
        fixed = [axis for axis in range(sample.dim()) if axis not in axes]
        if (
            leaf.dtype != sample.dtype
            or leaf.dim() != sample.dim()
            or any(leaf.shape[i] != sample.shape[i] for i in fixed)
        ):
            return None
    return tuple(leaves)


class _Sums:
    """Sums and counts by metric."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, kind: Kind, wanted: torch.Tensor, found: torch.Tensor) -> None:
        if kind == "choices":
            self._count("top1_same", float((wanted == found).sum()), wanted.numel())
            return
        if kind == "values":
            self._count("relative_error", float((found - wanted).square().sum()), float(wanted.square().sum()))
            if wanted.shape[-1] > 1:
                angles = functional.cosine_similarity(wanted, found, dim=-1)
                self._count("cosine", float(angles.sum()), angles.numel())
            return
        divergences = _DIVERGENCES[kind](wanted, found)
        self._count("kl", float(divergences.sum()), divergences.numel())
        if wanted.shape[-1] > 1 and (kind != "chances" or wanted.dim() <= 2):  # the last axis of a map is no classes
            same = wanted.argmax(-1) == found.argmax(-1)
            self._count("top1_same", float(same.sum()), same.numel())

    def add_perplexity(self, kind: Kind, logits: torch.Tensor, tokens: torch.Tensor | None) -> None:
        if kind == "logits" and tokens is not None and tokens.shape[-1] > 1:
            scores = logits[..., :-1, :].log_softmax(-1).gather(-1, tokens[..., 1:, None].long())
            self._count("perplexity", -float(scores.sum()), scores.numel())

    def _count(self, metric: str, total: float, count: float) -> None:
        before = self._sums.get(metric, (0.0, 0.0))
        self._sums[metric] = before[0] + total, before[1] + count

    def row(self, name: str) -> MetricRow:
        means = {metric: total / count for metric, (total, count) in self._sums.items() if count}
        if "perplexity" in means:
            means["perplexity"] = float(torch.tensor(means["perplexity"], dtype=torch.float64).exp())
        return MetricRow(name, **means)


def _classes_last(output: torch.Tensor, axis: int) -> torch.Tensor:
    return (output if output.dim() else output[None]).double().movedim(axis, -1)


def _of_log(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    gaps = torch.where(wanted.exp() > 0, wanted.exp() * (wanted - found), 0)
    return gaps.sum(-1).clamp_min(0)  # below 0 by rounding only


def _of_chances(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    found = found.clamp(1e-12, 1 - 1e-12)  # a chance of 0 or 1 is a rounded one
    yes, no = torch.xlogy(wanted, wanted / found), torch.xlogy(1 - wanted, (1 - wanted) / (1 - found))
    return (yes + no).clamp_min(0)


_DIVERGENCES: Mapping[Kind, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "logits": lambda wanted, found: _of_log(wanted.log_softmax(-1), found.log_softmax(-1)),
    # a probability of 0 is a rounded one
    "probabilities": lambda wanted, found: _of_log(wanted.log(), found.clamp_min(_TINY).log()),
    "log-probabilities": _of_log,
    "chances": _of_chances,
}


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
