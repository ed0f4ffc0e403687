"""`t2n chat`: talk with an exported language model."""

from __future__ import annotations

import os
import sys
from contextlib import closing, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_to_nnef.cli.outcome import outcome
from torch_to_nnef.exceptions import T2NErrorInvalidArgument

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from torch_to_nnef.llm_tract.model import Answer, TractLLM

_WHY = {"length": "cut at --max-new-tokens", "context": "the context is full, /reset begins anew"}
# What could move the cursor or speak to the terminal.
_CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")


def chat(
    folder: Annotated[Path, typer.Argument(help="What t2n_export_llm_to_tract left, with its tokenizer (-dwtac).")],
    system: Annotated[str | None, typer.Option(help="A message to the model before all others.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token each time; 1: as the model says.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that hold this share together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn; none: another one each time.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    threads: Annotated[
        int | None, typer.Option(min=1, help="That share the work; none: as many as there are cores.")
    ] = None,
) -> None:
    """Talk with an exported language model: its archive in tract, in this process, its tokenizer and its chat template.

    A line is a message; /reset begins a new conversation, /exit or the end of the input leaves. Ctrl-C stops an answer, a second one
    leaves. With a pipe for input, answers are all that stands on stdout.
    """
    with outcome(verbose=False):
        from torch_to_nnef.llm_tract import TractLLM

        if sys.stdin.isatty():
            _note(f"loading {folder}; /reset begins a new conversation, /exit leaves")
        model = TractLLM(folder, threads or os.cpu_count())
        drawing = {"temperature": temperature, "top_p": top_p, "seed": seed}
        _talk(Conversation(model, system, {"max_new_tokens": max_new_tokens, **drawing}))


class Conversation:
    """Messages for a model with a chat template, else a text that it goes on from; `options` are those of `TractLLM.generate`."""

    def __init__(self, model: TractLLM, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self._options = options
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.model.reset()
        self._messages = [*self._system]

    def answers(self, line: str) -> Generator[str, None, None]:
        """Pieces of what the model says to `line`. What was said before an interrupt stays said; after an error nothing of it was."""
        asked = [*self._messages, {"role": "user", "content": line}]
        prompt = asked if self.model.tokenizer.chats else "\n".join(message["content"] for message in asked)
        said, ended = "", False
        try:
            for piece in self.model.generate(prompt, **self._options):
                said += piece
                yield piece
            ended = True
        finally:
            if said or ended:
                self._messages = [*asked, {"role": "assistant", "content": said}]


def _talk(conversation: Conversation) -> None:
    interactive = sys.stdin.isatty()
    if not conversation.model.tokenizer.chats:
        _note("the model has no chat template: it goes on from your text as it is")
    for line in _typed() if interactive else _piped():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line:
            try:
                _print(conversation.answers(line))
                _note(_outcome(conversation.model.answer))
            except KeyboardInterrupt:
                if not interactive:
                    raise
                _note("\nstopped; Ctrl-C again leaves")
            except T2NErrorInvalidArgument as error:
                if not interactive:
                    raise
                _note(f"{error}; /reset begins anew")


def _typed() -> Iterator[str]:
    """Lines from the terminal until its end, which is Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history; Windows has its own)
    prompt = "> " if sys.stdout.isatty() else ""  # stdout is for answers when it leads elsewhere
    with suppress(EOFError):
        while True:
            yield input(prompt).strip()
    _note("")


def _piped() -> Iterator[str]:
    """Lines of a pipe; bytes that are no text are marked rather than refused."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from map(str.strip, sys.stdin)


def _print(pieces: Generator[str, None, None]) -> None:
    """Write an answer as it comes, without the space that many models begin it with, and end its line."""
    shown = False
    with closing(pieces):  # an interrupt ends the answer as well
        for piece in pieces:
            text = piece if shown else piece.lstrip()
            shown = shown or bool(text)
            print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
    print(flush=True)


def _outcome(answer: Answer) -> str:
    speeds = f"{answer.speed:.1f} tokens/s, {answer.fed_tokens} of the prompt at {answer.prompt_speed:.1f}/s"
    why = _WHY.get(answer.ended or "")
    return f"[{answer.new_tokens} tokens at {speeds}{f'; {why}' if why else ''}]"


def _note(text: str) -> None:
    print(
        f"\033[2m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text,
        file=sys.stderr,
        flush=True,
    )
