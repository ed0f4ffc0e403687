"""all-MiniLM-L6-v2: embeddings of 50 news, their neighbours, and what people found similar (Lee et al. 2005)."""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from subject import Column, Subject, documents, package_folder

from torch_to_nnef import TractNNEF

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sentence_encoder

NEIGHBOURS, LONGEST, CALIBRATION = 10, 256, 128


def minilm(tokens: int) -> Subject:
    """All 36 linear layers of the encoder; embeddings stay in float."""
    model, tokenizer = sentence_encoder.load()
    background = _inputs(tokenizer, documents("lee_background")[:CALIBRATION])
    axes = {0: "B", 1: "S"}
    return Subject(
        title=f"all-MiniLM-L6-v2, all 36 linear layers; {CALIBRATION} documents of calibration",
        columns=(
            Column("distance", "1 - cosine", ".5f"),
            Column("recall", f"recall@{NEIGHBOURS}", ".3f", least=False),
            Column("pearson", "Pearson to people", ".3f", least=False),
            Column("spearman", "Spearman to people", ".3f", least=False),
        ),
        model=model,
        asked={"include": "bert.encoder.*"},
        calibration=background,
        measure=_Measure(model, _inputs(tokenizer, documents("lee"))),
        sample=tuple(tokenizer(sentence_encoder.SENTENCES, padding=True, return_tensors="pt")[k] for k in INPUTS),
        target=TractNNEF.latest(dynamic_axes=dict.fromkeys(INPUTS, axes)),
        names={"output_names": ["embedding"]},
    )


INPUTS = "input_ids", "attention_mask"


def _inputs(tokenizer, texts):
    """A document each, without padding, cut to what the model was trained on."""
    batches = (tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt") for text in texts)
    return [tuple(batch[key] for key in INPUTS) for batch in batches]


class _Measure:
    def __init__(self, model, inputs):
        self._inputs = inputs
        self._float = self._embeddings(model)
        table = package_folder("gensim") / "test" / "test_data" / "similarities0-1.txt"
        self._pairs = np.triu_indices(len(inputs), 1)
        self._people = np.loadtxt(table)[self._pairs]

    @torch.no_grad()
    def _embeddings(self, model):
        return torch.cat([model(*inputs) for inputs in self._inputs])

    def __call__(self, model):
        """1 - mean cosine to float; share of the float model's neighbours kept; correlation of cosines with scores of people."""
        found = self._embeddings(model)
        kept = [len(a & b) / NEIGHBOURS for a, b in zip(_neighbours(found), _neighbours(self._float), strict=True)]
        cosines = (found @ found.T).numpy()[self._pairs]
        return {
            "distance": 1 - float((found.double() * self._float.double()).sum(1).mean()),
            "recall": float(np.mean(kept)),
            "pearson": float(pearsonr(cosines, self._people).statistic),
            "spearman": float(spearmanr(cosines, self._people).statistic),
        }


def _neighbours(embeddings):
    near = (embeddings @ embeddings.T).fill_diagonal_(-2)
    return [set(row) for row in near.topk(NEIGHBOURS).indices.tolist()]
