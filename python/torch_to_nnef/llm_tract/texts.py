"""Texts that models are tried on when the user gives none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "The capital of France is"

PROSE = (
    "In the winter the lake froze so hard that carts could cross it, and the people of both villages met in the middle to trade. "
    "They brought cheese, wool and candles, and they carried home news of births, of weddings and of the price of grain. "
    "When the ice grew thin in spring, a boy was sent out each morning with a long pole to test it. If the pole went through, he rang "
    "a bell on the shore, and the market was over until the next year. Nobody could say who had rung the bell first, but everyone "
    "agreed that it had never been rung too late."
)

_LONGEST_TOKEN = 64  # characters; only spaces and rules in code come near


@dataclass(frozen=True)
class Windows:
    """A text as tokens, cut into windows that are read one by one, each without the one before.

    name: of the text. left_out: some of the text lies behind the last window.
    """

    name: str
    ids: tuple[tuple[int, ...], ...]
    left_out: bool

    @property
    def count(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in self.ids)


def windows(
    tokenizer: Any, file: Path | None = None, *, context: int | None = None, most: int = 256, size: int = 512
) -> Windows:
    """The text of `file` (UTF-8), or a paragraph of ours, as at most `most` tokens in windows of `size` or `context` if that is less.

    tokenizer: of transformers. If it begins texts with a token of its own, every window has that.
    Raises `T2NErrorNotFoundFile`, and `T2NErrorInvalidArgument` for a file that is not UTF-8 or has less than two tokens.
    """
    text, more = (PROSE, False) if file is None else _read(file, most * _LONGEST_TOKEN)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    step = min(size, context or size) - len(begin)
    cuts = [(*begin, *ids[at : min(at + step, most)]) for at in range(0, min(len(ids), most), step)]
    chosen = tuple(window for window in cuts if len(window) > 1)
    if not chosen:
        raise T2NErrorInvalidArgument(
            f"{file or 'the text'}: at least two tokens are needed to see how well they are predicted"
        )
    return Windows("a built-in paragraph" if file is None else file.name, chosen, more or len(ids) > most)


def _read(file: Path, most: int) -> tuple[str, bool]:
    """The first `most` characters, and whether there are more."""
    if not file.is_file():
        raise T2NErrorNotFoundFile(f"no text at {str(file)!r}")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            return stream.read(most), bool(stream.read(1))
    except UnicodeDecodeError as error:
        raise T2NErrorInvalidArgument(f"{str(file)!r} is not UTF-8: {error}") from error
