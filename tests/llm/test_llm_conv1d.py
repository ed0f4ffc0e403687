"""GPT-2, whose linear layers hold their weights as [K, N] (`Conv1D`): packed as their transposes."""

import pytest
import torch
import transformers

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.llm_tract.causal import Signature, as_step
from torch_to_nnef.tensor.quant import QTensorTractTransposed, quantize_q40

VOCABULARY = 96
SIGNATURE = Signature(((4, 16, 16),) * 2, 64)


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def convert(model, path, method):
    return quantize_and_verify(
        as_step(model, SIGNATURE),
        SIGNATURE.sample(VOCABULARY, torch.float32),
        path,
        method,
        input_names=SIGNATURE.input_names,
        output_names=SIGNATURE.output_names,
        dynamic_axes=SIGNATURE.dynamic_axes,
        inplace=True,
    )


@pytest.mark.parametrize(("method", "count"), [(None, 0), ("min_max_q4_0", 9), ("min_max_q4_0_all", 10), ("q40", 10)])
def test_gpt2(gpt2, method, count, tmp_path):
    """Two layers of four `Conv1D` and the head tied to the token embedding; the positions only as embeddings."""
    floats = {name: p.detach() for name, p in gpt2.named_parameters()}
    report = convert(gpt2, tmp_path / "m.nnef", method)
    assert report.ok, report
    assert [row.storage for row in report.rows] == ["q40"] * count
    for row in report.rows:
        packed = gpt2.get_parameter(row.fqn)
        transposed = row.module_class == "Conv1D"
        assert isinstance(packed, QTensorTractTransposed) == transposed
        weight = floats[row.fqn].T.contiguous() if transposed else floats[row.fqn]
        expected = quantize_q40(weight, "scale_search" if method == "q40" else "min_max")
        written = (tmp_path / "m.nnef" / f"{row.fqn}.dat").read_bytes()
        assert written == expected.write_in_file(tmp_path, "expected").read_bytes()
