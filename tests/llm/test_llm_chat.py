"""`TractLLM` and `t2n chat`: an archive in use."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from tiny import TEMPLATE, TEXT, tiny_llama, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from trained import export, trained_model

from torch_to_nnef.exceptions import (
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)
from torch_to_nnef.llm_tract import TractLLM
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.tokenizer import TextTokenizer

FRANCE = "The capital of France is"
ITALY = [{"role": "user", "content": "Capital of Italy?"}]


@pytest.fixture(scope="module")
def llm(exported):
    return TractLLM(exported())


@pytest.fixture(autouse=True)
def _anew(request):
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").reset()


def test_neither_torch_nor_transformers_is_needed(exported):
    code = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers"))  # importing them fails
from torch_to_nnef.llm_tract import TractLLM
print("".join(TractLLM(sys.argv[1]).generate([{"role": "user", "content": "Capital of Italy?"}])))
"""
    command = [sys.executable, "-c", code, str(exported())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "Rome is 🏛 it.\n"), done.stderr


def test_text_comes_in_whole_characters(llm):
    pieces = list(llm.generate(ITALY))
    assert "".join(pieces) == "Rome is 🏛 it."
    assert "🏛" in "".join(piece for piece in pieces if len(piece.encode()) >= 4)
    assert not any("\ufffd" in piece for piece in pieces)
    assert llm.answer.ended == "eos"
    tokens = tiny_tokenizer()("Rome is 🏛 it.")["input_ids"]
    assert llm.answer.new_tokens == len(tokens) > len(pieces)
    assert len(llm.answer.seconds) == len(tokens) + 1  # one for the end
    assert llm.answer.speed > 0
    assert llm.answer.prompt_speed > 0


def test_a_text_is_gone_on_from(llm):
    assert "".join(llm.generate(FRANCE, 4)).startswith(" Paris")
    assert (llm.answer.ended, llm.answer.new_tokens) == ("length", 4)


def test_caches_hold_what_was_said(llm):
    first = "".join(llm.generate(ITALY))
    asked = llm.answer.prompt_tokens
    assert llm.answer.fed_tokens == asked
    longer = [*ITALY, {"role": "assistant", "content": first}, *ITALY]
    second = "".join(llm.generate(longer, 5))
    answer = llm.answer
    # The end of the answer and the new question; all before is in the caches.
    assert answer.fed_tokens == answer.prompt_tokens - asked - len(tiny_tokenizer()(first)["input_ids"])
    llm.reset()
    assert "".join(llm.generate(longer, 5)) == second
    assert llm.answer.fed_tokens == llm.answer.prompt_tokens


def test_caches_forget_what_is_not_in_the_prompt(llm):
    fresh = "".join(llm.generate("The capital of Spain", 8))
    llm.reset()
    list(llm.generate("The capital of France", 8))
    assert "".join(llm.generate("The capital of Spain", 8)) == fresh
    assert llm.answer.fed_tokens < llm.answer.prompt_tokens
    # The same prompt again: its last token is read again, since its logits are gone.
    assert "".join(llm.generate("The capital of Spain", 8)) == fresh
    assert llm.answer.fed_tokens == 1


@pytest.mark.parametrize("stop", ["of", [". The capital of It", "of Spain"]])
def test_stop_ends_the_text_before_it(llm, stop):
    whole = "".join(llm.generate(FRANCE, 20))
    stops = [stop] if isinstance(stop, str) else stop
    expected = min((whole.split(text)[0] for text in stops), key=len)
    assert expected != whole
    pieces = list(llm.generate(FRANCE, 20, stop=stop))
    assert "".join(pieces) == expected
    assert all(pieces)
    assert llm.answer.ended == "stop"
    assert "".join(llm.generate(FRANCE, 20, stop="nowhere")) == whole


def test_text_is_drawn_by_seed_from_what_is_likely(llm):
    def drawn(**options):
        return "".join(llm.generate("Once upon", 12, **options))

    greedy = drawn()
    hot = {"temperature": 4.0}
    assert drawn(**hot, seed=1) == drawn(**hot, seed=1) != drawn(**hot, seed=2)
    assert drawn(**hot, seed=1, top_k=1) == greedy
    assert drawn(**hot, seed=1, top_p=1e-9) == greedy
    assert drawn(temperature=1e-3, seed=1) == greedy


def test_draws_follow_the_distribution():
    """4000 draws: a share of p has a standard deviation of at most 0.008; 5 of them are 0.04."""
    from torch_to_nnef.llm_tract.model import _chooser

    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def shares(*arguments):
        choose = _chooser(*arguments, 0)
        return np.bincount([choose(logits) for _ in range(4000)], minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, None, None), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(shares(1.0, 2, None), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(shares(1.0, None, 0.7), [0.625, 0.375, 0, 0], atol=0.04)
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(0.5, None, None), squares / squares.sum(), atol=0.04)


def test_the_context_ends_a_text(llm):
    assert llm.context == 128
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    assert len(ids) > 130
    inside = tiny_tokenizer().decode(ids[:120])
    list(llm.generate(inside, 100))
    assert llm.answer.ended == "context"
    assert llm.answer.prompt_tokens + llm.answer.new_tokens == 129  # the last one needs no room
    with pytest.raises(T2NErrorInvalidArgument, match=r"the prompt has \d+ tokens, the model takes 128"):
        llm.generate(TEXT)


def test_long_prompts_are_read_in_parts(llm, monkeypatch):
    whole = "".join(llm.generate(FRANCE, 8))
    llm.reset()
    monkeypatch.setattr("torch_to_nnef.llm_tract.model._CHUNK", 2)
    assert "".join(llm.generate(FRANCE, 8)) == whole


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
)
def test_arguments_are_checked_at_the_call(llm, options, why):
    with pytest.raises(T2NErrorInvalidArgument, match=why):
        llm.generate(**{"prompt": FRANCE, **options})


def test_one_answer_at_a_time(llm):
    first = llm.generate(FRANCE)
    next(first)
    list(llm.generate(FRANCE, 2))
    with pytest.raises(T2NErrorMisuse, match="another answer was begun"):
        list(first)
    abandoned = llm.generate(FRANCE)
    next(abandoned)
    del abandoned
    assert "".join(llm.generate(FRANCE, 4)).startswith(" Paris")


def test_logits_that_are_no_numbers_are_an_error(llm, monkeypatch):
    monkeypatch.setattr(llm._steps, "feed", lambda ids: np.full((1, 320), np.nan, np.float32))
    with pytest.raises(T2NErrorRuntime, match="logits are not finite"):
        list(llm.generate(FRANCE))


def test_the_tokenizer_is_that_of_transformers(exported):
    ours, theirs = TextTokenizer(exported() / "tokenizer"), tiny_tokenizer()
    text = f"{TEXT}\nnaïve 日本 👩‍🚀</s> <|user|>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    conversation = [{"role": "system", "content": "Be brief."}, *ITALY]
    assert ours.encode_chat(conversation) == theirs.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    assert "".join(ours.decode([], theirs(text)["input_ids"])) == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True
    )
    assert ours.eos_ids == (2,)


@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_chat_templates_lie_where_transformers_put_them(where, exported, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(exported() / "tokenizer", folder)
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    said = json.loads(config.read_text())
    expected = TextTokenizer(folder).encode_chat(ITALY)
    if where != "file":
        file.unlink()
        named = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        config.write_text(json.dumps({**said, "chat_template": TEMPLATE if where == "config" else named}))
    assert TextTokenizer(folder).encode_chat(ITALY) == expected


def test_chat_templates_do_what_transformers_promises(exported, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(exported() / "tokenizer", folder)
    (folder / "chat_template.jinja").write_text(
        "{%- for m in messages %}\n    {%- if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {%- generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}{{ eos_token }}{{ strftime_now('%%') }}"
        "{%- if tools is not none or documents is not none %}tools{% endif %}"
    )
    tokenizer = TextTokenizer(folder)
    said = tokenizer.encode_chat([{"role": "user", "content": "<é>"}, *ITALY])
    assert tiny_tokenizer().decode(said) == '{"role": "user", "content": "<é>"}</s>%'
    with pytest.raises(T2NErrorInvalidArgument, match="refuses these messages: no tools"):
        tokenizer.encode_chat([{"role": "tool", "content": ""}])
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(T2NErrorInvalidArgument, match="unsafe"):
        TextTokenizer(folder).encode_chat(ITALY)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(T2NErrorInvalidArgument, match="chat template cannot be read"):
        TextTokenizer(folder)


@pytest.mark.parametrize("template", [
    "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ '%d' % 'x' }}", "{{ strftime_now(3) }}", "{{ raise_exception() }}",
    "{{ namespace(3) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 10 ** 100000 }}", "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{{" * 300,
    3, [3], [{}], [{"name": "default"}], [{"name": "default", "template": 3}],
])  # fmt: skip
def test_chat_templates_of_strangers_are_answered(exported, tmp_path, template):
    folder = tmp_path / "tokenizer"
    shutil.copytree(exported() / "tokenizer", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(T2NErrorInvalidArgument, match=r"the chat template (cannot be read|refuses these messages)"):
        TextTokenizer(folder).encode_chat(ITALY)


@pytest.mark.parametrize("config", [
    '{"bos_token": {"a": 1}}', '{"bos_token": 3}', '{"eos_token": "\\ud800"}', '{"eos_token": ["x"]}', "[" * 100_000,
    '{"a":' * 100_000, "3",
])  # fmt: skip
def test_tokenizer_configs_of_strangers_are_answered(exported, tmp_path, config):
    folder = tmp_path / "tokenizer"
    shutil.copytree(exported() / "tokenizer", folder)
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(T2NErrorInvalidArgument, match=r"tokenizer_config\.json"):
        TextTokenizer(folder)


def test_bytes_that_are_no_text_do_not_end_it(tmp_path):
    """Byte tokens before a text that make what was decoded another one: 0x41 is "A", until 0xF0 follows."""
    vocabulary = {"<unk>": 0, "\u2581x": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = list(TextTokenizer(tmp_path).decode([1], [2 + 0x41, 2 + 0xF0, 1, 1]))
    assert pieces == ["A", " x", " x"]


def test_a_text_without_the_space_before_it_keeps_it(tmp_path):
    """Decoders that strip the space at the beginning of a text see that this is none."""
    vocabulary = {"<unk>": 0, "\u2581is": 1, "\u2581Paris": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert list(TextTokenizer(tmp_path).decode([1], [2])) == [" Paris"]
    assert list(TextTokenizer(tmp_path).decode([], [2])) == ["Paris"]


def test_files_that_transformers_reads_in_another_way(exported, tmp_path):
    """Truncation and padding are for training; a tokenizer may be of a kind that is no `tokenizer.json`; text must be Unicode."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(exported() / "tokenizer", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert TextTokenizer(folder).encode(TEXT) == tiny_tokenizer()(TEXT)["input_ids"]
    with pytest.raises(T2NErrorInvalidArgument, match="is no text"):
        TextTokenizer(folder).encode("a\udc80b")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(T2NErrorInvalidArgument, match="is no tokenizer"):
        TextTokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(T2NErrorNotFoundFile, match="only transformers reads"):
        TextTokenizer(folder)


def test_folders_that_are_no_export(exported, tmp_path):
    with pytest.raises(T2NErrorNotFoundFile, match=r"has no modes\.json"):
        TractLLM(tmp_path)
    folder = tmp_path / "llm"
    shutil.copytree(exported(), folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(T2NErrorNotFoundFile, match="--dump-with-tokenizer-and-conf"):
        TractLLM(folder)
    (folder / "modes.json").write_text('{"format": 2}')
    with pytest.raises(T2NErrorInvalidArgument, match="is of format 2"):
        TractLLM(folder)


@pytest.mark.parametrize("struct", ["deep", "flat"])
def test_what_the_command_leaves_is_used_at_once(struct, tmp_path):
    checkpoint = tiny_llama(tmp_path / "checkpoint", trained_model())
    options = {"export_dir_struct": struct, "dump_with_tokenizer_and_conf": True, "no_verify": True}
    export_llm(LlmOptions(export_dirpath=tmp_path / "out", local_dir=checkpoint, **options))
    llm = TractLLM(tmp_path / "out")
    assert "".join(llm.generate(ITALY)) == "Rome is 🏛 it."
    assert (llm.answer.ended, llm.context, llm.eos_ids) == ("eos", 128, {2})


@contextmanager
def chat(folder, *arguments, **options):
    command = [sys.executable, "-c", "from torch_to_nnef.cli import t2n; t2n()", "chat", str(folder), *arguments]
    with subprocess.Popen(command, text=True, env={**os.environ, "NO_COLOR": "1"}, **options) as process:
        try:
            yield process
        finally:
            process.kill()  # of no effect on one that has ended


def piped(folder, lines, *arguments):
    pipe = subprocess.PIPE
    with chat(folder, *arguments, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        said, noted = process.communicate("\n".join(lines), timeout=120)
    return process.returncode, said, noted


def test_a_pipe_gets_answers_alone(exported):
    question = ITALY[0]["content"]
    code, said, noted = piped(exported(), [question, "", "/reset", question, "/exit", "not asked"], "--threads", "1")
    assert (code, said) == (0, "Rome is 🏛 it.\n" * 2)
    assert noted.count("tokens/s") == 2


def test_a_model_without_chat_template_goes_on(exported, tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(exported(), folder)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    code, said, noted = piped(folder, [FRANCE], "--max-new-tokens", "6")
    assert code == 0
    assert said.startswith("Paris")
    assert "no chat template" in noted
    assert "cut at --max-new-tokens" in noted


def test_bytes_that_are_no_text_are_marked(exported):
    pipe = subprocess.PIPE
    with chat(exported(), "--max-new-tokens", "2", stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.buffer.write(b"a\xffb\n")
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert said.endswith("\n")


def test_errors_of_chat_are_a_line_and_exit_code_2(tmp_path):
    code, said, noted = piped(tmp_path, [])
    assert (code, said) == (2, "")
    assert noted.startswith("error: ")
    assert noted.count("\n") == 1


class Screen:
    """What a program shows on a pseudo terminal."""

    def __init__(self, file):
        self.file, self.shown = file, ""

    def wait(self, *texts):
        """Read until all of `texts` came, in this order, since the last call."""
        for text in texts:
            end = time.monotonic() + 60
            while text not in self.shown:
                assert select.select([self.file], [], [], max(end - time.monotonic(), 0))[0], (
                    f"{text!r} not in {self.shown!r}"
                )
                self.shown += os.read(self.file, 4096).decode(errors="replace")
            self.shown = self.shown.split(text, 1)[1]


def test_on_a_terminal_ctrl_c_stops_and_then_leaves(tmp_path):
    """The first while an answer runs, of a model that never ends; then others are still taken."""
    folder = export(tiny_model(max_position_embeddings=1_000_000), tmp_path / "llm")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": None}))
    modes = json.loads((folder / "modes.json").read_text())
    modes["model"]["eos_token_ids"] = []
    (folder / "modes.json").write_text(json.dumps(modes))
    ours, theirs = pty.openpty()
    with chat(folder, "--max-new-tokens", "900000", stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        screen = Screen(ours)
        screen.wait("> ")
        os.write(ours, b"Hello\n")
        screen.wait("Hello\r\n", "a")
        process.send_signal(signal.SIGINT)
        screen.wait("stopped; Ctrl-C again leaves", "> ")
        os.write(ours, b"/reset\n")
        screen.wait("> ")
        time.sleep(1)  # readline misses a signal between its prompt and its wait for a key
        process.send_signal(signal.SIGINT)
        screen.wait("interrupted")
        assert process.wait(60) == 130
    os.close(ours)
