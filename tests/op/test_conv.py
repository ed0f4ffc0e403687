"""Convolutions, their transposes, and windows as columns (unfold, fold)."""

import pytest
import torch.nn.functional as F
from rows import Row, check, x

from torch_to_nnef.exceptions import T2NErrorNotImplemented

_SIGNAL, _IMAGE, _VOLUME = x(2, 4, 9), x(2, 4, 5, 6), x(2, 2, 4, 5, 6)
_BT = {"args_0": {0: "B", 2: "T"}}
_ANY = {"args_0": {0: "B", 2: "H", 3: "W"}}
_BATCH = {"args_0": {0: "B"}}


def transposed(name, function, inputs, weight, axes, **kwargs):
    return Row(name, lambda a, w: function(a, w, **kwargs), (inputs, weight), axes)


ROWS = [
    Row("conv1d_valid", lambda a, w: F.conv1d(a, w, padding="valid", stride=3), (_SIGNAL, x(6, 4, 3)), _BT),
    Row("conv1d_same_dilated", lambda a, w: F.conv1d(a, w, padding="same", dilation=2), (_SIGNAL, x(6, 4, 4)), _BT),
    Row("conv2d_unbatched", lambda a, w, b: F.conv2d(a, w, b, padding=1), (x(4, 5, 6), x(3, 4, 3, 3), x(3)), {"args_0": {1: "H"}}),
    Row("conv3d_strided", lambda a, w: F.conv3d(a, w, stride=(1, 2, 2), dilation=(2, 1, 1)), (_VOLUME, x(3, 2, 2, 2, 3)), _BT),
    Row("conv2d_half", lambda a, w: F.conv2d(a, w), (x(2, 64, 5, 6).half(), x(8, 64, 3, 3).half() / 24), _ANY),
    transposed("longer_than_cropped", F.conv_transpose1d, _SIGNAL, x(4, 6, 3), _BT, stride=3, output_padding=2),
    transposed("longer_than_kernel", F.conv_transpose1d, _SIGNAL, x(4, 6, 1), _BT, stride=2, output_padding=1),
    transposed("longer_by_dilation", F.conv_transpose1d, _SIGNAL, x(4, 6, 2), _BT, dilation=4, output_padding=3),
    transposed("longer_and_cropped", F.conv_transpose2d, _IMAGE, x(4, 3, 3, 3), _ANY, stride=(3, 2), padding=(1, 0), output_padding=(2, 1)),
    transposed("unbatched", F.conv_transpose2d, x(4, 5, 6), x(4, 3, 3, 3), {"args_0": {1: "H"}}, stride=2),
    transposed("grouped", F.conv_transpose1d, _SIGNAL, x(4, 2, 3), _BT, groups=4, stride=2),
    transposed("volume", F.conv_transpose3d, _VOLUME, x(2, 3, 2, 3, 2), _BATCH, stride=(1, 2, 2), padding=1, output_padding=(0, 1, 0)),
    transposed("half", F.conv_transpose2d, x(2, 64, 5, 6).half(), x(64, 3, 3, 3).half() / 24, _ANY, stride=2),
    Row("unfold", lambda a: F.unfold(a, (2, 3), padding=1, stride=2), (_IMAGE,), _ANY),
    Row("unfold_dilated", lambda a: F.unfold(a, 2, dilation=2), (x(4, 5, 6),), {"args_0": {0: "C", 1: "H", 2: "W"}}),
    Row("fold", lambda a: F.fold(a, (5, 6), (2, 3), padding=1, stride=2), (x(2, 24, 9),), _BATCH),
    Row("fold_not_filled", lambda a: F.fold(a, (6, 7), 2, stride=3), (x(2, 8, 4),), _BATCH),
    Row("unfold_fold", lambda a: F.fold(F.unfold(a, 3), a.shape[2:], 3), (_IMAGE,), _ANY),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_convolutions_give_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


@pytest.mark.parametrize(
    ("function", "inputs", "axes", "reason"),
    [
        (F.conv1d, ((_SIGNAL * 9).long(), (x(6, 4, 3) * 9).long()), {}, "convolution of integers"),
        (F.conv_transpose1d, ((_SIGNAL * 9).long(), (x(4, 6, 3) * 9).long()), {}, "convolution of integers"),
        (lambda a: F.fold(F.unfold(a, 2, stride=2), a.shape[2:], 2, stride=2), (_IMAGE,), _ANY, "may not fill"),
    ],
    ids=["integers", "transposed_integers", "fold_dynamic"],
)
def test_convolutions_that_tract_cannot_do_are_refused(function, inputs, axes, reason, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=reason):
        check(Row("refused", function, inputs, axes), tmp_path)
