"""torch.export on placeholders: the weights are neither copied nor read, and the user's model leaves as it came."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from torch_to_nnef.exceptions import T2NErrorDynamicShapeValue, T2NErrorInvalidArgument, T2NErrorNotImplemented
from torch_to_nnef.graph.inputs import Inputs
from torch_to_nnef.graph.opaque import ModuleCall, Uses, kept_whole
from torch_to_nnef.graph.patches import symbolic_max_pool1d, symbolic_sqrt

# torch burns sizes 0 and 1 into a graph, so a dynamic axis is traced at this size or more.
_SMALLEST_TRACED = 2
# In place by name only: no value changes.
_GRADIENT_ONLY = frozenset({torch.ops.aten.detach_.default})


@dataclass(frozen=True, slots=True)
class Captured:
    """An exported program over fake weights, and the tensors those stand for.

    `tensors` maps every fqn (parameter, buffer, lifted constant) to the user's own tensor; tied ones are the same object.
    `calls` are those of modules kept whole.
    """

    program: ExportedProgram
    inputs: Inputs
    tensors: Mapping[str, torch.Tensor]
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
        """Whether a call changes one of its arguments (`relu_`): handlers want values that stay."""
        targets = (n.target for n in self.program.graph.nodes if n.op == "call_function")
        return any(
            isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets if t not in _GRADIENT_ONLY
        )

    def rebind(self, model: nn.Module) -> Captured:
        """The same program over the tensors that `model`, a copy of the captured one, holds now."""
        return replace(self, tensors={**self.tensors, **_tensors(model)})

    def values(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Torch's own value of the nodes `names` for user inputs `tensors`; weights are dequantized where used."""
        recorder = _Recorder(self.program.graph_module, frozenset(names))
        fqns, feed = self.fqns(), iter(tensors)
        weights = {name: self.tensors[fqn] for name, fqn in fqns.items()}
        placeholders = [n.name for n in self.program.graph.nodes if n.op == "placeholder"]
        with torch.no_grad():
            recorder.run(*(weights[name] if name in weights else next(feed) for name in placeholders))
        return recorder.kept


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, wanted: frozenset[str]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.wanted, self.kept = wanted, dict[str, torch.Tensor]()

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, torch.Tensor):
            self.kept[n.name] = value.detach().clone()
        return value


def capture(model: nn.Module, inputs: Inputs, whole: Mapping[type[nn.Module], Uses] | None = None) -> Captured:
    """Trace `model` in eval mode with symbolic sizes on the dynamic axes of `inputs`; modules of the classes `whole` stay one call.

    Raises: `T2NErrorDynamicShapeValue` if torch fixes a dimension that was asked to be dynamic; `T2NErrorNotImplemented` if the module
    cannot be captured, with torch's explanation.
    """
    traced = inputs.resized({name: max(size, _SMALLEST_TRACED) for name, size in inputs.sizes().items()})
    args, kwargs = traced.unflatten(traced.tensors)
    leaves = [dict.fromkeys(axes, Dim.DYNAMIC) for axes in traced.axes]
    dims = _by_parameter(model, *inputs.unflatten(leaves))
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(symbolic_max_pool1d())
        stack.enter_context(symbolic_sqrt())
        calls = stack.enter_context(kept_whole(model, whole or {}))
        mode, tensors = stack.enter_context(_placeholders(model))
        stack.enter_context(torch.no_grad())
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        try:
            program = torch.export.export(model, fake_args, fake_kwargs, dynamic_shapes=dims, strict=False)
        except Exception as error:  # torch.export raises many unrelated classes
            raise _explain(error, model) from error
        return Captured(program, inputs, {**_constants(program), **tensors}, calls)


def decompose(captured: Captured, ops: Sequence[torch._ops.OpOverload]) -> Captured:
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
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
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


def _explain(error: Exception, model: nn.Module) -> Exception:
    text = re.sub(r"\n{2,}", "\n", str(error)).strip()
    kind = type(error).__name__
    if "dynamic" in text and (
        "specialized" in text or "Constraints violated" in text or kind == "ConstraintViolationError"
    ):
        return T2NErrorDynamicShapeValue(
            f"torch.export fixed a dimension of {type(model).__name__} that was asked to be dynamic:\n{text}"
        )
    hint = ""
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in kind:
        hint = "\nhint: a Python branch reads a tensor's value; write it with torch.where or torch.cond"
    elif isinstance(model, torch.jit.ScriptModule):
        hint = "\nhint: torch.export takes no ScriptModule; export the nn.Module it was made from"
    return T2NErrorNotImplemented(f"torch.export could not capture {type(model).__name__}: {kind}: {text}{hint}")
