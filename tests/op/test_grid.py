"""Sampling on grids: every mode, padding and corner rule, also far outside of the input."""

import itertools

import pytest
import torch.nn.functional as F
from rows import Row, check, x

_IMAGE, _VOLUME = x(2, 3, 5, 6), x(2, 3, 4, 5, 6)
_POINTS = 1.5 * x(2, 4, 7, 2, seed=1)
_AXES = {"args_0": {0: "B", 2: "H", 3: "W"}, "args_1": {0: "B", 1: "P", 2: "Q"}}


def sampled(mode, padding, corners, inputs=(_IMAGE, _POINTS), axes=_AXES):
    name = f"{mode}_{padding}_{corners}_{inputs[0].dim() - 2}d"
    return Row(name, lambda a, g: F.grid_sample(a, g, mode, padding, corners), inputs, axes)


def affine(name, *size, corners=False):
    rank = len(size) - 2
    return Row(name, lambda t: F.affine_grid(t, (t.shape[0], *size[1:]), corners), (x(size[0], rank, rank + 1),))


_PADDINGS = ("zeros", "border", "reflection")
ROWS = [
    *[sampled(*c) for c in itertools.product(("bilinear", "nearest", "bicubic"), _PADDINGS, (False, True))],
    *[
        sampled(*c, inputs=(_VOLUME, 1.5 * x(2, 2, 3, 4, 3, seed=1)), axes={"args_0": {0: "B"}, "args_1": {0: "B"}})
        for c in itertools.product(("bilinear", "nearest"), _PADDINGS, (False, True))
    ],
    affine("affine", 2, 3, 4, 5),
    affine("affine_corners", 2, 3, 4, 5, corners=True),
    affine("affine_volume", 2, 3, 4, 5, 6),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_grids_give_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)
