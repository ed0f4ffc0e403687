"""What compression costs a language model, in words: perplexity, divergence from the float model, an answer."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.llm_tract.generation import compare_generation
from torch_to_nnef.llm_tract.steps import run_ahead
from torch_to_nnef.llm_tract.texts import QUESTION
from torch_to_nnef.report.data import Section
from torch_to_nnef.report.words import size
from torch_to_nnef.verify.side_by_side import log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from torch_to_nnef.llm_tract.steps import Steps
    from torch_to_nnef.llm_tract.texts import Windows

_ANSWER = 16  # tokens
_CHUNK = 128  # positions whose logits are held at a time


@dataclass(frozen=True)
class QualityRow:
    """How one form of a model predicts a text.

    perplexity: exp of the mean negative log likelihood of the next token. nbytes: of the weights. answer: how it goes on from `QUESTION`.
    kl_mean, kl_max: KL(float || this) of the distributions of the next token in nats, mean and worst over the text.
    top1_same: share (0..1) of the tokens for which both hold the same next one likeliest. The float model itself has none of these three.
    """

    name: str
    perplexity: float
    nbytes: int
    answer: str
    kl_mean: float | None = None
    kl_max: float | None = None
    top1_same: float | None = None


@dataclass(frozen=True)
class Quality:
    """Several forms of a model on the same text, float first. tokens: how many were predicted; left_out: the text has more."""

    text: str
    tokens: int
    left_out: bool
    rows: tuple[QualityRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; a number that is not finite is text that `float()` reads."""
        rows = [{k: v if _finite(v) else str(v) for k, v in dataclasses.asdict(row).items()} for row in self.rows]
        return {"text": self.text, "tokens": self.tokens, "left_out": self.left_out, "question": QUESTION, "rows": rows}

    def section(self) -> Section:
        """The table of the report."""
        rest = ", the rest of it left out" if self.left_out else ""
        title = f"What it costs in words: {self.tokens} tokens of {self.text}{rest}"
        header = ("model", "weights", "perplexity", "KL to float", "worst", "top-1 same", f"{QUESTION} ...")
        return Section(title, header, tuple(_cells(row) for row in self.rows))


class FloatReference:
    """The float model on a text, before its weights change. Its logits wait on disk: use it in a `with`, or close it."""

    def __init__(self, steps: Steps, windows: Windows, tokenizer: Any, nbytes: int, name: str = "float torch") -> None:
        """`steps` of the float model, whose weights have `nbytes` bytes; `tokenizer` of transformers."""
        self._windows, self._tokenizer = windows, tokenizer
        self._question: list[int] = tokenizer(QUESTION)["input_ids"]
        self._file = tempfile.TemporaryFile(prefix="t2n-logits-")  # noqa: SIM115 (closed by close)
        scores = _Scores()
        for logits, following in _predictions(steps, windows):
            self._file.write(logits.tobytes())
            scores.add(logits, following)
        steps.reset()
        self.answer, _ = run_ahead(steps, self._question, _ANSWER)
        """Tokens it generates after `QUESTION`."""
        self.row = QualityRow(name, scores.perplexity, nbytes, self._text(self.answer))

    def quality(self, forms: Sequence[tuple[str, Steps, int]]) -> Quality:
        """Measure other forms of the model, of each a name, steps and bytes of weights; the quickest last, since it answers ahead."""
        *others, (_, quick, _) = forms
        tolerance = TractCheckTolerance.EXACT  # of no effect on the tokens
        answers = [
            compare_generation(steps, quick, self._question, _ANSWER, tolerance).tokens for _, steps, _ in others
        ]
        quick.reset()
        answers.append(tuple(run_ahead(quick, self._question, _ANSWER)[0]))
        rows = [self.measure(*form, answer) for form, answer in zip(forms, answers, strict=True)]
        return Quality(self._windows.name, self._windows.count, self._windows.left_out, (self.row, *rows))

    def measure(self, name: str, steps: Steps, nbytes: int, answer: Sequence[int]) -> QualityRow:
        """How `steps`, with `nbytes` bytes of weights, predicts the same text; `answer`: tokens it generates after `QUESTION`."""
        scores = _Scores()
        self._file.seek(0)
        for logits, following in _predictions(steps, self._windows):
            scores.add(logits, following, np.frombuffer(self._file.read(logits.nbytes), np.float32))
        mean, worst = float(np.mean(scores.divergences)), max(scores.divergences)
        same = scores.same / len(scores.divergences)
        return QualityRow(name, scores.perplexity, nbytes, self._text(answer), mean, worst, same)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def close(self) -> None:
        """Let go of the logits."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Scores:
    """Sums over the predictions of a text."""

    def __init__(self) -> None:
        self.likelihoods: list[float] = []
        self.divergences: list[float] = []
        self.same = 0

    @property
    def perplexity(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(-np.mean(self.likelihoods)))

    def add(self, logits: NDArray[np.float32], following: int, reference: NDArray[np.float32] | None = None) -> None:
        """Take in the logits [vocabulary] of one prediction, the token that came, and the float model's logits."""
        scores = log_softmax(logits)
        self.likelihoods.append(float(scores[following]))
        if reference is not None:
            expected = log_softmax(reference)
            chance = np.exp(expected)
            # Where the float model gives no chance at all, a token adds nothing, whatever the other says.
            gaps = np.subtract(expected, scores, out=np.zeros_like(scores), where=chance > 0)
            self.divergences.append(max(float(chance @ gaps), 0.0))  # below 0 by rounding only
            self.same += int(logits.argmax() == reference.argmax())


def _predictions(steps: Steps, windows: Windows) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Logits [vocabulary] at each position of the text, and the token that follows it."""
    for window in windows.ids:
        steps.reset()
        for start in range(0, len(window) - 1, _CHUNK):
            following = window[start + 1 : start + 1 + _CHUNK]
            yield from zip(steps.feed(window[start : start + len(following)], every=True), following, strict=True)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _cells(row: QualityRow) -> tuple[str, ...]:
    distances = ("",) * 3
    if row.kl_mean is not None and row.kl_max is not None and row.top1_same is not None:
        distances = f"{row.kl_mean:.2g}", f"{row.kl_max:.2g}", f"{row.top1_same:.1%}"
    return (row.name, size(row.nbytes), f"{row.perplexity:.2f}", *distances, " ".join(row.answer.split()))
