"""In which order a model reads its weights, and how to run a part of it again without what is before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.calibration import Batch
from torch_to_nnef.quantize.statistics import block_count
from torch_to_nnef.quantize.targets import Target
from torch_to_nnef.quantize.watch import Watch
from torch_to_nnef.torch_internals import pytree

_TOLERANCE = 1e-4  # of results that are computed twice, of their norm


@dataclass(frozen=True)
class Stage:
    """Weights that read the same inputs, so that one sum over these serves them all.

    targets: in the order of their use. calls: how often each is used in a forward; 0 if that depends on the data (experts).
    block: index of the block that uses them last, or that comes next; -1 before the first one. nbytes: of the second moments of the inputs.
    """

    targets: tuple[Target, ...]
    calls: int
    block: int
    nbytes: int = 0

    @property
    def name(self) -> str:
        """Of the first weight."""
        return self.targets[0].places[0].fqn


@dataclass(frozen=True)
class Order:
    """The blocks of a model that run one after the other, and its stages in the order of their last use."""

    blocks: tuple[nn.Module, ...]
    stages: tuple[Stage, ...]
    unused: tuple[Target, ...]


class _Enough(BaseException):  # not an Exception: nothing on the way may take it for an error
    """Leaves a forward of which nothing more is needed."""


def order_of(model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch]) -> Order:
    """Find out by running `model` on the first batch, and on others as long as there are weights that none used."""
    chain = _longest_chain(model, targets)
    trace = _Trace(chain)
    result = trace.run(model, targets, batches[0])
    at_first = dict(trace.uses)
    follows = trace.entered == list(range(len(chain))) and all(map(trace.is_in_one_block, trace.uses.values()))
    follows = follows and _is_chain(model, chain, batches[0], trace.outputs, result)
    for batch in batches[1:]:
        if not (missing := [target for target in targets if id(target.tensor) not in trace.uses]):
            break
        trace.run(model, missing, batch)
    groups = defaultdict[Any, list[Target]](list)
    for target in targets:
        if seen := trace.uses.get(id(target.tensor)):
            groups[tuple(source for source, _ in seen)].append(target)
    stages = []
    for sources, group in groups.items():
        first = id(group[0].tensor)
        always = first in at_first and first not in trace.sliced
        block = trace.uses[first][-1][1] if follows else 0
        stage = Stage(tuple(group), len(sources) if always else 0, block, trace.nbytes.get(first, 0))
        stages.append((block, sources[-1], stage))
    return Order(
        chain if follows else (model,),
        tuple(stage for *_, stage in sorted(stages, key=lambda entry: entry[:2])),
        tuple(target for target in targets if id(target.tensor) not in trace.uses),
    )


class _Trace:
    """What happens when a model runs.

    uses: by the id of a weight, each use: the number of its inputs (the same for those that read the same), and the block it was in, or
    before.
    sliced: weights of which a part was used at a time. nbytes: of second moments of inputs, by the id of a weight. entered: indices of
    blocks as they began. outputs: their fingerprints.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._at = -1
        self._last: tuple[torch.Tensor | None, int] = None, 0
        self.uses: dict[int, list[tuple[int, int]]] = {}
        self.sliced: set[int] = set()
        self.nbytes: dict[int, int] = {}
        self.entered: list[int] = []
        self.outputs: list[Any] = []

    def run(self, model: nn.Module, targets: Sequence[Target], batch: Batch) -> Any:
        """The fingerprint of what `model` returns."""
        self._at, self.entered, self.outputs = -1, [], []
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._enter(index)).remove)
                stack.callback(block.register_forward_hook(self._leave(index)).remove)
            stack.enter_context(Watch(targets, self._multiplied, self._looked_up))
            return _fingerprint(batch(model))

    def is_in_one_block(self, uses: Sequence[tuple[int, int]]) -> bool:
        """Whether the last block of a weight is its only one; what is around all blocks is run with any of them."""
        return {block for _, block in uses if 0 <= block < len(self._blocks)} <= {uses[-1][1]}

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.entered.append(index)
            self._at = index

        return hook

    def _leave(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs.append(_fingerprint(output))
            self._at = index + 1

        return hook

    def _multiplied(self, target: Target, x: torch.Tensor, start: int, count: int) -> None:
        known, number = self._last
        self._last = x, number if known is not None and _is_same(known, x) else number + 1
        self.uses.setdefault(id(target.tensor), []).append((self._last[1], self._at))
        width = x.shape[-1]
        self.nbytes[id(target.tensor)] = 4 * count * width * (width // block_count(width))
        if x.shape[1] < count:
            self.sliced.add(id(target.tensor))

    def _looked_up(self, target: Target, indices: torch.Tensor) -> None:
        self._last = None, self._last[1] + 1
        self.uses.setdefault(id(target.tensor), []).append((self._last[1], self._at))


def _is_chain(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, outputs: Sequence[Any], result: Any) -> bool:
    """Whether each block needs of those before it only what the last one returned, and the rest of the model too.

    Not so: branches, connections around blocks, caches that blocks share.
    """
    replay = Replay(model, blocks, [batch])
    try:
        for expected in outputs:
            replay.advance()
            if not _is_close(_fingerprint(replay.kept), expected):
                return False
        return _is_close(_fingerprint(replay.run(0, _nothing)), result)
    except T2NErrorInvalidArgument:  # one that a block is missing for
        return False


def _fingerprint(output: Any) -> list[tuple[float, float]]:
    """Sum and norm of each float tensor."""
    leaves = [
        leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]
    return [
        (float(x.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(x, dtype=torch.float64))) for x in leaves
    ]


def _is_close(found: Sequence[tuple[float, float]], expected: Sequence[tuple[float, float]]) -> bool:
    def same(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return all(abs(x - y) <= _TOLERANCE * abs(b[1]) or x == y or x != x != y for x, y in zip(a, b, strict=True))

    return len(found) == len(expected) and all(map(same, found, expected))


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

    @property
    def kept(self) -> list[Any]:
        """What the last finished block returned, a value a batch."""
        return self._kept or []

    def run(self, index: int, watch: Callable[[Callable[[], None]], Any], last: int = 0) -> Any:
        """Run batch `index` inside of the context `watch(enough)`; it ends early by `enough()`, or after the next block, or block `last`.

        Returns what the model returned, None if it ended early.
        """
        kept = self._kept[index] if self._kept is not None else None
        last = max(last, self.at)
        with _skipping(self._blocks[: self.at], kept), _left_after(self._blocks[last : last + 1]), watch(_stop):
            try:
                return self.batches[index](self._model)
            except _Enough:
                return None

    def outputs(self) -> list[Any]:
        """What the model returns on each batch, its weights being now what they are from the next block on."""
        found = []
        for index, batch in enumerate(self.batches):
            with _skipping(self._blocks[: self.at], self._kept[index] if self._kept is not None else None):
                found.append(batch(self._model))
        return found

    def advance(self) -> None:
        """Finish the next block on all batches."""
        block, kept = self._blocks[self.at], []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(output)

        handle = block.register_forward_hook(keep)
        try:
            for index in range(len(self.batches)):
                self.run(index, _nothing)
                if len(kept) != index + 1:
                    raise T2NErrorInvalidArgument(
                        f"calibration: batch {index} does not run the block {type(block).__name__} {self.at}, which others do"
                    )
        finally:
            handle.remove()
        self._kept, self.at = kept, self.at + 1


def _stop() -> None:
    raise _Enough


@contextmanager
def _nothing(enough: Callable[[], None]) -> Iterator[None]:
    yield


@contextmanager
def _left_after(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Ends a forward when one of the blocks has returned."""
    handles = [block.register_forward_hook(lambda *_: _stop()) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
