"""`export_model_to_nnef`: capture, lower, lint, write beside, verify in tract, and only then put in place."""

from __future__ import annotations

import getpass
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from torch_to_nnef import files
from torch_to_nnef.exceptions import T2NError, T2NErrorInvalidArgument, T2NErrorIoQuantity, expect, listed
from torch_to_nnef.graph.axes import asserted
from torch_to_nnef.graph.capture import Captured, capture, decompose, eval_mode
from torch_to_nnef.graph.convert import name_symbols, to_graph
from torch_to_nnef.graph.experts import warn_of_dense_experts
from torch_to_nnef.graph.inputs import Args, Inputs, check_names, prepare
from torch_to_nnef.graph.ir import Graph
from torch_to_nnef.graph.macs import Arithmetic, arithmetic
from torch_to_nnef.graph.quantized import float_reference
from torch_to_nnef.graph.rounding import rounds, slack, steps
from torch_to_nnef.graph.torchscript import eager
from torch_to_nnef.inference_target import TractCheckTolerance, TractNNEF
from torch_to_nnef.log import LOGGER, at_level
from torch_to_nnef.nnef.document import Document
from torch_to_nnef.nnef.linter import lint
from torch_to_nnef.nnef.lower import Lowered, lower, missing_ops
from torch_to_nnef.nnef.names import VariableNamingScheme
from torch_to_nnef.nnef.writer import check_replaceable, target_path, write_archive
from torch_to_nnef.op import half
from torch_to_nnef.op.extensions import load_modules
from torch_to_nnef.op.registry import table
from torch_to_nnef.tensor.offload import scratch_in
from torch_to_nnef.torch_internals import OpOverload, pytree
from torch_to_nnef.turns import one_at_a_time
from torch_to_nnef.verify import (
    Candidate,
    Comparison,
    InputSet,
    first_divergence,
    raise_on_mismatch,
    resized_input_sets,
    verify_archive,
)
from torch_to_nnef.verify.bundle import write_bundle


@one_at_a_time
def export_model_to_nnef(
    model: nn.Module,
    args: Args,
    file_path_export: str | Path,
    inference_target: TractNNEF,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    compression_level: int | None = 0,
    log_level: int = logging.INFO,
    nnef_variable_naming_scheme: VariableNamingScheme | str = VariableNamingScheme.NATURAL_VERBOSE,
    check_io_names_qte_match: bool = True,
    debug_bundle_path: str | Path | None = None,
    custom_extensions: Sequence[str] | None = None,
    allow_same_io_names: bool = False,
    load_extra_op_modules: Sequence[str] | None = None,
) -> Path:
    """Export `model` as it computes on `args` in eval mode, check the archive in tract, and return its path.

    args: a tensor, a tuple of positional arguments, or a dict of keyword arguments; tensors or pytrees of them.
    file_path_export: `x.nnef` with compression_level None makes a folder, 0 `x.nnef.tar`, 1..9 `x.nnef.tgz`; full suffixes as named.
    input_names, output_names: one a tensor; default: forward's parameters, and `output` or `output_0`, `output_1`...
    check_io_names_qte_match: False lets names be too few (defaults follow) or too many (the rest is ignored).
    debug_bundle_path: a folder to write when the check fails: archive, inputs, both outputs, the error.
    custom_extensions: lines behind `extension`, e.g. `"tract_assert S <= 512"`.
    allow_same_io_names: an input that the model returns as it is may keep its name as an output.
    load_extra_op_modules: modules to import first; they register handlers of their own with `torch_to_nnef.op.lowers`.

    Raises: `T2NErrorInvalidArgument`, `T2NErrorIoQuantity`, `T2NErrorDynamicShapeValue` for arguments that do not fit;
    `T2NErrorNotImplemented` (`T2NErrorMissingOpEmitter` lists all ops without handler) for a model that cannot be said in NNEF;
    `T2NErrorConsistency` for a packed weight in a use tract computes wrongly; `T2NErrorTract` if tract refuses the archive;
    `T2NErrorIOPytorchTractNotISO` if its outputs are not torch's. The model is left as it came, and a file at the path untouched.
    """
    check_types(model)
    expect("inference_target", inference_target, TractNNEF, "a TractNNEF")
    expect("log_level", log_level, int, "a level such as logging.INFO")
    path, form = target_path(file_path_export, compression_level)
    check_replaceable(path, form)
    extensions = listed("custom_extensions", custom_extensions or ())
    load_modules(load_extra_op_modules or ())
    naming = Naming(
        input_names, output_names, check_io_names_qte_match, allow_same_io_names, _scheme(nnef_variable_naming_scheme)
    )
    steps = Steps()
    with at_level(log_level):
        plan = plan_export(model, args, inference_target, naming, extensions, steps)
        with staged(path) as beside:
            with steps("write"):
                size = write_archive(plan.document, beside, form, compression_level)
            if inference_target.check_io:
                with steps("verify"):
                    check(plan, beside, model, inference_target.check_io_tolerance, debug_bundle_path)
        LOGGER.info("wrote %s (%d bytes): %s", path, size, steps)
    return path


def check_types(model: object, progress: object = None) -> None:
    """Raise `T2NErrorInvalidArgument` unless these are a module, and a function or nothing."""
    expect("model", model, nn.Module, "a torch.nn.Module")
    expect("progress", progress, (Callable, type(None)), "a function")  # type: ignore[arg-type]


class Steps:
    """Wall-clock seconds of each step, in the order they began; a step that is taken twice adds up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block as (part of) step `name`."""
        before, start = self._seconds.setdefault(name, 0.0), time.perf_counter()
        yield
        self._seconds[name] = before + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._seconds.items())

    def taken(self) -> tuple[tuple[str, float], ...]:
        """(step, seconds)."""
        return tuple(self._seconds.items())


@dataclass(frozen=True, slots=True)
class Naming:
    """What the user says of names."""

    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    counts_must_match: bool = True
    may_overlap: bool = False
    scheme: VariableNamingScheme = VariableNamingScheme.NATURAL_VERBOSE


@dataclass(frozen=True, slots=True)
class Plan:
    """A model captured and lowered: all that writing and checking need.

    advice: what may help if the check fails; empty if nothing is known.
    """

    captured: Captured
    graph: Graph
    lowered: Lowered
    document: Document
    advice: str = ""

    @property
    def inputs(self) -> Inputs:
        """The user's sample inputs."""
        return self.captured.inputs

    def input_sets(self) -> tuple[InputSet, ...]:
        """The samples, and the same at other sizes of every symbol, as far as `tract_assert` allows them."""
        assumed = name_symbols(self.captured).assumed()
        return resized_input_sets(self.inputs.tensors, self.inputs.axes, asserted(self.document.extensions), assumed)

    def slack(self, inputs: InputSet) -> tuple[float, ...]:
        """For each output, how far rounding to 8 bits on the way may move it; see `graph.rounding`."""
        if not rounds(self.graph) or inputs.outside:  # of what the capture assumed: it may not run there
            return steps(self.graph)
        return slack(self.captured, self.graph, inputs.tensors)

    def arithmetic(self) -> Arithmetic | None:
        """Which products run on 8-bit codes; None if nothing is rounded to any."""
        return arithmetic(self.graph, self.inputs.sizes()) if rounds(self.graph) else None

    def runner(self, model: nn.Module) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
        """`model` as a function of flat tensors, in eval mode."""

        def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            args, kwargs = self.inputs.unflatten(tensors)
            outputs = pytree.tree_leaves(model(*args, **kwargs))
            return [output for output in outputs if output is not None]

        return run


def plan_export(
    model: nn.Module, args: Args, target: TractNNEF, naming: Naming, extensions: Sequence[str], steps: Steps
) -> Plan:
    """Everything before the first byte is written."""
    with steps("capture"):
        model = float_reference(eager(model))
        inputs = prepare(model, args, naming.inputs, target.dynamic_axes, naming.counts_must_match)
        captured, graph = captured_graph(model, inputs)
    with steps("lower"):
        return relower(captured, graph, type(model).__name__, target, naming, extensions)


def captured_graph(model: nn.Module, inputs: Inputs) -> tuple[Captured, Graph]:
    """Capture, and spell out what has no handler as long as torch knows how."""
    whole = {cls: handler.uses for cls, handler in table().modules.items()}
    captured = capture(model, inputs, whole)
    if captured.writes_in_place():
        captured = decompose(captured, ())
    graph = to_graph(captured)
    tried: set[OpOverload] = set()
    while new := [op for op in missing_ops(graph) if op not in tried]:
        tried.update(new)
        captured = decompose(captured, new)
        graph = to_graph(captured)
    warn_of_dense_experts(graph)
    return captured, graph


def relower(
    captured: Captured, graph: Graph, name: str, target: TractNNEF, naming: Naming, extensions: Sequence[str] = ()
) -> Plan:
    """Graph to document, linted; with weights as `graph.tensors` holds them now."""
    outputs = _output_names(naming, len(graph.outputs))
    overlap = sorted(set(outputs) & set(graph.input_names))
    if overlap and not naming.may_overlap:
        raise T2NErrorInvalidArgument(f"names of inputs and outputs overlap: {overlap}")
    lowered = lower(graph, name, outputs, naming.scheme, half.forced(target), bool(target.reify_sdpa_operator))
    limits = (f"tract_assert {limit.assertion()}" for limit in captured.limits)
    lines = tuple(dict.fromkeys((*extensions, *limits)))
    document = replace(lowered.document, extensions=lines, properties=_properties(target))
    lint(document)
    return Plan(captured, graph, lowered, document, half.advice(graph.nodes, target))


def _output_names(naming: Naming, count: int) -> tuple[str, ...]:
    defaults = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    given = list(listed("output_names", naming.outputs)) if naming.outputs is not None else defaults
    if naming.counts_must_match and len(given) != count:
        raise T2NErrorIoQuantity(f"{len(given)} output names {given} for {count} output tensors")
    names = (given + defaults[len(given) :])[:count]
    check_names(names, "output")
    return tuple(names)


def _scheme(scheme: VariableNamingScheme | str) -> VariableNamingScheme:
    try:
        return VariableNamingScheme(scheme)
    except ValueError:
        known = [s.value for s in VariableNamingScheme]
        raise T2NErrorInvalidArgument(f"naming scheme {scheme!r} is not one of {known}") from None


def _properties(target: TractNNEF) -> dict[str, str]:
    properties = {"tract_target_version": target.version, **(target.specific_properties or {})}
    if target.dump_identity_properties:
        now = datetime.now(tz=timezone.utc).isoformat(timespec="seconds")
        properties |= {"exported_at": now, "exported_by": getpass.getuser(), "exported_on": platform.node()}
    return properties


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """`files.staged`; tensors that are offloaded meanwhile lie on the same file system."""
    with files.staged(path) as beside, scratch_in(path.parent):
        yield beside


def check(
    plan: Plan,
    archive: Path,
    model: nn.Module,
    tolerance: TractCheckTolerance,
    debug_bundle_path: str | Path | None = None,
) -> tuple[Comparison, ...]:
    """Run `archive` in tract at every input set and compare with `model`; raises at the first output outside `tolerance`."""
    sets = plan.input_sets()
    with eval_mode(model):
        try:
            comparisons = verify_archive(
                archive, plan.runner(model), sets, plan.document.outputs, tolerance, plan.slack
            )
            raise_on_mismatch(comparisons, sets, lambda inputs: locate(plan, archive, inputs, tolerance), plan.advice)
        except T2NError as error:
            if debug_bundle_path is not None:
                write_bundle(Path(debug_bundle_path), archive, plan.graph.input_names, sets, plan.runner(model), error)
            raise
    return comparisons


def locate(plan: Plan, archive: Path, inputs: InputSet, tolerance: TractCheckTolerance) -> str:
    """Where tract first differs from torch, in words."""
    nodes = [node for node in plan.graph.nodes if node.name in plan.lowered.identifiers]
    if rounds(plan.graph):  # what is computed of codes differs where a code does
        nodes = [node for node in nodes if node.outputs and node.outputs[0].dtype is torch.int8]
    candidates = [Candidate(plan.lowered.identifiers[node.name], node.module_path, node.name) for node in nodes]
    found = first_divergence(
        archive, candidates, lambda names: plan.captured.values(names, inputs.tensors), inputs.tensors, tolerance
    )
    return str(found) if found else "every value in between that could be compared agrees"
