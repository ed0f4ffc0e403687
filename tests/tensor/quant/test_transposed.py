"""Q40 of weights [K, N]: in torch they are what they were, their planes and files are those of the transpose."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from torch_to_nnef import export_tensors_to_nnef
from torch_to_nnef._native import read_dat
from torch_to_nnef.exceptions import (
    T2NErrorImpossibleQuantization,
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
)
from torch_to_nnef.quantize import weight_error
from torch_to_nnef.tensor.quant import (
    Lzma,
    NibblePacking,
    QTensorTractScaleOnly,
    QTensorTractTransposed,
    load_safetensors,
    quantize_q40,
    save_safetensors,
)

# 48 is no multiple of 32: of this weight only the transpose can be Q40.
SHAPE = (64, 48)


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def q():
    return quantize_q40(weight(*SHAPE).mT, name="c_fc.weight").transposed()


class Conv1D(nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return x @ self.weight


def test_it_is_the_quantized_transpose(q):
    stored = quantize_q40(weight(*SHAPE).mT.contiguous())
    assert (tuple(q.shape), q.stride(), q.is_contiguous(), q.dtype) == (SHAPE, (48, 1), True, torch.float32)
    assert (q.nnef_name, q.packed_nbytes, q.storage_name) == ("c_fc.weight", 64 * 48 * 9 // 16, "q40")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(q.planes(), stored.planes(), strict=True))
    assert torch.equal(q.decompress(), stored.decompress().mT)
    assert q.decompress().is_contiguous()
    assert torch.equal(q.decompress_to_u8(), stored.decompress_to_u8().mT)
    assert torch.equal(q.decompress_slice(48, 96), q.decompress()[1])
    assert q.stored.is_identical(stored)
    assert q.stored.u8_blob.data_ptr() == q.u8_blob.data_ptr()
    assert not q.is_identical(stored)


def test_a_stack_of_matrices():
    stack = weight(3, 32, 5)
    q = quantize_q40(stack.mT).transposed()
    assert q.shape == stack.shape
    assert torch.equal(q.decompress(), quantize_q40(stack.mT.contiguous()).decompress().mT)


@pytest.mark.parametrize("codecs", [None, (), (Lzma(),), (NibblePacking(), Lzma())], ids=str)
def test_every_copy_is_packed_and_bit_identical(codecs, tmp_path):
    fp = weight(*SHAPE)
    found = quantize_q40(fp.mT).transposed()
    q = QTensorTractTransposed(fp, found.qscheme, torch.float16, codecs)
    q.nnef_name = "w"
    assert torch.equal(q.decompress(), found.half().decompress())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(q.planes(), found.planes(), strict=True))
    buffer = io.BytesIO()
    torch.save({"w": q}, buffer)
    buffer.seek(0)
    save_safetensors({"w": q, "tied": q.detach()}, tmp_path / "w.safetensors")
    loaded = load_safetensors(tmp_path / "w.safetensors")
    copies = {
        "clone": q.clone(), "detach": q.detach(), "deepcopy": copy.deepcopy(q), "pickle": pickle.loads(pickle.dumps(q)),
        "torch.save": torch.load(buffer, weights_only=True)["w"], "safetensors": loaded["w"], "tied": loaded["tied"],
        "float": q.float().half(), "contiguous": q.contiguous(),
        "parameter": nn.Parameter(q, requires_grad=False), "device": q.to_device("cpu"),
    }  # fmt: skip
    for how, other in copies.items():
        assert type(other) is QTensorTractTransposed, how
        assert other.is_identical(q), how
        assert (tuple(other.shape), other.dtype, other.nnef_name) == (SHAPE, torch.float16, "w"), how


def test_in_a_module(q):
    layer, x = Conv1D(q), weight(3, 64, seed=1).requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer(x), x @ q.decompress())
    assert torch.equal(x.grad, q.decompress().sum(1).expand(3, 64))
    twin = Conv1D(quantize_q40(weight(*SHAPE, seed=2).mT).transposed())
    twin.load_state_dict(layer.state_dict())
    assert twin.weight.is_identical(q)
    assert layer.half().weight.dtype == torch.float16
    with pytest.raises(T2NErrorMisuse):
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="assign=True"):
        Conv1D(quantize_q40(weight(64, 64)).transposed()).load_state_dict({"weight": quantize_q40(weight(64, 64))})


def test_any_function_runs_on_the_value(q):
    assert torch.equal(torch.cat([q, q]), torch.cat([q.decompress()] * 2))
    assert torch.equal(q.view(-1), q.decompress().view(-1))
    assert torch.equal(q.t(), q.decompress().t())


def test_export_and_compile_trace_through(q):
    layer, x = Conv1D(q), weight(3, 64)
    program = torch.export.export(layer, (x,), strict=False)
    assert isinstance(program.state_dict["weight"], QTensorTractTransposed)
    assert torch.equal(program.module()(x), layer(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_the_file_is_that_of_the_transpose(q, tmp_path):
    stored = quantize_q40(weight(*SHAPE).mT.contiguous())
    expected = stored.write_in_file(tmp_path, "stored").read_bytes()
    assert q.write_in_file(tmp_path, "w").read_bytes() == expected
    assert export_tensors_to_nnef({"listed": q}, tmp_path)[0].read_bytes() == expected
    assert read_dat(tmp_path / "w.dat")[1] == [48, 64]


def test_weight_error_is_that_of_the_transpose(q, monkeypatch):
    fp = weight(*SHAPE)
    whole = weight_error(fp, q)
    assert whole == weight_error(fp.mT, q.stored)
    monkeypatch.setattr("torch_to_nnef.tensor.chunks.flat_chunks.__defaults__", (1, 100))
    assert weight_error(fp, q) == pytest.approx(whole)


def test_what_it_cannot_hold():
    scheme = quantize_q40(weight(64, 48).mT).qscheme
    with pytest.raises(T2NErrorImpossibleQuantization, match="48 elements a row"):
        QTensorTractTransposed(weight(48, 64), scheme)
    with pytest.raises(T2NErrorImpossibleQuantization, match="no transpose"):
        QTensorTractTransposed(weight(64), scheme)
    with pytest.raises(T2NErrorInconsistentTensor):
        QTensorTractTransposed.from_packed(
            torch.zeros(8, dtype=torch.uint8), SHAPE, scheme, u8_compressors=(NibblePacking(),)
        )
    with pytest.raises(T2NErrorInvalidArgument, match="not name a file"):
        quantize_q40(weight(64, 64)).transposed().write_in_file("/tmp", "../w")
    assert type(quantize_q40(weight(64, 64)).transposed().stored) is QTensorTractScaleOnly
