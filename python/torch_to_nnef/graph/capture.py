"""torch.export on placeholders: the weights are neither copied nor read, and the user's model leaves as it came."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from torch_to_nnef.exceptions import T2NError, T2NErrorDynamicShapeValue, T2NErrorInvalidArgument
from torch_to_nnef.graph.conds import inline_conds
from torch_to_nnef.graph.explain import explain, keeps_state
from torch_to_nnef.graph.functional import make_functional, writes_in_place
from torch_to_nnef.graph.guards import Axis, Limit, Watch, limits
from torch_to_nnef.graph.inputs import Inputs
from torch_to_nnef.graph.opaque import ModuleCall, Uses, kept_whole
from torch_to_nnef.graph.patches import symbolic_sizes
from torch_to_nnef.graph.places import module_names
from torch_to_nnef.graph.torchscript import interpreted_functions
from torch_to_nnef.torch_internals import FakeTensorMode, OpOverload, ShapeEnv, pytree
from torch_to_nnef.turns import one_at_a_time

# torch burns sizes 0 and 1 into a graph, so a dynamic axis is traced at this size or more.
_SMALLEST_TRACED = 2


@dataclass(frozen=True, slots=True)
class Captured:
    """An exported program over fake weights, and the tensors those stand for.

    `tensors` maps every fqn (parameter, buffer, lifted constant) to the user's own tensor; tied ones are the same object.
    `limits` are the sizes it is bound to, `calls` those of modules kept whole.
    """

    program: ExportedProgram
    inputs: Inputs
    tensors: Mapping[str, torch.Tensor]
    limits: tuple[Limit, ...] = ()
    calls: Sequence[ModuleCall] = ()

    def fqns(self) -> dict[str, str]:
        """Placeholder name -> fqn of the tensor it stands for."""
        signature = self.program.graph_signature
        return {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }

    def guards(self) -> list[sympy.Basic]:
        """What torch assumed of sizes while it traced."""
        values = (node.meta.get("val") for node in self.program.graph.nodes if node.op == "placeholder")
        sizes: Iterator[Any] = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
        environment = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
        return [guard.expr for guard in environment.guards] if environment else []

    def writes_in_place(self) -> bool:
        """Whether a call still changes one of its arguments: handlers want values that stay."""
        return writes_in_place(self.program.graph_module)

    def rebind(self, model: nn.Module) -> Captured:
        """The same program over the tensors that `model`, a copy of the captured one, holds now."""
        return replace(self, tensors={**self.tensors, **_tensors(model)})

    def values(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Torch's own value of the nodes `names` for user inputs `tensors`; weights are dequantized where used."""
        recorder = _Recorder(self.program.graph_module, frozenset(names))
        with torch.no_grad():
            self.run(tensors, recorder)
        return recorder.kept

    def run(self, tensors: Sequence[torch.Tensor], interpreter: torch.fx.Interpreter) -> Any:
        """What `interpreter`, one of the program, makes of user inputs `tensors`."""
        fqns, feed = self.fqns(), iter(tensors)
        placeholders = [n.name for n in self.program.graph.nodes if n.op == "placeholder"]
        return interpreter.run(*(self.tensors[fqns[name]] if name in fqns else next(feed) for name in placeholders))


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, wanted: frozenset[str]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.wanted, self.kept = wanted, dict[str, torch.Tensor]()

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, torch.Tensor):
            self.kept[n.name] = value.detach().clone()
        return value


@one_at_a_time
def capture(model: nn.Module, inputs: Inputs, whole: Mapping[type[nn.Module], Uses] | None = None) -> Captured:
    """Trace `model` in eval mode with symbolic sizes on the dynamic axes of `inputs`; modules of the classes `whole` stay one call.

    Raises: `T2NErrorDynamicShapeValue` if torch fixes a dimension that was asked to be dynamic; `T2NErrorNotImplemented` if the module
    cannot be captured; both with the user's line.
    """
    sizes = {name: max(size, _SMALLEST_TRACED) for name, size in inputs.sizes().items()}
    try:
        return _capture(model, inputs, whole or {}, sizes)
    except T2NErrorDynamicShapeValue:
        # At small sizes derived ones are 1, which torch burns in; multiples keep what models demand of sizes.
        with contextlib.suppress(T2NError):
            larger = _capture(model, inputs, whole or {}, {name: 4 * size for name, size in sizes.items()})
            if all(limit.holds(inputs.sizes()) for limit in larger.limits):
                return larger
        raise


def _capture(
    model: nn.Module, inputs: Inputs, whole: Mapping[type[nn.Module], Uses], sizes: Mapping[str, int]
) -> Captured:
    traced = inputs.resized(sizes)
    args, kwargs = traced.unflatten(traced.tensors)
    leaves = [dict.fromkeys(axes, Dim.DYNAMIC) for axes in inputs.axes]
    dims = _by_parameter(model, *inputs.unflatten(leaves))
    watch = Watch(_axes(model, inputs), module_names(model))
    with contextlib.ExitStack() as stack:
        for patch in (
            eval_mode(model),
            symbolic_sizes(),
            interpreted_functions(),
            torch.no_grad(),
            watch.running(),
        ):
            stack.enter_context(patch)
        calls = stack.enter_context(kept_whole(model, whole))
        mode, tensors = stack.enter_context(_placeholders(model))
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        said = io.StringIO()
        try:
            # On failure torch prints the graph it had, which says less than the report.
            with contextlib.redirect_stderr(said):
                program = torch.export.export(model, fake_args, fake_kwargs, dynamic_shapes=dims, strict=False)
            sys.stderr.write(said.getvalue())
        except Exception as error:  # torch.export raises many unrelated classes
            raise explain(error, type(model).__name__, watch) from error
        if watch.assigned:
            raise keeps_state(watch.assigned)
        inline_conds(program.graph_module)
        make_functional(program.graph_module)
        return Captured(program, inputs, {**_constants(program), **tensors}, limits(watch), calls)


def _axes(model: nn.Module, inputs: Inputs) -> dict[str, Axis]:
    """Torch's name of every dynamic size -> whose it is."""
    numbered = _by_parameter(model, *inputs.unflatten(range(len(inputs.names))))
    return {
        f"L{pytree.keystr(path)}.size()[{axis}]": Axis(inputs.names[index], axis, symbol)
        for path, index in pytree.tree_flatten_with_path(numbered)[0]
        for axis, symbol in inputs.axes[index].items()
    }


@one_at_a_time
def decompose(captured: Captured, ops: Sequence[OpOverload]) -> Captured:
    """The same capture with `ops` spelled out in simpler ones, in functional form."""
    known = torch.export.default_decompositions()
    table = {op: known[op] for op in ops if op in known}
    with torch.no_grad():
        program = captured.program.run_decompositions(table)
    return replace(captured, program=program, tensors={**_constants(program), **captured.tensors})


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    return {fqn: value for fqn, value in program.constants.items() if isinstance(value, torch.Tensor)}


def _by_parameter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Dims under the names of forward's parameters; those of `*args` in one tuple, those of `**kwargs` beside the others."""
    signature = inspect.signature(model.forward)
    try:
        bound = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise T2NErrorInvalidArgument(
            f"the arguments do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {**bound, **bound.pop(extra)} if extra in bound else bound


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module gets its own mode back."""
    # A frozen ScriptModule has no mode.
    training = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    try:
        try:
            model.eval()
        except NotImplementedError:  # what torch.export made has one mode
            for module, _ in training:
                module.training = False
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@contextlib.contextmanager
def _placeholders(model: nn.Module) -> Iterator[tuple[FakeTensorMode, dict[str, torch.Tensor]]]:
    """Swap every parameter for a fake of its logical shape and dtype; ties are kept, buffers stay real (some are computed with)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    tensors = _tensors(model)
    fakes: dict[int, nn.Parameter] = {}
    undo: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in fakes:
                    with mode:
                        empty = torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device="cpu")
                    fakes[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                undo.append((module._parameters, name, parameter))
                module._parameters[name] = fakes[id(parameter)]
        yield mode, tensors
    finally:
        for holder, name, parameter in undo:
            holder[name] = parameter
