"""Pooling: windows rounded up, positions of the largest, windows of uneven sizes, and the way back."""

import pytest
import torch.nn.functional as F
from rows import Row, check, x

from torch_to_nnef.exceptions import T2NErrorNotImplemented

_2D = x(2, 3, 9, 8)
_ANY = {"args_0": {0: "B", 2: "H", 3: "W"}}
_BOTH = {**_ANY, "args_1": {2: "P", 3: "Q"}}
_BATCH = {"args_0": {0: "B"}}


def round_trip(pool, unpool, **kwargs):
    def call(a):
        values, indices = pool(a, 2, return_indices=True, **kwargs)
        return unpool(values, indices, 2, output_size=a.shape[2:])

    return call


ROWS = [
    Row("max_pool2d_ceil", lambda a: F.max_pool2d(a, 2, 2, ceil_mode=True), (_2D,), _ANY),
    Row("max_pool2d_ceil_padded", lambda a: F.max_pool2d(a, 3, 2, 1, ceil_mode=True), (_2D,), _ANY),
    Row("max_pool2d_ceil_dropped", lambda a: F.max_pool2d(a, 2, 3, 1, ceil_mode=True), (_2D,), _BATCH),
    Row("max_pool2d_unbatched", lambda a: F.max_pool2d(a, 2), (x(3, 9, 8),), {"args_0": {0: "C", 1: "H"}}),
    Row("max_pool1d_ceil", lambda a: F.max_pool1d(a, 3, 2, ceil_mode=True), (x(2, 4, 9),), {"args_0": {0: "B", 2: "T"}}),
    Row("max_pool2d_indices", lambda a: F.max_pool2d(a, 3, 2, 1, return_indices=True), (_2D,), _ANY),
    Row("max_pool2d_indices_of_ties", lambda a: F.max_pool2d(a.round(), 3, 2, 1, 2, return_indices=True), (_2D,), _ANY),
    Row("max_pool3d_indices", lambda a: F.max_pool3d(a, 2, return_indices=True), (x(2, 3, 4, 5, 6),), _ANY),
    Row("max_pool1d_indices", lambda a: F.max_pool1d(a, 2, return_indices=True), (x(2, 4, 9),), {"args_0": {0: "B", 2: "T"}}),
    Row("max_pool2d_int", lambda a: F.max_pool2d((a * 9).long(), 2), (_2D,), _ANY),
    Row("max_pool2d_dynamic_channels", lambda a: F.max_pool2d(a, 2), (_2D,), {"args_0": {0: "B", 1: "C"}}),
    Row("avg_pool2d_ceil_counted", lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True), (_2D,), _ANY),
    Row("avg_pool2d_ceil_not_counted", lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True, count_include_pad=False), (_2D,), _ANY),
    Row("avg_pool2d_ceil_dropped", lambda a: F.avg_pool2d(a, 2, 3, 1, ceil_mode=True), (_2D,), _BATCH),
    Row("avg_pool2d_divisor", lambda a: F.avg_pool2d(a, 3, 2, 1, divisor_override=5), (_2D,), _ANY),
    Row("avg_pool3d", lambda a: F.avg_pool3d(a, 2, (1, 2, 1), 1), (x(2, 3, 4, 5, 6),), _ANY),
    Row("avg_pool1d_unbatched", lambda a: F.avg_pool1d(a, 3), (x(4, 9),), {"args_0": {1: "T"}}),
    Row("lp_pool2d", lambda a: F.lp_pool2d(a, 2.0, 3, 2), (_2D,), _ANY),
    Row("adaptive_avg_pool2d_uneven", lambda a: F.adaptive_avg_pool2d(a, (4, 5)), (_2D,), _BATCH),
    Row("adaptive_avg_pool2d_larger", lambda a: F.adaptive_avg_pool2d(a, (12, 8)), (_2D,), _BATCH),
    Row("adaptive_avg_pool2d_dynamic", lambda a: F.adaptive_avg_pool2d(a, (3, 2)), (_2D,), _ANY),
    Row("adaptive_avg_pool2d_dynamic_many", lambda a: F.adaptive_avg_pool2d(a, (5, 7)), (_2D,), _ANY),
    Row("adaptive_avg_pool2d_like", lambda a, b: F.adaptive_avg_pool2d(a, b.shape[2:]), (_2D, x(1, 1, 5, 3)), _BOTH),
    Row("adaptive_max_pool2d_dynamic_many", lambda a: F.adaptive_max_pool2d(a, (5, 7)), (_2D,), _ANY),
    Row("adaptive_avg_pool3d", lambda a: F.adaptive_avg_pool3d(a, (2, None, 4)), (x(2, 3, 4, 5, 6),), _BATCH),
    Row("adaptive_max_pool2d_uneven", lambda a: F.adaptive_max_pool2d(a, (4, 5), return_indices=True), (_2D,), _BATCH),
    Row("adaptive_max_pool2d_even", lambda a: F.adaptive_max_pool2d(a, (3, 4), return_indices=True), (_2D,), _BATCH),
    Row("adaptive_max_pool2d_one", lambda a: F.adaptive_max_pool2d(a, 1, return_indices=True), (_2D,), _ANY),
    Row("adaptive_max_pool1d_dynamic", lambda a: F.adaptive_max_pool1d(a, 3), (x(2, 4, 9),), {"args_0": {0: "B", 2: "T"}}),
    Row("max_unpool1d", round_trip(F.max_pool1d, F.max_unpool1d), (x(2, 4, 9),), _BATCH),
    Row("max_unpool2d", round_trip(F.max_pool2d, F.max_unpool2d), (_2D,), _ANY),
    Row("max_unpool3d", round_trip(F.max_pool3d, F.max_unpool3d), (x(2, 3, 4, 5, 6),), _BATCH),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_pooling_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


@pytest.mark.parametrize(
    ("function", "axes", "reason"),
    [
        (lambda a: F.max_pool2d(a, 1, 3, ceil_mode=True), _ANY, "stride this large"),
        (lambda a: F.avg_pool2d((a * 9).long(), 2), _BATCH, "pooling of integers"),
        (lambda a: F.adaptive_max_pool2d(a, (3, 2), return_indices=True), _ANY, "no lowering"),
    ],
    ids=["ceil_mode", "integers", "dynamic_indices"],
)
def test_pooling_that_tract_cannot_do_is_refused(function, axes, reason, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=reason):
        check(Row("refused", function, (_2D,), axes), tmp_path)
