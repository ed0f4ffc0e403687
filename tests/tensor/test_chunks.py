"""Chunks cover a tensor once, in order, and stay small."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_to_nnef.tensor.chunks import flat_chunks, rows_of
from torch_to_nnef.tensor.offload import OffloadedTensor, offload


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.data())
@settings(deadline=None)
def test_chunks_cover(rows, columns, max_elements, transposed, data):
    tensor = torch.arange(rows * columns).reshape(rows, columns)
    tensor = tensor.t() if transposed else tensor
    divisors = [d for d in range(1, tensor.numel() + 1) if tensor.numel() % d == 0]
    multiple = data.draw(st.sampled_from(divisors))
    pieces = list(flat_chunks(tensor, multiple, max_elements))
    assert torch.equal(torch.cat([values for _, values in pieces]), tensor.reshape(-1))
    position = 0
    for start, values in pieces:
        assert start == position
        assert values.is_contiguous()
        assert start % multiple == 0
        position += len(values)
    if tensor.is_contiguous():
        assert max(len(values) for _, values in pieces) <= max(max_elements, multiple)


def test_rows_of_each_matrix_in_a_stack():
    stack = torch.arange(4 * 5 * 3.0).reshape(4, 5, 3)
    rows = rows_of(stack, 1, 3)
    assert torch.equal(rows, stack[:, 1:3])
    assert rows.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
    on_disk = rows_of(offload(stack), 1, 3)
    assert isinstance(on_disk, OffloadedTensor)
    assert torch.equal(on_disk.load(), rows)
    assert torch.equal(rows_of(stack[0], 2, 5), stack[0, 2:])
