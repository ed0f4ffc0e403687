"""`quantize_and_verify`: the whole way in one call; `sensitivity`: which weights it costs most."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torch_to_nnef._native import __version__, tract_version
from torch_to_nnef.compress import DEFAULT_COMPRESSION, Choice, Method, needs_calibration, takes
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, expect
from torch_to_nnef.export import Naming, Plan, Steps, captured_graph, check, check_types, relower, staged
from torch_to_nnef.files import as_path
from torch_to_nnef.graph.capture import Captured, eval_mode
from torch_to_nnef.graph.convert import to_graph
from torch_to_nnef.graph.folds import find_folds
from torch_to_nnef.graph.inputs import Args, DynamicAxes, Inputs, prepare
from torch_to_nnef.graph.ir import Graph
from torch_to_nnef.graph.norms import find_norms
from torch_to_nnef.graph.quantized import float_reference
from torch_to_nnef.graph.torchscript import eager
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.nnef.writer import check_replaceable, target_path, write_archive
from torch_to_nnef.quantize.apply import Progress, row_of
from torch_to_nnef.quantize.budget import Budget, costs_of
from torch_to_nnef.quantize.calibration import Batch, Calibration, as_batch, as_calibration
from torch_to_nnef.quantize.costs import TensorCost
from torch_to_nnef.quantize.judge import Measure
from torch_to_nnef.quantize.rows import TensorRow, recording
from torch_to_nnef.quantize.targets import Filter, Filters, Selection, Target, Use
from torch_to_nnef.report import Report, Totals
from torch_to_nnef.tensor.quant import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater
from torch_to_nnef.tract_model import TractModel
from torch_to_nnef.turns import one_at_a_time
from torch_to_nnef.verify import Comparison, compare_models
from torch_to_nnef.verify.compare import as_array
from torch_to_nnef.verify.metrics import Form, Metrics, fitting, kind_of, measure


@one_at_a_time
def quantize_and_verify(
    model: nn.Module,
    args: Args,
    path: str | Path,
    method: str | Method | None = "q40",
    registry: Mapping[str, Method] = DEFAULT_COMPRESSION,
    *,
    calibration: Calibration | Iterable[Any] | Path | None = None,
    tokenizer: Any = None,
    calibration_cache: str | Path | None = None,
    include: Filters | None = None,
    exclude: Filters | None = None,
    overrides: Mapping[Filter, str] | None = None,
    fallback: Literal["f16", "pad", "error"] | None = None,
    target_bpw: float | None = None,
    max_kl: float | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: DynamicAxes | None = None,
    inference_target: TractNNEF | None = None,
    inplace: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize `model`, export it to `path`, run the archive in tract, and say what each step cost.

    args: sample inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    path: `x.nnef.tgz`, `x.nnef.tar`, or `x.nnef` (a folder).
    method: a key of `registry`, a callable with the registry's signature, or None to export and verify only.
    calibration: for methods that learn from data: batches of inputs, a `DataLoader`, the path of an `.npz` file, or texts with a
    `tokenizer` of transformers (see `as_calibration`). A method of yours gets it as it is given.
    calibration_cache: a file that keeps what was learned of the float model, for methods that take one; if it is there, it is read, and no
    calibration is needed.
    include, exclude: fqn globs, regexes or `(module, fqn) -> bool`; overrides: filter -> another key of `registry`,
        or `f16` or `f32`; the first that matches counts. fallback: what becomes of weights whose rows Q40 cannot hold (None: as they are;
        `pad`: zeros behind them, where what reads them allows it).
    target_bpw: most bits a weight on average, over those that are packed otherwise; max_kl: most KL(float || quantized) of the outputs, as
        logits or probabilities along their last axis. What costs most for its bytes stays in f16; measured on held-out calibration data,
        or on `args`.
    dynamic_axes: `{"input": {0: "B"}}`; added to those of `inference_target`.
    inplace: quantize `model` itself instead of a copy that shares the weights left in float.
    force: replace what is at `path`.
    progress: called as `(done, total, fqn)` while weights are quantized.

    Raises what `export_model_to_nnef` raises, `T2NErrorInvalidArgument` for a method that does not exist or a path that does, and
    `T2NErrorImpossibleQuantization`. On any error nothing is written, and `model` is as it was.
    """
    check_types(model, progress)
    target = _target(inference_target, dynamic_axes)
    destination, form = target_path(path, None if str(path).endswith(".nnef") else 0)
    if destination.exists() and not force:
        raise T2NErrorInvalidArgument(f"{destination} exists; pass force=True to replace it")
    check_replaceable(destination, form)
    choice = Choice(method, registry, overrides or {}, fallback, Budget(target_bpw, max_kl))
    cache = _cache(calibration_cache, choice)
    if calibration is None and not (cache and cache.exists()) and any(map(needs_calibration, choice.methods)):
        as_calibration(None)  # raises
    original, model = model, float_reference(eager(model))
    if inplace and model is not original:
        raise T2NErrorInvalidArgument(
            "a ScriptModule, or a model converted by torch.ao, cannot hold our weights: leave out inplace=True"
        )
    steps = Steps()
    with steps("capture"):
        as_inputs = functools.partial(prepare, args=args, input_names=input_names, dynamic_axes=target.dynamic_axes)
        captured, graph = captured_graph(model, as_inputs(model))
    with steps("lower"):
        naming = Naming(input_names, output_names)
        plan = relower(captured, graph, type(model).__name__, target, naming)
    ours = registry is DEFAULT_COMPRESSION and not callable(method)
    copied = copy_model(model, share_weights=ours)
    work, reference = (model, copied) if inplace else (copied, model)
    modules = list(work.named_modules())
    with recording() as recorded, _restored_on_error(work), staged(destination) as beside:
        with steps("quantize"):
            selection = Selection(weight_uses(graph), include, exclude, find_folds(graph), find_norms(graph))
            data = as_calibration(calibration, tokenizer, work) if ours and calibration is not None else calibration
            extras = {
                "calibration": data,
                "calibration_cache": cache,
                "tokenizer": tokenizer,
                "progress": progress,
            }
            judged_on = data.judge if isinstance(data, Calibration) else (as_batch(args, work),)
            work = choice(work, selection, judged_on, **extras)
        if list(work.named_modules()) != modules:
            with steps("capture"):
                captured, graph = _captured_again(work, model if inplace else work, as_inputs, graph, _name(method))
        with steps("lower"):
            captured = captured.rebind(work)
            graph = to_graph(captured)
            plan = relower(captured, graph, type(model).__name__, target, naming)
        with steps("write"):
            size = write_archive(plan.document, beside, form, None)
        with steps("verify"):
            # Unless its weights change, what was given is what the archive must equal.
            judge = original if method is None and not overrides else work
            archive = check(plan, beside, judge, target.check_io_tolerance) if target.check_io else ()
        with steps("compare with float"):
            sides = reference if inplace else original, work
            quantization = _cost(plan, *sides, target) if choice.methods else ()
            metrics = _metrics(plan, *sides, data, beside if archive else None) if choice.methods else None
    rows = _rows(recorded, reference, work, _name(method))
    return Report(
        model=type(model).__name__,
        method=_name(method),
        archive_path=destination,
        archive_bytes=size,
        rows=rows,
        totals=_totals(rows, work),
        quantization=quantization,
        archive=archive,
        metrics=metrics,
        arithmetic=plan.arithmetic(),
        steps=steps.taken(),
        versions={"torch": torch.__version__, "tract": tract_version, "torch_to_nnef": __version__},
    )


@one_at_a_time
def sensitivity(
    model: nn.Module,
    calibration: Calibration | Iterable[Any] | Path,
    method: str | Method = "q40",
    registry: Mapping[str, Method] = DEFAULT_COMPRESSION,
    *,
    tokenizer: Any = None,
    include: Filters | None = None,
    exclude: Filters | None = None,
    measure: Measure | None = None,
    uses: Mapping[str, frozenset[Use]] | None = None,
    progress: Progress | None = None,
) -> tuple[Measure, list[TensorCost]]:
    """What each weight costs alone that `method` packs: the measure, and a `TensorCost` a weight, the worst first.

    `model` is as it was afterwards. It runs once for each weight on the held-out part of `calibration` (see `as_calibration`; of one batch
    with one sample, on that).

    measure: `kl` of logits or probabilities along the last axis of the first output, mean in nats; `error`, |a - b|^2 / |a|^2 of all
        outputs; None: `kl` where the model returns `.logits` or probabilities.
    uses: how a graph reads weights (`graph.uses.weight_uses`); None: `model` is captured on the first batch.
    Other arguments as those of `quantize_and_verify`.

    Raises what methods and capture raise, and `T2NErrorInvalidArgument` for a method that changes other weights too, as those do that
    scale inputs or learn norms.
    """
    check_types(model, progress)
    data = as_calibration(calibration, tokenizer, model)
    choice, copied = Choice(method, registry), copy_model(model, share_weights=registry is DEFAULT_COMPRESSION)
    if uses is None:
        uses = _uses(copied, data.judge[0])
    selection = Selection(uses, include, exclude)
    given = data if registry is DEFAULT_COMPRESSION else calibration

    def apply(kept: frozenset[str]) -> nn.Module:
        return choice(copied, selection, calibration=given, tokenizer=tokenizer, progress=progress)

    return costs_of(copied, apply, data.judge, measure, progress)


def _uses(model: nn.Module, batch: Batch) -> dict[str, frozenset[Use]]:
    """How the graph of `model` on a batch reads its weights; arguments that are no tensors are part of the graph."""
    named = inspect.signature(model.forward).bind(*batch.args, **batch.kwargs).arguments if batch.kwargs else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    fixed = {name: value for name, value in named.items() if name not in tensors}
    forward = vars(model).get("forward")
    model.forward = functools.partial(model.forward, **fixed)
    try:
        _, graph = captured_graph(model, prepare(model, tensors or batch.args, None, {}))
    finally:
        del model.forward
        if forward is not None:
            model.forward = forward
    return weight_uses(graph)


def copy_model(model: nn.Module, share_weights: bool) -> nn.Module:
    """A copy whose modules are its own; its parameters and buffers too, unless shared (a method of ours replaces, never writes)."""
    tensors = [*model.parameters(), *model.buffers()] if share_weights else []
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _captured_again(
    work: nn.Module, wanted: nn.Module, as_inputs: Callable[[nn.Module], Inputs], before: Graph, method: str | None
) -> tuple[Captured, Graph]:
    """What a method made of the modules; it must be `wanted`, with outputs that compare to those of the model it was given."""
    if work is not wanted:
        raise T2NErrorInvalidArgument(f"{method} returns another model: leave out inplace=True")
    work = float_reference(eager(work))
    captured, graph = captured_graph(work, as_inputs(work))
    old, new = ([list(map(str, value.shape)) for value in outputs] for outputs in (before.outputs, graph.outputs))
    if old != new:
        raise T2NErrorInvalidArgument(f"{method} made a model with other outputs: of shapes {new}, where {old} were")
    return captured, graph


def _target(target: TractNNEF | None, dynamic_axes: DynamicAxes | None) -> TractNNEF:
    target = target or TractNNEF.latest()
    expect("inference_target", target, TractNNEF, "a TractNNEF")
    given, more = target.dynamic_axes or {}, TractNNEF.latest(dynamic_axes=dynamic_axes).dynamic_axes or {}
    return replace(
        target, dynamic_axes={name: {**given.get(name, {}), **more.get(name, {})} for name in {**given, **more}}
    )


def _cache(given: str | Path | None, choice: Choice) -> Path | None:
    """Where the methods keep what they learned."""
    if given is None:
        return None
    if not any(takes(method, "calibration_cache") for method in choice.methods):
        raise T2NErrorInvalidArgument(f"{_name(choice.method)} takes no calibration_cache")
    return as_path("calibration_cache", given)


def _name(method: str | Method | None) -> str | None:
    return method if method is None or isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put back every parameter, buffer and module if the block fails."""
    holders: list[dict[str, Any]] = [h for m in model.modules() for h in (m._parameters, m._buffers, m._modules)]
    held = [(holder, dict(holder)) for holder in holders]
    try:
        yield
    except BaseException:
        for holder, before in held:
            holder.clear()
            holder.update(before)
        raise


def _cost(plan: Plan, reference: nn.Module, quantized: nn.Module, target: TractNNEF) -> tuple[Comparison, ...]:
    with eval_mode(reference), eval_mode(quantized):
        sides = plan.runner(reference), plan.runner(quantized)
        return compare_models(*sides, plan.input_sets(), plan.document.outputs, target.check_io_tolerance)


def _metrics(plan: Plan, reference: nn.Module, quantized: nn.Module, data: Any, archive: Path | None) -> Metrics:
    """On batches held out of the calibration, where the graph takes them, else on the sample inputs."""
    held_out = data.held_out if isinstance(data, Calibration) else ()
    batches = [tensors for batch in held_out if (tensors := fitting(plan.inputs, batch)) is not None]
    described = f"{len(batches)} held-out batches" if batches else "the sample inputs"
    forms = {"float torch": _form(plan, reference), "quantized torch": _form(plan, quantized)}
    if archive is not None:
        tract, first = TractModel.load(archive), plan.document.outputs[0]
        forms["archive in tract"] = lambda tensors: torch.from_numpy(tract.run(*map(as_array, tensors))[first])
    with eval_mode(reference), eval_mode(quantized), torch.no_grad():
        kind, axis = kind_of(plan.graph, weight_uses(plan.graph))
        return measure(kind, batches or [plan.inputs.tensors], described, forms, axis)


def _form(plan: Plan, model: nn.Module) -> Form:
    run = plan.runner(model)
    return lambda tensors: torch.from_numpy(
        as_array(run(list(tensors))[0])
    )  # complex values as pairs, as tract has them


def _rows(
    recorded: Sequence[TensorRow], before: nn.Module, after: nn.Module, method: str | None
) -> tuple[TensorRow, ...]:
    """One row a weight: what methods recorded (the last word counts), and packed weights that a foreign method did not record."""
    rows = {row.fqn: row for row in recorded}
    places, held = ModTensorUpdater(after), dict(before.named_parameters(remove_duplicate=False))
    for name, tensor in after.named_parameters():
        if isinstance(tensor, QTensor) and name not in rows:
            given = held.get(name, tensor)
            # Of one that was packed before, what it cost is not known.
            packed = None if given is tensor else tensor
            rows[name] = row_of(Target(given, places.places(tensor), None), packed, method or "")
    return tuple(rows.values())


def _totals(rows: Sequence[TensorRow], model: nn.Module) -> Totals:
    seen = {row.fqn for row in rows}
    rest = [tensor for name, tensor in model.named_parameters() if name not in seen]
    return Totals.of(rows, sum(t.numel() for t in rest), sum(t.numel() * t.element_size() for t in rest))
