"""Normalizations and attention beside those of the big table: more axes, half precision, statistics of the batch."""

import pytest
import torch
import torch.nn.functional as F
from rows import Row, check, flags, x

from torch_to_nnef.exceptions import T2NErrorNotImplemented

_B = {0: "B"}
_BH = {"args_0": {0: "B", 2: "H"}}
_LARGE = 300 * x(2, 4, 5).half()  # whose squares are beyond f16
_FIRST_ROW_MASKED = flags(4, 4) & (torch.arange(4)[:, None] > 0)


def attention(name, *shapes, axes=None, **kwargs):
    inputs = tuple(x(*shape, seed=i) for i, shape in enumerate(shapes))
    return Row(name, lambda *qkv: F.scaled_dot_product_attention(*qkv, **kwargs), inputs, axes or {})


ROWS = [
    Row("layer_norm_axes", lambda a, w, b: F.layer_norm(a, (4, 5), w, b), (x(2, 3, 4, 5), x(4, 5), x(4, 5)), {"args_0": {0: "B", 1: "S"}}),
    Row("layer_norm_weight_only", lambda a, w: F.layer_norm(a, (5,), w), (x(2, 4, 5), x(5)), {"args_0": _B}),
    Row("layer_norm_half", lambda a: F.layer_norm(a, (5,)), (_LARGE,), {"args_0": _B}),
    Row("rms_norm_axes", lambda a, w: F.rms_norm(a, (4, 5), w), (x(2, 3, 4, 5), x(4, 5)), {"args_0": {0: "B", 1: "S"}}),
    Row("rms_norm_half", lambda a: F.rms_norm(a, (5,)), (_LARGE,), {"args_0": _B}),
    Row("group_norm_half", lambda a: F.group_norm(a, 2), (_LARGE,), {"args_0": _B}),
    Row("native_layer_norm", lambda a: torch.native_layer_norm(a, (5,), None, None, 1e-5), (x(2, 4, 5),), {"args_0": _B}),
    Row("native_group_norm", lambda a, w: torch.native_group_norm(a, w, None, 2, 4, 5, 2, 1e-5), (x(2, 4, 5), x(4))),
    Row("instance_norm_kept", lambda a, m, v: F.instance_norm(a, m, v.abs(), use_input_stats=False), (x(2, 3, 5, 4), x(3), x(3)), _BH),
    Row("batch_norm_of_the_batch", lambda a, w: F.batch_norm(a, None, None, w, training=True), (x(2, 3, 5, 4), x(3)), _BH),
    Row("local_response_norm", lambda a: F.local_response_norm(a, 3), (x(2, 4, 5, 6),), _BH),
    attention("sdpa_3d", (2, 4, 8), (2, 5, 8), (2, 5, 6), axes={f"args_{i}": _B for i in range(3)}),
    attention("sdpa_5d_shared", (2, 3, 2, 4, 8), (2, 5, 8), (2, 5, 8), axes={"args_0": {0: "B", 3: "S"}}),
    attention("sdpa_causal_short", (2, 2, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), is_causal=True),
    Row("sdpa_half", lambda q: F.scaled_dot_product_attention(q, -q, q), (x(2, 2, 600, 64).half(),), {"args_0": _B}),
    Row("sdpa_masked_row", lambda q, m: F.scaled_dot_product_attention(q, q, q, m), (x(2, 3, 4, 8), _FIRST_ROW_MASKED), {"args_0": _B}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_norms_give_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


def test_batch_norm_that_updates_its_statistics_is_refused(tmp_path):
    def call(a, m, v):
        return F.batch_norm(a, m.clone(), v.clone().abs(), training=True)

    with pytest.raises(T2NErrorNotImplemented, match="training mode"):
        check(Row("training", call, (x(2, 3, 5), x(3), x(3))), tmp_path)
