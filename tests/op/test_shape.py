"""Cuts, windows, diagonals, padding, views and creation, above all over dynamic axes."""

import pytest
import torch
from rows import BS, B, Row, check, flags, ids, unary, x
from torch.nn import functional as F


def interleaved(even, odd):
    both = torch.empty(even.shape[0], 8)
    both[:, ::2], both[:, 1::2] = even, odd
    return both


S = {1: "S"}
PADS = {"constant": (1, 2), "reflect": (2, 1), "replicate": (2, 1), "circular": (2, 1)}
ROWS = [
    Row("slice_step_end", lambda a: a[:, 1:5:2], (x(2, 9),), {"args_0": B}),
    Row("slice_step_dynamic", lambda a: (a[:, ::2], a[:, 1::3], a[:, :-1:2]), (x(2, 6),), {"args_0": BS}),
    Row("slice_half", lambda a: a[:, a.shape[1] // 2 :], (x(2, 6),), {"args_0": BS}),
    Row("slice_beyond", lambda a: a[:, -100:5] + a[:, :100], (x(2, 5),), {"args_0": B}),
    Row("slice_negative_step_end", lambda a: a[:, -4:-1:2], (x(2, 6),), {"args_0": B}),
    Row("narrow_from_end", lambda a: a.narrow(1, -3, 2), (x(2, 5),), {"args_0": B}),
    unary(lambda t: t.roll(2, 0), "roll_dynamic"),
    unary(lambda t: t.roll((-7, 3), (0, 1)), "roll_two"),
    unary(lambda t: t.roll(4), "roll_flat"),
    Row("roll_two_dynamic", lambda a: a.roll((1, -1), (1, 2)), (x(2, 4, 3),), {"args_0": {1: "H", 2: "W"}}),
    unary(lambda t: t.rot90(1, (0, 1)), "rot90"),
    Row("unfold", lambda a: a.unfold(1, 3, 2), (x(2, 7, 4),), {"args_0": B}),
    Row("unfold_dynamic", lambda a: a.unfold(-1, 2, 1), (x(2, 7),), {"args_0": {0: "B"}}),
    Row("unfold_frames", lambda a: F.pad(a, (4, 4)).unfold(-1, 4, 2), (x(2, 8),), {"args_0": BS}),
    Row("as_strided", lambda a: (a * 2).as_strided((2, 3), (1, 2), 1), (x(2, 5),)),
    Row("as_strided_frames", lambda a: F.pad(a, (2, 2)).as_strided((a.shape[0], 4), (1, 1)), (x(8),), {"args_0": {0: "T"}}),
    Row("diagonal", lambda a: (a.diagonal(1, 0, 2), a.diagonal(-1, 1, 2)), (x(3, 5, 4),), {"args_0": S}),
    Row("diagonal_dynamic", lambda a: a.diagonal(), (x(5, 5),), {"args_0": B}),
    Row("trace", lambda a: a.trace(), (x(5, 5),)),
    Row("diag_embed", lambda a: (a.diag_embed(), a.diag_embed(-1, 0, 2)), (x(3, 5),), {"args_0": BS}),
    Row("diag_vector", lambda a: a.diag(1), (x(5),), {"args_0": B}),
    Row("diagonal_scatter", lambda a, v: a.diagonal_scatter(v, 1), (x(4, 5), x(4))),
    *[Row(f"pad_{mode}_dynamic", lambda a, m=mode, p=pad: F.pad(torch.cat([a, a, a], -1), p, m), (x(2, 3, 4),), {"args_0": {0: "B", 2: "T"}}) for mode, pad in PADS.items()],
    *[Row(f"pad_{mode}_2d", lambda a, m=mode: F.pad(a, (1, 2, 2, 1), m), (x(2, 3, 4, 5),), {"args_0": B}) for mode in PADS],
    *[Row(f"pad_{mode}_3d", lambda a, m=mode: F.pad(a, (1, 0, 0, 1, 1, 1), m), (x(2, 3, 3, 4, 5),), {"args_0": B}) for mode in PADS],
    *[Row(f"pad_{mode}_negative", lambda a, m=mode: F.pad(a, (-1, 2), m), (x(2, 3, 5),), {"args_0": B}) for mode in PADS],
    Row("pad_replicate_cut_away", lambda a: F.pad(a, (-3, 1), "replicate"), (x(2, 3, 3),), {"args_0": B}),
    Row("pad_inf", lambda a: F.pad(a, (1, 2), value=float("-inf")), (x(2, 3),), {"args_0": BS}),
    Row("pad_large_int", lambda a: F.pad(a, (1, 2), value=2**40 + 1), (ids(2, 3),), {"args_0": BS}),
    Row("pad_bool", lambda a: F.pad(a, (1, 2), value=True), (flags(2, 3),), {"args_0": BS}),
    Row("pad_by_size", lambda a, b: F.pad(a, (1, b.shape[0])), (x(2), x(6)), {"args_1": {0: "T"}}),
    Row("pixel_shuffle", lambda a: F.pixel_unshuffle(F.pixel_shuffle(a, 2) * 2, 2), (x(2, 8, 3, 4),), {"args_0": {0: "B", 2: "H", 3: "W"}}),
    Row("channel_shuffle", lambda a: F.channel_shuffle(a, 2), (x(2, 4, 3, 5),), {"args_0": {0: "B", 2: "H"}}),
    Row("expand_dynamic", lambda a, b: a.expand(-1, b.shape[0]), (x(2, 1), x(3)), {"args_0": B, "args_1": {0: "S"}}),
    Row("repeat_dynamic", lambda a, b: a.repeat(b.shape[0], 1), (x(2, 3), x(4)), {"args_0": B, "args_1": {0: "S"}}),
    Row("tile", lambda a: a.tile(2), (x(2, 3),), {"args_0": BS}),
    Row("repeat_interleave", lambda a: a.repeat_interleave(2, 0), (x(2, 3),), {"args_0": BS}),
    Row("repeat_interleave_flat", lambda a: a.repeat_interleave(3), (x(2, 3),), {"args_0": BS}),
    Row("meshgrid", lambda a, b: torch.meshgrid(a, b, indexing="xy"), (x(3), x(4)), {"args_0": B, "args_1": {0: "S"}}),
    Row("cartesian_prod", torch.cartesian_prod, (x(3), x(4))),
    Row("tensor_split", lambda a: a.tensor_split(3, 1), (x(2, 7),), {"args_0": B}),
    Row("movedim", lambda a: a.movedim(0, -1).flatten(0, 1), (x(2, 3, 4),), {"args_0": BS}),
    Row("tril_dynamic", lambda a: a.tril(-1), (x(3, 4),), {"args_0": BS}),
    Row("tril_indices", lambda a: a[torch.tril_indices(4, 4)[0]], (x(4, 3),), {"args_0": S}),
    Row("eye", lambda a: a @ torch.eye(a.shape[1]), (x(3, 4),), {"args_0": BS}),
    Row("linspace", lambda a: a * torch.linspace(0.5, 2, 4) + torch.logspace(0, 1, 4), (x(3, 4),), {"args_0": B}),
    Row("arange_strided", lambda a: a + torch.arange(0, 2 * a.shape[1], 2), (x(2, 4),), {"args_0": BS}),
    Row("arange_down", lambda a: a + torch.arange(a.shape[1] - 1, -1, -1), (x(2, 4),), {"args_0": BS}),
    Row("arange_float", lambda a: a + torch.arange(a.shape[1], dtype=torch.float32) / a.shape[1], (x(2, 4),), {"args_0": BS}),
    Row("empty_written", interleaved, (x(3, 4), x(3, 4)), {"args_0": B, "args_1": B}),
    Row("one_hot", lambda i: F.one_hot(i, 5), (ids(2, 3),), {"args_0": BS}),
    Row("truncation", lambda a: a.to(torch.int32) + a.to(torch.int8), (x(2, 3) * 3,), {"args_0": B}),
    Row("float_to_bool", lambda a: a.bool(), (x(2, 3).round(),), {"args_0": B}),
    Row("nan_to_bool", lambda a: (a / a).bool(), (torch.tensor([0.0, 1.0]),), {"args_0": B}),
    Row("searchsorted", lambda a, v: torch.searchsorted(a.sort(-1).values, v), (x(2, 5), x(2, 3)), {"args_1": {1: "T"}}),
    Row("bucketize", lambda v: torch.bucketize(v, torch.tensor([0, 2, 3]), right=True, out_int32=True), (ids(2, 3),), {"args_0": BS}),
    Row("nonzero_static", lambda a: torch.nonzero_static(a, size=7, fill_value=-5), (flags(2, 5),), {"args_0": BS}),
    Row("combinations", lambda a: torch.combinations(a, 2), (x(5),)),
    Row("isin", lambda a: torch.isin(a, torch.tensor([1, 3]), invert=True), (ids(2, 3),), {"args_0": BS}),
    *[Row(f"embedding_bag_{mode}", lambda i, w, m=mode: F.embedding_bag(i, w, mode=m), (ids(2, 3), x(5, 4)), {"args_0": B}) for mode in ("sum", "mean", "max")],
    Row("embedding_bag_offsets", lambda i, w, s: F.embedding_bag(i, w, torch.tensor([0, 2, 2]), mode="sum", per_sample_weights=s), (ids(4), x(5, 4), x(4))),
    *[Row(f"embedding_bag_padded_{mode}", lambda i, w, m=mode: F.embedding_bag(i, w, mode=m, padding_idx=-2), (ids(2, 3), x(5, 4)), {"args_0": B}) for mode in ("mean", "max")],
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_op_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)
