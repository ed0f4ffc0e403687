"""Interpolation by every mode, to sizes and by factors, static and dynamic."""

import pytest
import torch.nn.functional as F
from rows import Row, check, x

from torch_to_nnef.exceptions import T2NErrorNotImplemented

_2D = x(2, 3, 9, 8)
_ANY = {"args_0": {0: "B", 2: "H", 3: "W"}}
_BOTH = {**_ANY, "args_1": {2: "P", 3: "Q"}}
_BATCH = {"args_0": {0: "B"}}
_SMOOTH = [("bilinear", False), ("bilinear", True), ("bicubic", False), ("bicubic", True)]


def resized(name, axes, inputs=_2D, **kwargs):
    return Row(name, lambda a: F.interpolate(a, **kwargs), (inputs,), axes)


def like(mode, align_corners=None):
    """To the size of another tensor, which is not in proportion."""
    return lambda a, b: F.interpolate(a, size=b.shape[-2:], mode=mode, align_corners=align_corners)


ROWS = [
    *[resized(f"{mode}_{corners}_size", _BATCH, size=(5, 12), mode=mode, align_corners=corners) for mode, corners in _SMOOTH],
    *[resized(f"{mode}_{corners}_whole_factor", _ANY, scale_factor=2, mode=mode, align_corners=corners) for mode, corners in _SMOOTH],
    *[resized(f"{mode}_{corners}_factor", _ANY, scale_factor=(1.5, 0.5), mode=mode, align_corners=corners) for mode, corners in _SMOOTH],
    *[Row(f"{mode}_{corners}_like", like(mode, corners), (_2D, x(1, 1, 5, 12)), _BOTH) for mode, corners in _SMOOTH],
    *[resized(f"{mode}_antialias", _BATCH, size=(4, 11), mode=mode, antialias=True) for mode in ("bilinear", "bicubic")],
    *[resized(f"{mode}_size", _BATCH, size=(5, 12), mode=mode) for mode in ("nearest", "nearest-exact", "area")],
    *[resized(f"{mode}_whole_factor", _ANY, scale_factor=3, mode=mode) for mode in ("nearest", "nearest-exact")],
    *[resized(f"{mode}_factor", _ANY, scale_factor=(1.5, 0.5), mode=mode) for mode in ("nearest", "nearest-exact")],
    *[Row(f"{mode}_like", like(mode), (_2D, x(1, 1, 5, 12)), _BOTH) for mode in ("nearest", "nearest-exact")],
    # 1 / 49 rounds down in f32, so torch takes input 0 once more than 49 times
    resized("nearest_inexact_factor", {"args_0": {0: "B", 2: "T"}}, x(1, 2, 5), scale_factor=49.0),
    resized("linear_down", {"args_0": {0: "B", 2: "T"}}, x(2, 3, 8), scale_factor=0.25, mode="linear"),
    resized("trilinear", _BATCH, x(2, 3, 4, 5, 6), size=(3, 10, 7), mode="trilinear"),
    resized("trilinear_half", _BATCH, x(2, 3, 4, 5, 6).half(), size=(3, 10, 7), mode="trilinear"),
    resized("recomputed_factor", _ANY, scale_factor=1.5, mode="bilinear", recompute_scale_factor=True),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_resizing_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


def test_antialiasing_of_a_dynamic_axis_is_refused(tmp_path):
    row = resized("antialias", _ANY, scale_factor=0.5, mode="bilinear", antialias=True)
    with pytest.raises(T2NErrorNotImplemented, match="antialiasing of a dynamic axis"):
        check(row, tmp_path)
