"""Looking up and writing: advanced indexing, gathers, scatters, embeddings of bags."""

import pytest
import torch
from rows import BS, B, Row, check, flags, ids, x
from torch import nn

from torch_to_nnef import TractModel, export_model_to_nnef, quantize_and_verify
from torch_to_nnef.inference_target import TractNNEF

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")


def assigned(tensor, value, *where):
    """A copy with tensor[where] = value."""
    copy = tensor.clone()
    copy[where] = value
    return copy


ALL = slice(None)
ROWS = [
    Row("index_behind_full_axis", lambda a, i, j: a[:, i, j], (x(2, 5, 5, 3), ids(3), ids(2, 3)), {"args_0": B, "args_1": {0: "S"}, "args_2": {1: "S"}}),
    Row("index_gap", lambda a, i, j: a[i, :, j], (x(5, 4, 5), ids(3), ids(3)), {"args_0": {1: "B"}, "args_1": {0: "S"}, "args_2": {0: "S"}}),
    Row("index_gap_behind", lambda a, i, j: a[:, i, :, j], (x(2, 5, 3, 5), ids(3), ids(2, 1)), {"args_0": BS | {1: "V"}}),
    Row("index_negative_pair", lambda a, i: a[i - 5, i - 2], (x(5, 5, 2), ids(3)), {"args_1": B}),
    Row("index_negative_dynamic", lambda a, i: a[:, i - 5], (x(2, 5), ids(3)), {"args_0": B, "args_1": {0: "S"}}),
    Row("index_by_arange", lambda a, i: a[torch.arange(a.shape[0]), i], (x(3, 5), ids(3)), {"args_0": B, "args_1": B}),
    Row("index_scalar_tensor", lambda a, i: a[:, i.sum()[None] * 0 + 1], (x(3, 5), ids(3)), {"args_0": B}),
    Row("index_put", lambda a, i, v: a.index_put((i,), v), (x(5, 4), torch.tensor([3, 0, 2]), x(3, 4)), {"args_0": {1: "S"}, "args_2": {1: "S"}}),
    Row("index_put_negative_pair", lambda a, v: a.index_put((torch.tensor([-1, 0]), torch.tensor([1, -2])), v), (x(5, 4, 3), x(2, 1)), {"args_0": {2: "S"}}),
    Row("index_put_behind_full_axis", lambda a, v: assigned(a, v, ALL, torch.tensor([1, 3]), torch.tensor([0, 2])), (x(2, 5, 4, 3), x(2, 2, 3)), {"args_0": B, "args_1": B}),
    Row("index_put_gap", lambda a, v: assigned(a, v, torch.tensor([1, 3]), ALL, torch.tensor([0, 2])), (x(5, 2, 4), x(2, 2)), {"args_0": {1: "B"}, "args_1": {1: "B"}}),
    Row("index_put_accumulate", lambda a, i, v: a.index_put((i,), v, accumulate=True), (x(5, 4), ids(7), x(7, 4)), {"args_1": B, "args_2": B}),
    Row("index_put_accumulate_bool", lambda a, i, v: a.index_put((i,), v, accumulate=True), (flags(5), ids(7), flags(7)), {"args_1": B, "args_2": B}),
    Row("index_put_in_place", lambda a: a.clone().index_put_((torch.tensor([1]),), torch.tensor(7.0)) + a, (x(5, 4),), {"args_0": {1: "S"}}),
    Row("mask_assigned", lambda a, m: assigned(a, 3.0, m), (x(3, 4), flags(3, 4)), {"args_0": BS, "args_1": BS}),
    Row("mask_of_rows_assigned", lambda a, m, v: assigned(a, v, m), (x(3, 4), flags(3), x(4)), {"args_0": B, "args_1": B}),
    Row("mask_behind_accumulated", lambda a, m: torch.ops.aten.index_put(a, [None, m], torch.ones(1), True), (x(2, 3, 4), flags(3)), {"args_0": B}),
    Row("index_add", lambda a, i, v: a.index_add(0, i, v, alpha=0.5), (x(5, 4), ids(7), x(7, 4)), {"args_1": B, "args_2": B}),
    Row("index_copy", lambda a, v: a.index_copy(1, torch.tensor([2, 0]), v), (x(3, 4), x(3, 2)), {"args_0": B, "args_1": B}),
    Row("index_fill", lambda a: a.index_fill(-1, torch.tensor([2, 0]), 1.5), (x(3, 4),), {"args_0": B}),
    Row("index_fill_negative", lambda a: a.index_fill(1, torch.tensor([-1]), -1.0), (x(3, 4),), {"args_0": BS}),
    Row("index_reduce_mean", lambda a, i, v: a.index_reduce(0, i, v, "mean"), (x(5, 4), ids(7), x(7, 4)), {"args_1": B, "args_2": B}),
    Row("index_reduce_mean_int", lambda a, i, v: a.index_reduce(0, i, v - 9, "mean", include_self=False), (ids(5, 4), ids(7), ids(7, 4)), {"args_1": B, "args_2": B}),
    Row("scatter", lambda a, i, v: a.scatter(1, i, v), (x(3, 5), ids(3, 1), x(3, 2)), {"args_0": B, "args_1": B, "args_2": B}),
    Row("scatter_value", lambda a, i: a.scatter(-1, i, 2.0), (x(3, 5), ids(3, 2)), {"args_0": B, "args_1": {0: "B", 1: "S"}}),
    Row("scatter_add", lambda a, i, v: a.scatter_add(0, i, v), (x(5, 4), ids(7, 4), x(7, 4)), {"args_1": B, "args_2": B}),
    *[
        Row(f"scatter_reduce_{reduce}_{own}", lambda a, i, v, r=reduce, o=own: a.scatter_reduce(0, i, v, r, include_self=o), (x(5, 4), ids(7, 4), x(7, 4)), {"args_1": B, "args_2": B})
        for reduce in ("sum", "prod", "mean", "amax", "amin") for own in (True, False)
    ],
    Row("scatter_reduce_int", lambda a, i, v: a.scatter_reduce(0, i, v, "amax", include_self=False), (ids(5), ids(7), ids(7) - 9), {"args_1": B, "args_2": B}),
    Row("scatter_reduce_bool", lambda a, i, v: a.scatter_reduce(0, i, v, "prod"), (flags(5), ids(7), flags(7)), {"args_1": B, "args_2": B}),
    Row("put", lambda a, v: a.put(torch.tensor([-1, 3]), v), (x(3, 5), x(2)), {"args_0": BS}),
    Row("put_accumulate", lambda a, i, v: a.put(i, v, accumulate=True), (x(3, 5), ids(7), x(7)), {"args_1": B, "args_2": B}),
    Row("take", lambda a, i: a.take(i - 3), (x(3, 5), ids(2, 3)), {"args_0": BS, "args_1": {0: "T"}}),
    Row("take_along_dim", lambda a, i: torch.take_along_dim(a, i, 1), (x(3, 5), ids(1, 2))),
    Row("take_along_dim_flat", lambda a, i: torch.take_along_dim(a, i), (x(3, 5), ids(2, 2)), {"args_0": BS}),
    Row("argsort_taken", lambda a: torch.take_along_dim(a, a.argsort(-1), -1), (x(3, 5),)),
    Row("masked_scatter", lambda a, m, v: a.masked_scatter(m, v), (x(3, 4), flags(4), x(12)), {"args_0": B, "args_2": {0: "T"}}),
    Row("slice_scatter", lambda a, v: a.slice_scatter(v, 1, 1, -1), (x(3, 6), x(3, 4)), {"args_0": B, "args_1": B}),
    Row("slice_scatter_step", lambda a, v: a.slice_scatter(v, 0, 1, None, 2), (x(6, 4), x(3, 4)), {"args_0": {1: "S"}, "args_1": {1: "S"}}),
    Row("slice_scatter_dynamic", lambda a: a.slice_scatter(a[:, 1:] * 2, 1, 1), (x(3, 6),), {"args_0": {1: "S"}}),
    Row("select_scatter", lambda a, v: a.select_scatter(v, 1, -1) + a.select_scatter(v, 1, 0), (x(3, 6), x(3)), {"args_0": BS, "args_1": B}),
    Row("gather_shorter", lambda a, i: a.gather(0, i), (x(5, 4, 3), ids(2, 3, 1)), {"args_0": {2: "S"}, "args_1": B}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_op_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


class Tied(nn.Module):
    """Scores of all words after one: rows of a table go in, products with the same table come out."""

    def __init__(self, words, width):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids) + 1)


@pytest.mark.parametrize(("words", "gathers"), [(4000, 2), (50, 1)])
def test_a_large_table_is_cut_for_one_reader_so_that_the_other_has_it_beforehand(words, gathers, tmp_path):
    """tract lays out a constant of more than 4 MiB again at each run if it has two readers; the price is a second copy."""
    model, path = Tied(words, 270), tmp_path / "tied.nnef"
    target = TractNNEF.latest(dynamic_axes={"ids": {1: "S"}})
    export_model_to_nnef(model, torch.tensor([[0, 7, words - 1]]), path, target, compression_level=None)
    text, nbytes = (path / "graph.nnef").read_text(), model.table.weight.nbytes
    assert text.count("tract_core_gather(") == gathers
    assert TractModel.load(path).weight_bytes > 1.98 * nbytes  # one to look up in, one as kernels want it
    assert sum(file.stat().st_size for file in path.iterdir()) < 1.01 * nbytes + 2000


def test_a_packed_table_stays_whole(tmp_path):
    report = quantize_and_verify(
        Tied(4000, 288), ids(1, 3, high=4000), tmp_path / "tied.nnef", method="min_max_q4_0_all"
    )
    assert report.ok
    assert (tmp_path / "tied.nnef" / "graph.nnef").read_text().count("tract_core_gather(") == 1
