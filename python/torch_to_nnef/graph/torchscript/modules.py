"""A stand-in for every ScriptModule: same children, names and tensors, its methods interpreted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from torch_to_nnef.graph.torchscript.interpreter import Code


def eager(model: nn.Module) -> nn.Module:
    """`model` itself, or, if it is or holds a ScriptModule, a copy of plain modules over the same tensors, under the same names."""
    parameters: dict[int, nn.Parameter] = {}
    if isinstance(model, torch.jit.ScriptModule):
        return _stand_in(model, parameters)
    scripted = list(_topmost(model))
    if not scripted:
        return model
    kept: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**kept, **{id(child): _stand_in(child, parameters) for child in scripted}})


def _topmost(model: nn.Module) -> Iterator[torch.jit.ScriptModule]:
    for child in model.children():
        if isinstance(child, torch.jit.ScriptModule):
            yield child
        else:
            yield from _topmost(child)


class Scripted(nn.Module):
    """Each stand-in has a class of its own, named as the original was, which knows the ScriptModule."""

    script: ClassVar[torch.jit.ScriptModule]
    code: ClassVar[dict[str, Code]]

    def __getattr__(self, name: str) -> Any:
        for held in (self._parameters, self._buffers, self._modules):
            if name in held:
                return held[name]
        if name.startswith("__"):  # Python asks, e.g. for __deepcopy__; the original would answer for itself
            raise AttributeError(name)
        return getattr(self.script, name)

    def call_method(self, name: str, *args: Any) -> Any:
        """Run a method; `forward` as a call of the module, so that torch knows where it is."""
        return self(*args) if name == _forward_of(self.script) else _code(type(self), name)(self, *args)


def _forward_of(script: torch.jit.ScriptModule) -> str | None:
    """Name of its forward; of an overloaded one (nn.LSTM: tensors or packed sequences), the first."""
    return next((name for name in ("forward", "forward__0") if script._c._has_method(name)), None)


def _code(cls: type[Scripted], name: str) -> Code:
    if name not in cls.code:
        method = cls.script._c._get_method(name)
        cls.code[name] = Code(method.graph, method.schema)
    return cls.code[name]


def _stand_in(script: torch.jit.ScriptModule, parameters: dict[int, nn.Parameter]) -> Scripted:
    """`parameters` keeps ties: id of a tensor -> the parameter made of it."""

    def parameter(tensor: torch.Tensor) -> nn.Parameter:
        if isinstance(tensor, nn.Parameter):
            return tensor
        return parameters.setdefault(id(tensor), nn.Parameter(tensor.detach(), requires_grad=False))

    cls: type[Scripted] = type(script.original_name, (Scripted,), {"script": script, "code": {}})
    module = cls()
    module.training = False
    # Not by register_*, which see the names as taken: the original answers to them.
    # torch.jit.freeze forgets to wrap the children it keeps.
    held: Any = script if script._modules else torch.jit._recursive.wrap_cpp_module(script._c)  # type: ignore[no-untyped-call]
    module._parameters.update({name: parameter(tensor) for name, tensor in held._parameters.items()})
    module._buffers.update(held._buffers.items())
    module._modules.update({name: _stand_in(child, parameters) for name, child in held._modules.items()})
    if (forward := _forward_of(script)) is not None:
        code = _code(cls, forward)
        cls.forward = _forward(code)
        for fqn, tensor in code.frozen.items():
            _register(module, fqn, parameter(tensor))
    return module


def _forward(code: Code) -> Callable[..., Any]:
    def forward(self: Scripted, *args: Any, **kwargs: Any) -> Any:
        return code(self, *args, **kwargs)

    forward.__signature__ = code.signature  # type: ignore[attr-defined]
    return forward


def _register(module: nn.Module, fqn: str, parameter: nn.Parameter) -> None:
    path, _, name = fqn.rpartition(".")
    for part in path.split(".") if path else ():
        module._modules.setdefault(part, nn.Module())
        module = module.get_submodule(part)
    module._parameters[name] = parameter
