"""The tokenizer and chat template that an export leaves, without torch: text to tokens, and tokens to text as they come."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from jinja2 import Template

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextTokenizer:
    """A tokenizer that transformers saved: `tokenizer.json`, `tokenizer_config.json`, and a chat template, if the model has one.

    Raises `T2NErrorNotFoundFile` if there is no `tokenizer.json` in `folder`, `T2NErrorInvalidArgument` for files that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path, config = folder / "tokenizer.json", read_json(folder / "tokenizer_config.json")
        if not path.is_file():
            instead = (
                "its tokenizer is of a kind that only transformers reads: encode and decode with it, and run the archive with TractModel"
                if config
                else "export with --dump-with-tokenizer-and-conf, or copy the model's tokenizer there"
            )
            raise T2NErrorNotFoundFile(f"no tokenizer at {str(path)!r}: {instead}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # what tokenizers raises has no other class
            raise T2NErrorInvalidArgument(f"{str(path)!r} is no tokenizer: {error}") from error
        self._tokenizer.no_truncation()  # what the files say of these is for training
        self._tokenizer.no_padding()
        self._named = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        self._template = _template(folder, config)

    @property
    def chats(self) -> bool:
        """There is a chat template."""
        return self._template is not None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token that ends a text, if one is named."""
        token = self._named.get("eos_token")
        found = None if token is None else self._tokenizer.token_to_id(token)
        return () if found is None else (found,)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text from its beginning, with what the model expects before it.

        Raises `T2NErrorInvalidArgument` for text that is no Unicode (lone surrogates).
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the answer to its last message begins.

        messages: `{"role": "system" | "user" | "assistant", "content": text}` each.
        Raises `T2NErrorInvalidArgument` without a chat template, or if it refuses the messages.
        """
        if self._template is None:
            raise T2NErrorInvalidArgument("the model has no chat template: give it a text to go on from, not messages")
        try:
            text = self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._named
            )
        except Exception as error:  # a template computes, and may raise what Python raises
            raise T2NErrorInvalidArgument(f"the chat template refuses these messages: {error}") from error
        # The template says all special tokens itself.
        return self._encode(text, add_special_tokens=False)

    def decode(self, before: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """Text of `tokens`, which follow `before`, as soon as characters are whole; special tokens have none."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=list(before), skip_special_tokens=True)
        for token in tokens:
            try:
                piece = stream.step(self._tokenizer, token)
            except (
                Exception
            ):  # byte tokens that are no text have changed what was decoded: tokenizers has no other class for that
                stream = DecodeStream(skip_special_tokens=True)
                piece = stream.step(self._tokenizer, token)
            if piece:
                yield piece

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise T2NErrorInvalidArgument(f"{text!r} is no text: {error}") from error
        return ids


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no file. Raises `T2NErrorInvalidArgument` if it holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise T2NErrorInvalidArgument(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise T2NErrorInvalidArgument(f"{str(path)!r} holds no JSON object")
    return data


def _content(token: Any) -> str:
    """A token is its text, or an object that says more of it."""
    text: Any = token.get("content") if isinstance(token, dict) else token
    try:
        return str(text.encode(), "utf-8")
    except (AttributeError, UnicodeEncodeError) as error:
        raise T2NErrorInvalidArgument(f"tokenizer_config.json: {token!r} is no token: {error}") from error


def _template(folder: Path, config: Mapping[str, Any]) -> Template | None:
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        return None if source is None else _compiled(source)
    except Exception as error:  # of what is no text, or no list of templates; of nesting and numbers in it
        raise T2NErrorInvalidArgument(f"the chat template cannot be read: {error}") from error


def _compiled(source: str) -> Template:
    """`source` with what transformers promises to chat templates. It comes with a checkpoint, so it runs in a sandbox."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model says, for training."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
