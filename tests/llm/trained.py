"""A tiny Llama that knows a text by heart, so that what it generates is no noise; as an export leaves it."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from tiny import TEXT, tiny_model, tiny_tokenizer

from torch_to_nnef import TractModel, TractNNEF, export_model_to_nnef
from torch_to_nnef.api import copy_model
from torch_to_nnef.compress import DEFAULT_COMPRESSION
from torch_to_nnef.llm_tract.causal import Signature, as_step
from torch_to_nnef.llm_tract.families import step_signature


@lru_cache
def trained_model():
    """Knows TEXT, and the answer to a question in the chat template."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    conversation = [{"role": "user", "content": "Capital of Italy?"}, {"role": "assistant", "content": "Rome is 🏛 it."}]
    chat = tokenizer.apply_chat_template(conversation, tokenize=False)
    texts = [tokenizer(text)["input_ids"] for text in (*TEXT.splitlines(), chat)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on products as small as these, more only wait for each other
    for _ in range(60):
        for ids in texts:
            batch = torch.tensor([ids])
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    assert loss < 0.2
    return model.eval().requires_grad_(False)


def signature_of(model, logits: int | None = 1) -> Signature:
    return step_signature(model.config, logits)


def sample_of(model, signature: Signature) -> tuple[torch.Tensor, ...]:
    return signature.sample(model.config.vocab_size, model.dtype)


@lru_cache
def form_of(method: str | None):
    """The trained model, or a copy of it in Q40 that shares what stays float."""
    if method is None:
        return trained_model()
    work = copy_model(trained_model(), share_weights=True)
    return DEFAULT_COMPRESSION[method](work) or work


def archive_in(folder: Path) -> TractModel:
    return TractModel.load(folder / "model" / "model.nnef.tgz")


def export(model, folder: Path, logits: int | None = 1) -> Path:
    """The folder of an export: archive, tokenizer, modes.json."""
    signature = signature_of(model, logits)
    archive = folder / "model" / "model.nnef.tgz"
    archive.parent.mkdir(parents=True)
    names = {"input_names": signature.input_names, "output_names": signature.output_names}
    target = TractNNEF.latest(dynamic_axes=signature.dynamic_axes, check_io=False)
    sample = sample_of(model, signature)
    export_model_to_nnef(
        as_step(model, signature), sample, archive, target, custom_extensions=signature.extensions, **names
    )
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    files = {"archive": "model/model.nnef.tgz", "config": "model/config.json", "tokenizer": "tokenizer"}
    said = {"context": signature.context, "eos_token_ids": [model.config.eos_token_id]}
    (folder / "modes.json").write_text(json.dumps({"format": 1, "model": said, "files": files}))
    return folder
