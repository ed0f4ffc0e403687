"""A causal language model of transformers as one step on plain tensors: tokens and caches in, logits and caches out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.llm_tract.experts import capturable_experts
from torch_to_nnef.llm_tract.rotary import without_writes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sizes of the samples: apart, and from two on, since torch burns 0 and 1 into a graph.
_NEW, _PAST, _KEPT = 4, 3, 2


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a step: `input_ids` [1, S], then for each layer a key and a value cache [1, heads, P, features].

    layers: of each layer, `(heads, features of a key, features of a value)`.
    context: most tokens, past and new, that the model takes; None if nothing bounds it.
    logits: how many positions, counted from the end, have logits in `outputs` [1, n, vocabulary]; 0 for all S; None if the input
    `logits_to_keep` [K] (i64) names them.
    cached: dtype of the caches; None: that of the model.
    """

    layers: tuple[tuple[int, int, int], ...]
    context: int | None
    logits: int | None = 1
    cached: torch.dtype | None = None

    @property
    def caches(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """`(key_0, (heads, features))`, `(value_0, ...)`, `(key_1, ...)`..."""
        return tuple(
            (f"{side}_{i}", (heads, size))
            for i, (heads, *sizes) in enumerate(self.layers)
            for side, size in zip(("key", "value"), sizes, strict=True)
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order of the graph's inputs."""
        positions = ("logits_to_keep",) if self.logits is None else ()
        return ("input_ids", *positions, *(f"in_cache_{name}" for name, _ in self.caches))

    @property
    def output_names(self) -> tuple[str, ...]:
        """In the order of the graph's outputs."""
        return ("outputs", *(f"out_cache_{name}" for name, _ in self.caches))

    @property
    def carried(self) -> dict[str, str]:
        """Cache input -> the output that is its value in the next step."""
        return {f"in_cache_{name}": f"out_cache_{name}" for name, _ in self.caches}

    @property
    def carried_positions(self) -> dict[int, int]:
        """`carried` by the positions of inputs and outputs."""
        inputs, outputs = self.input_names, self.output_names
        return {inputs.index(start): outputs.index(end) for start, end in self.carried.items()}

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """S new tokens after P past ones; K positions with logits where they are an input."""
        positions = {"logits_to_keep": {0: "K"}} if self.logits is None else {}
        return {"input_ids": {1: "S"}, **positions, **{f"in_cache_{name}": {2: "P"} for name, _ in self.caches}}

    @property
    def extensions(self) -> tuple[str, ...]:
        """What the archive asserts of its sizes."""
        bounds = [f"S >= {self.logits or 1}", "P >= 0"]
        if self.context is not None:
            bounds.append(f"S + P <= {self.context}")
        return tuple(f"tract_assert {bound}" for bound in bounds)

    def sample(self, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Inputs of a step of a model in `dtype`, in the middle of a text, the same every time."""
        generator = torch.Generator().manual_seed(0)
        size = max(_NEW, (self.logits or 0) + 1)
        ids = torch.randint(vocabulary, (1, size), generator=generator)
        positions = [torch.arange(size - _KEPT, size)] if self.logits is None else []
        return ids, *positions, *self.past(_PAST, dtype, generator)

    def past(self, size: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Caches of `size` tokens for a model in `dtype`: normal noise, or zeros without a generator."""
        dtype = self.cached or dtype
        shapes = [(1, heads, size, features) for _, (heads, features) in self.caches]
        if generator is None:
            return [torch.zeros(shape, dtype=dtype) for shape in shapes]
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def as_step(model: PreTrainedModel, signature: Signature) -> nn.Module:
    """`model` with a forward of plain tensors, `signature` says which; it shares all modules and parameters with `model`.

    The object is of a class derived from the model's, so that modules and weights keep their names. `model` may be a step already.
    Caches come in any dtype, are computed with in the model's, and go out as they came.
    """
    kind = getattr(type(model), "_stepped", type(model))
    argument = cache_argument(kind)
    # A forward that always gives all logits: what was not asked for is left out after it.
    slices = "logits_to_keep" in inspect.signature(kind.forward).parameters

    def forward(self: Any, input_ids: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        from transformers.cache_utils import DynamicCache

        positions, caches = (signature.logits, rest) if signature.logits is not None else (rest[0], rest[1:])
        kept = caches[0].dtype
        caches = tuple(side.to(self.dtype) for side in caches)
        cache = DynamicCache(list(zip(caches[::2], caches[1::2], strict=True)))
        options: dict[str, Any] = {argument: cache, "use_cache": True, "return_dict": True}
        if slices:
            options["logits_to_keep"] = positions
        with capturable_experts(self):
            logits = kind.forward(self, input_ids=input_ids, **options).logits
        return [logits if slices else _kept(logits, positions), *(side.to(kept) for side in _sides(cache.layers))]

    step: nn.Module = copy.copy(model)
    step.__class__ = type(kind.__name__, (kind,), {"forward": forward, "_stepped": kind, "__module__": kind.__module__})
    without_writes(step)
    return step


def cache_argument(kind: type[PreTrainedModel]) -> str:
    """What `kind.forward` calls its cache; transformers renamed it in 5.2x."""
    parameters = inspect.signature(kind.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if name is None:
        raise T2NErrorNotImplemented(
            f"{kind.__name__}.forward takes no cache of keys and values; give export_model_to_nnef a module whose forward takes and "
            "returns its state as tensors"
        )
    return name


def _kept(logits: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    return logits[:, slice(-positions, None) if isinstance(positions, int) else positions]


def _sides(layers: Sequence[Any]) -> list[torch.Tensor]:
    return [side for layer in layers for side in (layer.keys, layer.values)]
