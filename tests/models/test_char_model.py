"""A character-level model trained here in seconds: an embedding tied to the head, causal attention, functional linears."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_to_nnef import TractModel, quantize_and_verify

TEXT = inspect.cleandoc(torch.nn.Module.__doc__ + torch.optim.Adam.__doc__ + torch.Tensor.view.__doc__)[:3000]
CHARACTERS = sorted(set(TEXT))
WIDTH = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.in_proj = nn.Parameter(torch.empty(3 * WIDTH, WIDTH))  # used by a functional linear
        nn.init.normal_(self.in_proj, std=1 / math.sqrt(WIDTH))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (
            F.linear(self.norm1(x), self.in_proj).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), WIDTH)
        self.position = nn.Embedding(128, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


@pytest.fixture(scope="module")
def trained():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CharModel()
    for embedding in (model.embedding, model.position):
        nn.init.normal_(embedding.weight, std=0.05, generator=generator)
    ids = torch.tensor([CHARACTERS.index(c) for c in TEXT])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(0, len(ids) - 65, (8,), generator=generator)
        batch = torch.stack([ids[s : s + 65] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), ids


def loss_of(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_char_model_in_q40(trained, tmp_path):
    model, ids = trained
    path = tmp_path / "char.nnef.tar"
    report = quantize_and_verify(model, ids[None, :16], path, dynamic_axes={"ids": {0: "B", 1: "S"}})
    assert report.ok
    assert len([c for c in report.archive if not c.traced]) >= 3
    quantized = {row.fqn for row in report.rows if row.quantized}
    blocks = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("in_proj", "out.weight", "up.weight", "down.weight")}
    assert quantized == {"embedding.weight", "position.weight", *blocks}
    assert sum(r.nbytes_after for r in report.rows) <= 0.17 * sum(r.nbytes_before for r in report.rows)
    window = ids[:120].reshape(2, 60)
    with torch.no_grad():
        reference = model(window)
    logits = torch.from_numpy(TractModel.load(path).run(window)["output"])
    assert F.cosine_similarity(reference.flatten(0, 1), logits.flatten(0, 1)).mean() >= 0.96
    assert loss_of(reference, window) < 2.5 < loss_of(torch.zeros_like(reference), window)
    assert loss_of(logits, window) < loss_of(reference, window) + 0.5
