"""A language model fed a few tokens at a time, with its caches carried: what torch and tract have in common, and tract's side of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from torch_to_nnef.exceptions import T2NErrorInvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from torch_to_nnef.tract_model import TractModel

_IN, _OUT = "in_cache_", "out_cache_"


class Steps(Protocol):
    """Tokens go in, logits come out; caches hold what was fed since the start or the last `reset`."""

    def feed(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Append `ids`; logits [n, vocabulary] of their last n positions: at least the last one, all with `every`."""

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens, which were fed."""

    def reset(self) -> None:
        """Forget what was fed."""


def run_ahead(steps: Steps, tokens: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
    """Feed `tokens`, then the likeliest token each time: `count` of these, and the logits [count, vocabulary] they were chosen by."""
    chosen: list[int] = []
    logits = []
    for _ in range(count):
        logits.append(steps.feed(chosen[-1:] or tokens)[-1])
        chosen.append(int(logits[-1].argmax()))
    return chosen, np.stack(logits)


class TractSteps:
    """`Steps` of an archive with inputs and outputs named as `Signature` does; needs no torch.

    Raises `T2NErrorInvalidArgument` for an archive with other inputs, or one that takes no single token.
    """

    def __init__(self, model: TractModel) -> None:
        names = [fact.name for fact in model.inputs]
        if "input_ids" not in names or not any(name.startswith(_IN) for name in names):
            raise T2NErrorInvalidArgument(f"not the archive of a language model: it takes {', '.join(names)}")
        logits = next(fact for fact in model.outputs if fact.name == "outputs")
        if isinstance(logits.shape[1], int) and logits.shape[1] > 1:
            raise T2NErrorInvalidArgument(
                f"the archive takes no fewer than {logits.shape[1]} tokens at a time, since it was exported with "
                f"--num-logits-to-keep {logits.shape[1]}; export it with 1 or `dynamic` to generate text"
            )
        self._session = model.session({name: name.replace(_IN, _OUT) for name in names if name.startswith(_IN)})
        self._asks_positions = "logits_to_keep" in names
        self._length = 0
        self.gives_every = not isinstance(logits.shape[1], int)
        """The archive can give logits of every position."""

    def reset(self) -> None:
        """See `Steps.reset`."""
        self._session.reset()
        self._length = 0

    def keep(self, count: int) -> None:
        """See `Steps.keep`."""
        if count < self._length:
            self._session.load_state({name: cache[:, :, :count] for name, cache in self._session.state().items()})
            self._length = count

    def feed(self, ids: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """See `Steps.feed`; where the archive gives only the last logits, `every` feeds one token at a time."""
        if every and not self.gives_every:
            return np.concatenate([self.feed([token]) for token in ids])
        given: dict[str, NDArray[Any]] = {"input_ids": np.asarray([ids], np.int64)}
        if self._asks_positions:
            given["logits_to_keep"] = np.arange(0 if every else len(ids) - 1, len(ids), dtype=np.int64)
        rows: NDArray[np.float32] = self._session.run(**given)["outputs"][0].astype(np.float32)
        self._length += len(ids)
        return rows
