"""Scaled dot product attention in both of its forms against torch, at sizes other than the sample's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_to_nnef import TractModel, TractNNEF, export_model_to_nnef

CACHE = {"q": {2: "S"}, "k": {2: "S+P"}, "v": {2: "S+P"}}
SIZES = [(4, 3), (1, 0), (1, 40), (6, 0), (40, 33)]


class Attention(nn.Module):
    """`masks`: of rows and columns, the mask; `repeat`: as transformers shares heads."""

    def __init__(self, masks=None, repeat=1, **options):
        super().__init__()
        self.masks, self.repeat, self.options = masks, repeat, options

    def forward(self, q, k, v):
        mask = None
        if self.masks is not None:
            rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
            mask = self.masks(rows[:, None] + k.shape[2] - q.shape[2], columns)
        if self.repeat > 1:
            k, v = (_repeated(side, self.repeat) for side in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def _repeated(side, count):
    batch, heads, rows, features = side.shape
    return side[:, :, None].expand(batch, heads, count, rows, features).reshape(batch, heads * count, rows, features)


def _causal(row, column):
    return (column <= row)[None, None]


def _causal_float(row, column):
    return torch.where(column <= row, 0.0, -1e4)[None]


def _window(row, column):
    """Rows beyond the first two see the four keys before them and themselves; those two see nothing."""
    return (column <= row) & (column > row - 5) & (row > 1)


MODELS = {
    "plain": (Attention(), 6),
    "causal": (Attention(is_causal=True, scale=0.3), 6),
    "bool_mask": (Attention(_causal), 6),
    "float_mask": (Attention(_causal_float), 6),
    "masked_rows": (Attention(_window), 6),
    "repeated_heads": (Attention(_causal, repeat=3), 2),
    "gqa": (Attention(_causal, enable_gqa=True), 2),
}


def inputs(rows, past, heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    q = torch.randn(1, 6, rows, 16, generator=generator)
    k, v = (torch.randn(1, heads, rows + past, 16, generator=generator) for _ in range(2))
    return tuple(side.to(dtype) for side in (q, k, v))


def archive(tmp_path, model, sample, reify, axes=None):
    target = TractNNEF.latest(reify_sdpa_operator=reify, dynamic_axes=axes)
    names = {"input_names": ["q", "k", "v"], "output_names": ["y"]}
    return export_model_to_nnef(model.eval(), sample, tmp_path / "m.nnef", target, compression_level=None, **names)


@pytest.mark.parametrize("reify", [None, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_torch_at_other_sizes(tmp_path, name, reify):
    model, heads = MODELS[name]
    path = archive(tmp_path, model, inputs(4, 3, heads), reify, CACHE)
    text = (path / "graph.nnef").read_text()
    reified = reify is True and name != "float_mask"
    assert ("tract_registry tract_transformers" in text) == ("tract_transformers_sdpa(" in text) == reified
    if reify and name == "repeated_heads":
        assert "k, v," in text.split("tract_transformers_sdpa(")[1].split(")")[0]
    tract = TractModel.load(path)
    for rows, past in SIZES:
        given = inputs(rows, past, heads)
        torch.testing.assert_close(torch.from_numpy(tract.run(*given)["y"]), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reify", [None, True])
@pytest.mark.parametrize("name", ["bool_mask", "masked_rows", "gqa"])
def test_halves(tmp_path, name, reify):
    model, heads = MODELS[name]
    tract = TractModel.load(archive(tmp_path, model, inputs(4, 3, heads, torch.float16), reify, CACHE))
    given = inputs(1, 40, heads, torch.float16)
    torch.testing.assert_close(torch.from_numpy(tract.run(*given)["y"]), model(*given), rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(7, 16), (3, 7, 16), (2, 2, 3, 7, 16)])
def test_any_rank_may_be_asked_for(tmp_path, shape):
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    path = archive(tmp_path, Attention(), (q, k, v), True)
    assert ("tract_transformers_sdpa" in (path / "graph.nnef").read_text()) == (len(shape) < 5)


def test_heads_and_batches_broadcast(tmp_path):
    q, k = torch.randn(2, 4, 3, 8), torch.randn(1, 1, 5, 8)
    for reify in (None, True):
        archive(tmp_path / str(reify), Attention(), (q, k, torch.randn(2, 1, 5, 8)), reify)


def test_values_of_another_size(tmp_path):
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 24)
    archive(tmp_path, Attention(), (q, k, v), True)
