"""Lossless means lossless."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from torch_to_nnef.exceptions import T2NErrorInconsistentTensor, T2NErrorInvalidArgument
from torch_to_nnef.tensor.quant import BitPacking, Huffman, Lzma, NibblePacking

SHAPES = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(st.just(n), arrays(np.uint8, SHAPES, elements=st.integers(0, 2**n - 1)))
    )
)
@settings(deadline=None)
def test_bit_packing_restores(case):
    n_bits, codes = case
    blob = BitPacking(n_bits).compress(torch.from_numpy(np.asarray(codes)))
    assert blob.numel() == 1 + 8 * codes.ndim + -(-codes.size // 8) * n_bits
    restored = BitPacking(n_bits).decompress(blob)
    assert restored.shape == codes.shape
    assert np.array_equal(restored.numpy(), codes)


@pytest.mark.parametrize("codec", [Lzma(), Lzma(preset=0), Huffman()])
@given(codes=arrays(np.uint8, SHAPES))
@settings(deadline=None, max_examples=50)
def test_entropy_codecs_restore(codec, codes):
    blob = codec.compress(torch.from_numpy(np.asarray(codes)))
    restored = codec.decompress(blob)
    assert (blob.dtype, blob.dim()) == (torch.uint8, 1)
    assert restored.shape == codes.shape
    assert np.array_equal(restored.numpy(), codes)


@given(arrays(np.uint8, st.integers(1, 9).map(lambda n: 32 * n), elements=st.integers(0, 15)))
@settings(deadline=None)
def test_nibbles_restore_in_gguf_order(codes):
    blob = NibblePacking().compress(torch.from_numpy(codes))
    assert torch.equal(NibblePacking().decompress(blob), torch.from_numpy(codes))
    for group, packed in zip(codes.reshape(-1, 32), blob.numpy().reshape(-1, 16), strict=True):
        assert [int(b) for b in packed] == [int(group[i]) | int(group[i + 16]) << 4 for i in range(16)]


def test_bit_packing_bytes():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    word = sum(c << (3 * i) for i, c in enumerate(codes.tolist()))
    assert bytes(BitPacking(3).compress(codes).tolist()) == b"\x01" + (8).to_bytes(8, "little") + word.to_bytes(
        3, "little"
    )


def test_entropy_codecs_are_worth_it():
    codes = torch.clamp(torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 2 + 8, 0, 15).to(torch.uint8)
    assert Huffman().compress(codes).numel() < 0.45 * codes.numel()
    assert Lzma().compress(torch.zeros(1 << 16, dtype=torch.uint8)).numel() < 300


@pytest.mark.parametrize("codec", [BitPacking(5), Lzma(), Huffman()])
def test_damaged_blobs_are_refused(codec):
    blob = codec.compress(torch.arange(32, dtype=torch.uint8).reshape(4, 8))
    bigger = blob.clone()
    bigger[1] += 1
    for damaged in (blob[:-9], blob[:3], blob[:0], bigger):
        with pytest.raises(T2NErrorInconsistentTensor):
            codec.decompress(damaged)


def test_codes_out_of_range_are_refused():
    for codec, codes in [(BitPacking(3), [8]), (NibblePacking(), [16] * 32), (NibblePacking(), [1] * 31)]:
        with pytest.raises(T2NErrorInvalidArgument):
            codec.compress(torch.tensor(codes, dtype=torch.uint8))
    with pytest.raises(T2NErrorInvalidArgument):
        BitPacking(9)
