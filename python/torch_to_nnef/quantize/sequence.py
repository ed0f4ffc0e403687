"""In which order a model reads its weights, and how to run a part of it again without what is before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_to_nnef.quantize.calibration import Batch
from torch_to_nnef.quantize.targets import Target
from torch_to_nnef.quantize.watch import Watch
from torch_to_nnef.torch_internals import pytree


@dataclass(frozen=True)
class Stage:
    """Weights that read the same inputs, so that one sum over these serves them all.

    targets: in the order of their use. calls: how often each is used in a forward; 0 if that depends on the data (experts).
    block: index of the block that uses them last; -1 before the first one, as many as there are behind the last.
    """

    targets: tuple[Target, ...]
    calls: int
    block: int


@dataclass(frozen=True)
class Order:
    """The blocks of a model that run one after the other, and its stages in the order of their last use."""

    blocks: tuple[nn.Module, ...]
    stages: tuple[Stage, ...]
    unused: tuple[Target, ...]


class _Enough(BaseException):  # not an Exception: nothing on the way may take it for an error
    """Leaves a forward of which nothing more is needed."""


def order_of(model: nn.Module, targets: Sequence[Target], batch: Batch) -> Order:
    """Find out by running `model` on `batch` once."""
    blocks = _longest_chain(model, targets)
    at, called, uses = [-1], [], defaultdict[int, list[tuple[Any, int]]](list)
    last: list[Any] = [None, 0]
    sliced: set[int] = set()

    def entered(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            called.append(index)
            at[0] = index

        return hook

    def left(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            at[0] = index + 1 if index + 1 == len(blocks) else index

        return hook

    def multiplied(target: Target, x: torch.Tensor, start: int, count: int) -> None:
        known, number = last
        same = known is not None and _is_same(known, x)
        last[:] = [x, number if same else number + 1]
        uses[id(target.tensor)].append((last[1], at[0]))
        if x.shape[1] < count:
            sliced.add(id(target.tensor))

    def looked_up(target: Target, indices: torch.Tensor) -> None:
        last[:] = [None, last[1] + 1]
        uses[id(target.tensor)].append((last[1], at[0]))

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(entered(index)).remove)
            stack.callback(block.register_forward_hook(left(index)).remove)
        stack.enter_context(Watch(targets, multiplied, looked_up))
        batch(model)
    in_order = called == list(range(len(blocks)))
    groups = defaultdict[Any, list[Target]](list)
    for target in targets:
        if seen := uses[id(target.tensor)]:
            groups[tuple(source for source, _ in seen)].append(target)
    stages = [
        Stage(
            tuple(group),
            0 if id(group[0].tensor) in sliced else len(sources),
            uses[id(group[0].tensor)][-1][1] if in_order else 0,
        )
        for sources, group in sorted(groups.items(), key=lambda item: item[0][-1])
    ]
    return Order(blocks if in_order else (model,), tuple(stages), tuple(t for t in targets if not uses[id(t.tensor)]))


def _longest_chain(model: nn.Module, targets: Sequence[Target]) -> tuple[nn.Module, ...]:
    """Members of the list of modules that holds most of the weights; without a list, the model itself."""
    sizes = {id(place.module): 0 for target in targets for place in target.places}
    for target in targets:
        sizes[id(target.places[0].module)] += target.tensor.numel()

    def held(module: nn.Module) -> int:
        return sum(sizes.get(id(m), 0) for m in module.modules())

    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and m is not model]
    best = max(lists, key=held, default=None)
    return tuple(best) if best is not None and 2 * held(best) > held(model) and len(best) > 1 else (model,)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both see the same values in memory; `a` being alive, nothing else lies there."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a._version == b._version


class Replay:
    """A model that is run block by block on batches: what the last finished block returned is kept, a value a batch."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> None:
        self._model, self._blocks, self.batches = model, blocks, batches
        self._kept: list[Any] | None = None
        self.at = 0
        """Index of the block that runs next."""

    def run(self, index: int, watch: Callable[[Callable[[], None]], Any]) -> None:
        """Run batch `index` inside of the context `watch(enough)`; calling `enough` ends it early."""
        with _skipping(self._blocks[: self.at], self._kept and self._kept[index]), watch(_stop):
            try:
                self.batches[index](self._model)
            except _Enough:
                return

    def advance(self) -> None:
        """Finish the next block on all batches."""
        block, kept = self._blocks[self.at], []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(output)
            raise _Enough

        handle = block.register_forward_hook(keep)
        try:
            for index in range(len(self.batches)):
                self.run(index, _nothing)
        finally:
            handle.remove()
        self._kept, self.at = kept, self.at + 1


def _stop() -> None:
    raise _Enough


@contextmanager
def _nothing(enough: Callable[[], None]) -> Iterator[None]:
    yield


@contextmanager
def _skipping(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Blocks that return `output` at once. Whatever the model does around them it does itself."""
    held = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:  # copies: what comes next may write into its input
            block.forward = lambda *args, **kwargs: pytree.tree_map_only(torch.Tensor, torch.clone, output)
        yield
    finally:
        for block, forward in held:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
