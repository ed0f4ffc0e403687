"""Registries of quantization methods. `DEFAULT_COMPRESSION` is ours; `dynamic_load_registry` reads anyone's.

A method is called as `fn(model, tokenizer=..., export_dirpath=..., local_dir=...)` and changes `model` in place or
returns another.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument, expect
from torch_to_nnef.quantize.budget import Budget, quantize_within
from torch_to_nnef.quantize.methods.awq import quantize_awq, quantize_awq_gptq
from torch_to_nnef.quantize.methods.best import quantize_best
from torch_to_nnef.quantize.methods.gptq import quantize_gptq
from torch_to_nnef.quantize.methods.half import keep_half
from torch_to_nnef.quantize.methods.imatrix import quantize_imatrix
from torch_to_nnef.quantize.methods.int8 import quantize_smooth_int8, quantize_static_int8
from torch_to_nnef.quantize.methods.min_max import quantize_min_max
from torch_to_nnef.quantize.methods.scale_search import quantize_scale_search
from torch_to_nnef.quantize.observers import OBSERVERS
from torch_to_nnef.quantize.targets import DEFAULT_CLASSES, EXCLUDED, Selection, Target, as_filters, find_targets
from torch_to_nnef.tensor.offload import OffloadedTensor, loaded
from torch_to_nnef.tensor.quant.base import QTensor
from torch_to_nnef.tensor.updater import ModTensorUpdater

if TYPE_CHECKING:
    from torch_to_nnef.quantize.apply import Progress
    from torch_to_nnef.quantize.calibration import Batch

Method = Callable[..., Any]


def quantize_weights_min_max_Q4_0(
    model: nn.Module,
    to_quantize_module_classes: Sequence[type[nn.Module]] = (nn.Linear,),
    percentile: float = 1.0,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "min_max_q4_0",
    **kw: Any,
) -> nn.Module:
    """Quantize the weights of these module classes (with subclasses) to Q40, in place; returns `model`.

    Args:
        model: Changed in place; exactly as before if an error is raised.
        to_quantize_module_classes: Modules whose `weight` is asked for.
        percentile: In (0, 1]: quantile of the magnitudes of each group of 32 that its scale spans.
        selection: Filters, and what the captured graph knows about uses.
        progress: `(done, total, name)`.
        method: Name shown in reports.
        **kw: Arguments of the registry call that this method does not need (tokenizer, export_dirpath, local_dir).

    Raises:
        T2NErrorImpossibleQuantization: A weight holds NaN, Inf or values beyond the range of Q40.

    """
    return quantize_min_max(model, to_quantize_module_classes, percentile, selection, progress, method)


def quantize_weights_q40(
    model: nn.Module,
    to_quantize_module_classes: Sequence[type[nn.Module]] = DEFAULT_CLASSES,
    selection: Selection | None = None,
    progress: Progress | None = None,
    method: str = "q40",
    **kw: Any,
) -> nn.Module:
    """Quantize weights to Q40 with the scale of least squared error in each group of 32, in place; returns `model`.

    The default method; otherwise as `quantize_weights_min_max_Q4_0`.
    """
    return quantize_scale_search(model, to_quantize_module_classes, selection, progress, method)


def offloaded_tensor_qtensor(
    q_fn: Callable[[torch.Tensor], QTensor], tensor: torch.Tensor, suffix_name: str = ""
) -> QTensor:
    """`q_fn(tensor)`, its codes kept on disk if `tensor` is an `OffloadedTensor`; for methods that replace weights on their own.

    suffix_name: appended to the `nnef_name` of the result, where it has one.
    """
    packed = q_fn(loaded(tensor))
    if packed.nnef_name and suffix_name:
        packed.nnef_name = f"{packed.nnef_name}.{suffix_name}"
    return packed.offload() if isinstance(tensor, OffloadedTensor) else packed


DEFAULT_COMPRESSION: dict[str, Method] = {
    "q40": quantize_weights_q40,
    "q40_imatrix": quantize_imatrix,
    "q40_gptq": quantize_gptq,
    "q40_awq": quantize_awq,
    "q40_awq_gptq": quantize_awq_gptq,
    "q40_best": quantize_best,
    "min_max_q4_0": quantize_weights_min_max_Q4_0,
    "min_max_q4_0_with_embeddings": partial(
        quantize_weights_min_max_Q4_0,
        to_quantize_module_classes=(nn.Linear, nn.Embedding),
        method="min_max_q4_0_with_embeddings",
    ),
    "min_max_q4_0_with_embeddings_99": partial(
        quantize_weights_min_max_Q4_0,
        to_quantize_module_classes=(nn.Linear, nn.Embedding),
        percentile=0.99,
        method="min_max_q4_0_with_embeddings_99",
    ),
    "min_max_q4_0_all": partial(
        quantize_weights_min_max_Q4_0, to_quantize_module_classes=DEFAULT_CLASSES, method="min_max_q4_0_all"
    ),
    "int8": quantize_static_int8,
    **{f"int8_{name}": partial(quantize_static_int8, observer=name, method=f"int8_{name}") for name in OBSERVERS},
    "int8_smooth": quantize_smooth_int8,
    "int8_per_tensor": partial(quantize_static_int8, per_channel=False, method="int8_per_tensor"),
}
_ANY_ROWS = (quantize_static_int8, quantize_smooth_int8, keep_half, None)
"""Methods for which rows need not be multiples of 32."""
KEPT: dict[str, Method | None] = {"f16": keep_half, "f32": None}
"""What an override can ask for beside the keys of a registry."""
DEFAULT_COMPRESSION_REGISTRY = f"{__name__}.DEFAULT_COMPRESSION"


def dynamic_load_registry(path: str) -> Mapping[str, Method]:
    """The registry called `path` ("pkg.mod.NAME"); modules in the current folder are found too.

    Raises:
        T2NErrorInvalidArgument: Not a dotted name, no such module or attribute, an import that fails, or not a mapping
            of
            names to callables.

    """
    expect("registry", path, str, "a name like `pkg.mod.NAME`")
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not attribute:
        raise T2NErrorInvalidArgument(f"a registry is named like `pkg.mod.NAME`: got {path!r}")
    registry = getattr(_import(module_name), attribute, None)
    if registry is None:
        raise T2NErrorInvalidArgument(f"module `{module_name}` has no `{attribute}`")
    if not isinstance(registry, Mapping) or not all(isinstance(k, str) and callable(v) for k, v in registry.items()):
        raise T2NErrorInvalidArgument(f"`{path}` is not a mapping of method names to callables")
    return registry


def takes(fn: Method, name: str) -> bool:
    """Whether a registry method has a parameter of that name."""
    return name in inspect.signature(fn).parameters


def needs_calibration(fn: Method) -> bool:
    """Whether a registry method learns from data: it has a parameter `calibration`, without a default or with None."""
    parameter = inspect.signature(fn).parameters.get("calibration")
    return parameter is not None and parameter.default in (None, inspect.Parameter.empty)


@dataclass(frozen=True)
class Choice:
    """Which method is applied to which weights.

    method: a key of `registry`, a callable with the signature of its values, or None: weights stay as they are.
    registry: name -> method. Beside its keys there are `f16` (`keep_half`) and `f32` (left as it is).
    overrides: filter -> key; of several that match a weight, the first counts.
    fallback: what becomes of weights that were to be Q40, but have rows that it cannot hold: None, they stay as they are; `f16`; `pad`,
        zeros behind them, where what reads them allows it; or `error`.
    budget: what quantization may cost: weights that cost more for their bytes than others stay in f16.
    """

    method: str | Method | None
    registry: Mapping[str, Method] = field(default_factory=lambda: DEFAULT_COMPRESSION)
    overrides: Mapping[Any, str] = field(default_factory=dict)
    fallback: str | None = None
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        """Raises `T2NErrorInvalidArgument` for keys that there are not, and for what is no method."""
        expect("registry", self.registry, Mapping, "a dict of methods by name")
        expect("overrides", self.overrides, Mapping, "a dict of methods by filter")
        for key in (self.method, *self.overrides.values()):
            if not callable(key) and key not in (*self.registry, *KEPT, None):
                raise T2NErrorInvalidArgument(
                    f"no quantization method {key!r}; the registry has {sorted(self.registry)}, beside f16 and f32"
                )
            if isinstance(key, str) and key in self.registry:
                expect(f"method {key!r}", self.registry[key], Callable, "a function")  # type: ignore[arg-type]
        if self.fallback not in (None, "f16", "pad", "error"):
            raise T2NErrorInvalidArgument(f"fallback is None, 'f16', 'pad' or 'error': got {self.fallback!r}")
        if self.budget and not self.methods:
            raise T2NErrorInvalidArgument("target_bpw and max_kl bound what a method does: name one")

    def __call__(
        self, model: nn.Module, selection: Selection, judged_on: Sequence[Batch] = (), **extras: Any
    ) -> nn.Module:
        """`model`, or what methods returned for it, after all were called; `extras` as `call_method` takes them.

        judged_on: for the budget.

        Raises what methods raise; `T2NErrorImpossibleQuantization` for rows that Q40 cannot hold if `fallback` says so, before anything
        is changed; `T2NErrorInvalidArgument` for an override that selects nothing, or a budget that cannot be met.
        """
        if not self.budget:
            return self._quantized(model, selection, extras)

        def apply(kept: frozenset[str]) -> nn.Module:
            names = "|".join(map(re.escape, sorted(kept)))
            first = {re.compile(rf"^(?:{names})\Z"): "f16"} if kept else {}
            return replace(self, overrides={**first, **self.overrides})._quantized(model, selection, extras)

        return quantize_within(self.budget, model, apply, judged_on, extras.get("progress"))

    def _quantized(self, model: nn.Module, selection: Selection, extras: Mapping[str, Any]) -> nn.Module:
        selection = replace(selection, pad=self.fallback == "pad")
        *overrides, (method, rest) = parts = self._parts(selection)
        if self.fallback == "error":
            in_q40 = [chosen for packs, chosen in parts if getattr(packs, "func", packs) not in _ANY_ROWS]
            _refuse_rows(target for chosen in in_q40 for target in find_targets(model, DEFAULT_CLASSES, chosen))
        for other, chosen in overrides:
            find_targets(model, DEFAULT_CLASSES, chosen)  # says that it selects nothing
            if other is not None:
                model = call_method(other, model, selection=chosen, **extras)
        if method is not None:
            held = dict(ModTensorUpdater(model).tensors())
            model = call_method(method, model, selection=rest, **extras)
            if rest.exclude:
                _check_excluded(model, held, replace(rest, include=None))
        if self.fallback == "f16":
            wide = {t.places[0].fqn for t in find_targets(model, DEFAULT_CLASSES, rest) if t.has_wrong_rows}
            if wide:
                chosen = replace(rest, include=lambda module, fqn: fqn in wide)
                model = call_method(keep_half, model, selection=chosen, **extras)
        return model

    def _parts(self, selection: Selection) -> list[tuple[Method | None, Selection]]:
        """Each override and then the method, with the weights that are left to it."""
        excluded, parts = [*as_filters(selection.exclude or ())], []
        for pattern, key in self.overrides.items():
            parts.append((self._of(key), replace(selection, include=pattern, exclude=[*excluded] or None)))
            excluded.append(pattern)
        return [*parts, (self._of(self.method), replace(selection, exclude=excluded or None))]

    @property
    def methods(self) -> tuple[Method, ...]:
        """All that are called."""
        found = (self._of(key) for key in (self.method, *self.overrides.values()))
        return tuple(method for method in found if method is not None)

    def _of(self, key: str | Method | None) -> Method | None:
        if key is None or callable(key):
            return key
        return self.registry[key] if key in self.registry else KEPT[key]


def _check_excluded(model: nn.Module, held: Mapping[str, torch.Tensor], selection: Selection) -> None:
    """Raise `T2NErrorInvalidArgument` if a method without regard for its `selection` packed one of the tensors that `model` held."""
    for target in find_targets(model, DEFAULT_CLASSES, selection):
        name, packed = target.places[0].fqn, isinstance(target.tensor, QTensor)
        if target.reason == EXCLUDED and packed and type(target.tensor) is not type(held.get(name)):
            raise T2NErrorInvalidArgument(
                f"the method packed `{name}`, which exclude or overrides keep from it: it has to regard its argument `selection`"
            )


def _refuse_rows(targets: Iterable[Target]) -> None:
    wrong = [f"`{target.places[0].fqn}`: {target.reason}" for target in targets if target.has_wrong_rows]
    if wrong:
        raise T2NErrorImpossibleQuantization(
            "weights that Q40 cannot hold; exclude them, or choose fallback='f16':\n  " + "\n  ".join(wrong)
        )


def call_method(
    fn: Method,
    model: nn.Module,
    tokenizer: Any = None,
    export_dirpath: Path | None = None,
    local_dir: Path | None = None,
    **extras: Any,
) -> nn.Module:
    """Run a registry method; returns the model it returned, or `model` if it returned none.

    `extras` (selection, progress, calibration...) are passed where the signature of `fn` takes them.

    Raises:
        T2NErrorInvalidArgument: `fn` returned something that is not a module.

    """
    signature = inspect.signature(fn)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    given = {"tokenizer": tokenizer, "export_dirpath": export_dirpath, "local_dir": local_dir}
    given |= {k: v for k, v in extras.items() if takes_all or k in signature.parameters}
    try:
        signature.bind(model, **given)
    except TypeError as error:
        raise T2NErrorInvalidArgument(
            f"a method is called as fn(model, tokenizer=, export_dirpath=, local_dir=), which {fn!r} does not take: {error}"
        ) from None
    returned = fn(model, **given)
    if returned is not None and not isinstance(returned, nn.Module):
        raise T2NErrorInvalidArgument(f"method {fn!r} returned {type(returned).__name__}: expected a module or None")
    return model if returned is None else returned


def _import(module_name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except Exception as failure:
        raise T2NErrorInvalidArgument(
            f"cannot import `{module_name}`: {type(failure).__name__}: {failure}"
        ) from failure
    finally:
        sys.path.remove(here)
