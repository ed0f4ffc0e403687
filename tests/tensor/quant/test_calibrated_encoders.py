"""`quantize_q40_weighted` and `quantize_q40_hessian`: by their own measure never worse than encoders that know nothing of inputs."""

import pytest
import torch

from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorInvalidArgument
from torch_to_nnef.tensor.quant import QTensorTractScaleOnly, quantize_q40
from torch_to_nnef.tensor.quant.calibrated import quantize_q40_hessian, quantize_q40_weighted


def _inputs(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated, and of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 2, width, generator=torch.Generator().manual_seed(9))
    x = torch.randn(count, width // 2, generator=draw) @ mix + 0.5 * torch.randn(count, width, generator=draw)
    return x * torch.linspace(-2, 2, width).exp()


def _weight(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _costs(weight: torch.Tensor, packed: QTensorTractScaleOnly, hessian: torch.Tensor) -> torch.Tensor:
    """`e H e^T` of each row, in f64."""
    e = (packed.decompress().double() - weight.double()).reshape(-1, hessian.shape[-1])
    return ((e @ hessian.double()) * e).sum(1)


def test_of_what_a_weight_computes_little_is_lost():
    x, unseen, weight = _inputs(1024, 128), _inputs(1024, 128, seed=5), _weight(96, 128)
    hessian = x.T @ x / len(x)

    def lost(packed):
        return float((unseen @ (packed.decompress() - weight).T).square().mean())

    search = lost(quantize_q40(weight))
    weighted = lost(quantize_q40_weighted(weight, hessian.diagonal()))
    full = lost(quantize_q40_hessian(weight, hessian))
    assert full < 0.5 * weighted < 0.5 * search


@pytest.mark.parametrize("options", [{}, {"damping": 0.0}, {"damping": 1.0}, {"act_order": False}, {"sweeps": 0}])
@pytest.mark.parametrize("count", [0, 1, 20, 500])
def test_no_row_is_worse_than_scale_search(options, count):
    x, weight = _inputs(count, 64), _weight(40, 64)
    hessian = x.T @ x / max(1, count)
    found = _costs(weight, quantize_q40_hessian(weight, hessian, **options), hessian)
    # f32 sums, of terms that cancel.
    assert (found <= _costs(weight, quantize_q40(weight), hessian) * 1.001).all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_the_inputs_changes_nothing(scale):
    hessian, weight = _inputs(100, 64).T.cov(), _weight(8, 64)
    found, scaled = (quantize_q40_hessian(weight, h) for h in (hessian, hessian * scale))
    same = (found.decompress() == scaled.decompress()).float().mean()
    assert same > 0.98  # the product is rounded: a tie may fall the other way


def test_dead_inputs_still_get_near_codes():
    x, weight = _inputs(200, 64), _weight(16, 64)
    x[:, 10:20] = 0
    packed = quantize_q40_hessian(weight, x.T @ x / 200)
    error = (packed.decompress() - weight)[:, 10:20]
    assert error.square().mean() < 4 * (quantize_q40(weight).decompress() - weight)[:, 10:20].square().mean()


def test_each_group_of_rows_has_its_matrix():
    weight = _weight(4, 6, 32)  # four experts
    matrices = torch.stack([_inputs(50, 32, seed).T.cov() for seed in range(4)])
    packed = quantize_q40_hessian(weight, matrices)
    weighed = quantize_q40_weighted(weight, matrices.diagonal(dim1=1, dim2=2))
    for i in range(4):
        assert torch.equal(packed.decompress()[i], quantize_q40_hessian(weight[i], matrices[i]).decompress())
        diagonal = matrices[i].diagonal()
        assert torch.equal(weighed.decompress()[i], quantize_q40_weighted(weight[i], diagonal).decompress())


def test_blocks_of_the_diagonal_are_columns():
    weight, blocks = _weight(6, 64), torch.stack([_inputs(50, 32, seed).T.cov() for seed in range(2)])
    packed = quantize_q40_hessian(weight, blocks[None])
    for i in range(2):
        columns = slice(32 * i, 32 * i + 32)
        alone = quantize_q40_hessian(weight[:, columns], blocks[i])
        assert torch.equal(packed.decompress()[:, columns], alone.decompress())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_shape_and_name_are_kept(dtype):
    weight = _weight(8, 4, 4, 2).to(dtype)
    for packed in (
        quantize_q40_weighted(weight, torch.ones(32), name="conv.weight"),
        quantize_q40_hessian(weight, torch.eye(32), name="conv.weight"),
    ):
        assert (packed.shape, packed.dtype, packed.nnef_name) == (weight.shape, dtype, "conv.weight")
        assert (packed.decompress() - weight).abs().max() < 0.5
    assert torch.equal(
        quantize_q40_hessian(weight.mT.contiguous().mT, torch.eye(32)).decompress(),
        quantize_q40_hessian(weight, torch.eye(32)).decompress(),
    )


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.eye(64), "no rows of 64"),
        (torch.ones(32, 64), "must be"),
        (torch.eye(32)[None].repeat(3, 1, 1), "dividing 8 rows"),
        (torch.ones(32), "no rows of 0"),
        (torch.full((32, 32), float("nan")), "NaN or Inf"),
        (-torch.eye(32), "not positive semidefinite"),
        (torch.eye(32) + 100 * (torch.ones(32, 32) - torch.eye(32)), "not positive semidefinite, even with"),
    ],
)
def test_a_hessian_that_cannot_be_is_refused(hessian, reason):
    with pytest.raises(T2NErrorInvalidArgument, match=reason):
        quantize_q40_hessian(_weight(8, 32), hessian, name="w")


@pytest.mark.parametrize(
    "importance", [torch.ones(33), torch.ones(3, 32), -torch.ones(32), torch.ones(32) / 0, torch.ones(())]
)
def test_an_importance_that_cannot_be_is_refused(importance):
    with pytest.raises(T2NErrorInvalidArgument):
        quantize_q40_weighted(_weight(8, 32), importance)


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"damping": float("nan")}, {"sweeps": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(T2NErrorInvalidArgument, match="negative"):
        quantize_q40_hessian(_weight(8, 32), torch.eye(32), **options)


def test_weights_that_q40_cannot_hold_are_refused():
    weight = _weight(8, 32)
    for bad in (weight * float("nan"), weight[:, :31], weight.int()):
        for encode in (
            lambda w: quantize_q40_weighted(w, torch.ones(32)),
            lambda w: quantize_q40_hessian(w, torch.eye(32)),
        ):
            with pytest.raises(T2NErrorImpossibleQuantization):
                encode(bad)
