"""`TractLLM`: an exported language model in use, in process and without torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torch_to_nnef.exceptions import (
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)
from torch_to_nnef.llm_tract.steps import TractSteps
from torch_to_nnef.llm_tract.tokenizer import TextTokenizer, read_json
from torch_to_nnef.tract_model import TractModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

_CHUNK = 512  # tokens of a prompt in one run; the scores of attention are their square


@dataclass
class Answer:
    """What became of a call of `generate`, complete once it has ended.

    prompt_tokens: of the prompt; fed_tokens: those of them that the caches did not hold. new_tokens: generated, without one that ends it.
    ended: by the model ("eos"), a text of `stop`, the number of tokens asked for ("length"), or the end of the context; None before.
    """

    prompt_tokens: int
    fed_tokens: int = 0
    new_tokens: int = 0
    ended: Literal["eos", "stop", "length", "context"] | None = None
    seconds: list[float] = field(default_factory=list)
    """Of each run of tract; the first reads the prompt."""

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompt read a second."""
        return self.fed_tokens / self.seconds[0] if self.seconds else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second after the prompt."""
        return len(self.seconds[1:]) / sum(self.seconds[1:]) if self.seconds[1:] else 0.0


class TractLLM:
    """The archive of a language model, its tokenizer and its chat template, from the folder that `t2n_export_llm_to_tract` leaves.

    Caches stay from call to call: a prompt that begins as what they hold is only read from where it differs. For one thread at a time.

    threads: that share the work of tract. Raises `T2NErrorNotFoundFile` for a folder without an archive or tokenizer,
    `T2NErrorInvalidArgument` for one whose files cannot be read, and what `TractModel.load` raises.
    """

    def __init__(self, folder: str | PathLike[str], threads: int | None = None) -> None:
        root = Path(folder)
        modes = read_modes(root)
        files, said = modes.get("files", {}), modes.get("model", {})
        self.tokenizer = TextTokenizer(root / (files.get("tokenizer") or "tokenizer"))
        archive = root / files.get("archive", "model/model.nnef.tgz")
        self._steps = TractSteps(TractModel.load(archive, threads=threads))
        self.context: int | None = said.get("context")
        """Most tokens, past and new, that the model takes; None if nothing bounds it."""
        self.eos_ids = frozenset([*said.get("eos_token_ids", ()), *self.tokenizer.eos_ids])
        """Tokens that end an answer."""
        self.answer = Answer(0)
        """Of the last call of `generate`."""
        self._fed: list[int] = []

    def reset(self) -> None:
        """Forget the text so far."""
        self._steps.reset()
        self._fed = []
        self.answer = Answer(0)

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Go on from `prompt`: pieces of text as they are generated, whole characters each. `answer` says why it ended, and how fast.

        prompt: a text, or messages `{"role": ..., "content": ...}` for the chat template.
        temperature: 0 takes the likeliest token each time; else tokens are drawn (`seed`) from the distribution of
        `logits / temperature`, of the `top_k` likeliest, and of the fewest likeliest that hold a share `top_p` (0..1] together.
        stop: texts that end the answer; they are not part of it.

        Raises `T2NErrorInvalidArgument` for arguments outside of these, or a prompt with no tokens or more than the context; while it
        runs, `T2NErrorMisuse` if another call has begun meanwhile, and what `TractModel.run` raises.
        """
        choose = _chooser(temperature, top_k, top_p, seed)
        if max_new_tokens < 1:
            raise T2NErrorInvalidArgument(f"max_new_tokens: {max_new_tokens!r} is not a number from 1 on")
        stops = tuple(filter(None, [stop] if isinstance(stop, str) else stop))
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        if not ids:
            raise T2NErrorInvalidArgument("the prompt is empty, and the model has no token for the beginning of a text")
        if self.context is not None and len(ids) > self.context:
            raise T2NErrorInvalidArgument(f"the prompt has {len(ids)} tokens, the model takes {self.context}")
        answer = self.answer = Answer(len(ids))
        pieces = self.tokenizer.decode(ids, self._tokens(ids, max_new_tokens, choose, answer))
        return _until(pieces, stops, answer) if stops else pieces

    def _tokens(
        self, ids: Sequence[int], most: int, choose: Callable[[NDArray[np.float32]], int], answer: Answer
    ) -> Iterator[int]:
        pending = self._unread(ids)
        answer.fed_tokens = len(pending)
        while answer.ended is None:
            if self.answer is not answer:
                raise T2NErrorMisuse("another answer was begun, or the text reset, before this one ended")
            start = time.perf_counter()
            token = choose(self._feed(pending))
            answer.seconds.append(time.perf_counter() - start)
            if token in self.eos_ids:
                answer.ended = "eos"
                return
            answer.new_tokens += 1
            yield token
            pending = [token]
            if answer.new_tokens == most:
                answer.ended = "length"
            elif self.context is not None and len(self._fed) >= self.context:
                answer.ended = "context"

    def _feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [vocabulary] of what follows `ids`."""
        for at in range(0, len(ids), _CHUNK):
            chunk = ids[at : at + _CHUNK]
            logits: NDArray[np.float32] = self._steps.feed(chunk)[-1]
            self._fed += chunk
        if not np.isfinite(logits.max()):
            raise T2NErrorRuntime(
                "the logits are not finite: the model leaves the range of its dtype; export it in f32, or with "
                "--force-f32-attention, --force-f32-normalization and --force-f32-linear-accumulator"
            )
        return logits

    def _unread(self, ids: Sequence[int]) -> Sequence[int]:
        """What of `ids` the caches do not hold, at least the last token; they forget what is not of `ids`."""
        pairs = zip(self._fed, ids[:-1], strict=False)
        common = next((at for at, (old, new) in enumerate(pairs) if old != new), min(len(self._fed), len(ids) - 1))
        if common < len(self._fed):
            self._steps.keep(common)
            self._fed = self._fed[:common]
        return ids[common:]


def read_modes(root: Path) -> dict[str, Any]:
    """What `modes.json` in the folder of an export says, as the docstring of `layout.py` has it.

    Raises `T2NErrorNotFoundFile` if there is none, `T2NErrorInvalidArgument` if it is of a later format or no JSON.
    """
    path = root / "modes.json"
    if not path.is_file():
        raise T2NErrorNotFoundFile(f"{str(root)!r} is no folder of an exported language model: it has no modes.json")
    modes = read_json(path)
    if modes.get("format") != 1:
        raise T2NErrorInvalidArgument(
            f"{str(path)!r} is of format {modes.get('format')!r}: this version reads format 1"
        )
    return modes


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> Callable[[NDArray[np.float32]], int]:
    """What picks a token by its logits [vocabulary]."""
    if not 0 <= temperature < np.inf:
        raise T2NErrorInvalidArgument(f"temperature: {temperature!r} is not a number from 0 on")
    if top_k is not None and top_k < 1:
        raise T2NErrorInvalidArgument(f"top_k: {top_k!r} is not a number from 1 on")
    if top_p is not None and not 0 < top_p <= 1:
        raise T2NErrorInvalidArgument(f"top_p: {top_p!r} is not above 0 and at most 1")
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    random = np.random.default_rng(seed)

    def draw(logits: NDArray[np.float32]) -> int:
        scores = logits.astype(np.float64) / temperature
        order = np.argsort(-scores, kind="stable")[:top_k]
        chances = np.exp(scores[order] - scores[order[0]])
        chances /= chances.sum()
        if top_p is not None:
            chances = chances[: int(np.searchsorted(chances.cumsum(), top_p)) + 1]
            chances /= chances.sum()
        return int(order[random.choice(len(chances), p=chances)])

    return draw


def _until(pieces: Iterator[str], stops: Sequence[str], answer: Answer) -> Iterator[str]:
    """`pieces` up to the first of `stops`; what may be the beginning of one is held back until it is known."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for stop in stops if (at := held.find(stop)) >= 0]:
            answer.ended = "stop"
            held = held[: min(found)]
            break
        begun = max(size for stop in stops for size in range(len(stop)) if held.endswith(stop[:size]))
        if known := held[: len(held) - begun]:
            yield known
        held = held[len(held) - begun :]
    if held:
        yield held
