"""Moments are means over inputs; what is computed from them is what the inputs themselves would give."""

import pytest
import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.statistics import InputStatistics, InputSums, Moments, MomentSums, block_count, damped

K, N, R = 64, 12, 200


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape, seed=0):
    """Correlated, and not of mean 0."""
    x = torch.randn(*shape, generator=rng(seed))
    mixed = x @ torch.randn(shape[-1], shape[-1], generator=rng(1)) / shape[-1] ** 0.5
    return mixed + 0.3


def moments_of(x, exact=None, matrices=1):
    sums = MomentSums(matrices, x.shape[-1], x.device, drift=exact is not None)
    for part, d in zip(x.split(37), exact.split(37) if exact is not None else [None] * 99, strict=False):
        sums.add(part, 0, d)
    return sums.moments("w")


def test_moments_are_means_whatever_the_batches():
    x = inputs(R, 1, K)
    moments = moments_of(x)
    assert moments.hessian.shape == (1, 1, K, K)
    expected = (x[:, 0].double().T @ x[:, 0].double() / R).float()
    assert torch.allclose(moments.hessian[0, 0], expected, atol=1e-5)
    assert torch.allclose(moments.diagonal[0], x[:, 0].square().mean(0), atol=1e-5)
    assert moments.drift is None


def test_matrices_have_inputs_of_their_own():
    x = inputs(R, 3, K)
    sums = MomentSums(4, K, x.device, drift=False)
    sums.add(x[:50, :2], 0)
    sums.add(x[50:, 1:3], 1)
    hessian = sums.moments("w").hessian[:, 0]
    for index, seen in enumerate([x[:50, 0], torch.cat([x[:50, 1], x[50:, 1]]), x[50:, 2]]):
        assert torch.allclose(hessian[index], seen.T @ seen / len(seen), atol=1e-5)
    assert not hessian[3].any()


def test_half_precision_is_summed_in_single():
    x = torch.full((4096, 1, 32), 60.0, dtype=torch.float16)  # the sum of squares is beyond f16
    assert torch.equal(moments_of(x).hessian, torch.full((1, 1, 32, 32), 3600.0))


def test_wide_rows_keep_diagonal_blocks(monkeypatch):
    x, w = inputs(R, 1, K), torch.randn(N, K, generator=rng(2))
    whole = moments_of(x)
    monkeypatch.setattr("torch_to_nnef.quantize.statistics.LARGEST_BLOCK", 32)
    moments = moments_of(x)
    assert moments.hessian.shape == (1, 2, 32, 32)
    assert torch.allclose(moments.hessian[0, 1], whole.hessian[0, 0, 32:, 32:], atol=1e-5)
    parts = (w[:, None] * torch.eye(2).repeat_interleave(32, 1)).transpose(0, 1)
    expected = sum(float((x[:, 0] @ part.T).square().sum(1).mean()) for part in parts)
    assert moments.output_error(w, torch.zeros(N, K))[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("width", [32, 64, 96, 4096, 4096 + 32, 8192, 11008, 53248, 9])
def test_blocks_are_whole_groups(width):
    count = block_count(width)
    assert width % count == 0
    assert count == 1 or (width // count) % 32 == 0
    assert width // count <= 4096


@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize("matrices", [1, 3])
def test_the_output_error_is_that_of_the_outputs(drifts, matrices):
    if drifts and matrices > 1:
        pytest.skip("drift is kept of single matrices")
    x, w = inputs(R, matrices, K), torch.randn(matrices * N, 4, 16, generator=rng(2))
    q = w + 0.1 * torch.randn(w.shape, generator=rng(3))
    exact = x + 0.2 * inputs(R, matrices, K, seed=5) if drifts else x

    def outputs(weight, of):
        return torch.einsum("rgk,gnk->rgn", of.double(), weight.double().reshape(matrices, N, K))

    signal, noise = moments_of(x, exact if drifts else None, matrices).output_error(w, q)
    scale = outputs(w, exact).square().sum((1, 2)).mean()
    assert signal == pytest.approx(float(scale), rel=1e-4)
    assert noise == pytest.approx(float((outputs(w, exact) - outputs(q, x)).square().sum((1, 2)).mean()), rel=1e-3)


def test_the_error_of_lookups_counts_how_often():
    sums = InputSums(5)
    sums.looked_up(torch.tensor([[0, 1, 1]]))
    sums.looked_up(torch.tensor([1]))
    moments = sums.moments("w")
    assert torch.equal(moments.frequency, torch.tensor([1.25, 3.75, 0, 0, 0]))
    w, q = torch.eye(5), torch.zeros(5, 5)
    q[1, 1] = 1
    assert moments.output_error(w, q) == pytest.approx((1.0, 0.25))


def test_no_inputs_are_no_moments():
    assert InputSums(3).moments("w") is None


def test_the_aim_takes_the_drift_back():
    x = inputs(R, 1, K)
    exact = x + 0.2 * inputs(R, 1, K, seed=5)
    w = torch.randn(N, K, generator=rng(2))
    moments = moments_of(x, exact)
    best = torch.linalg.lstsq(x[:, 0].double(), exact[:, 0].double() @ w.double().T).solution.T.float()
    assert torch.allclose(moments.aim(w, 1.0, damping=1e-9), best, atol=1e-2)
    errors = [moments.output_error(w, moments.aim(w, strength))[1] for strength in (0.0, 0.5, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert moments.aim(w, 0.0) is w
    assert moments_of(x).aim(w, 1.0) is w


def test_divided_moments_are_those_of_divided_inputs():
    x, by = inputs(R, 1, K), torch.rand(K, generator=rng(4)) + 0.5
    exact = x * 1.1
    found = InputStatistics(moments_of(x, exact), moments_of(x)).divided(by)
    expected = moments_of(x / by, exact / by)
    for name in ("hessian", "drift", "drift_square"):
        assert torch.allclose(getattr(found.learn, name), getattr(expected, name), atol=1e-5)
    assert torch.allclose(found.held_out.hessian, expected.hessian, atol=1e-5)


def test_judged_by_what_was_held_out():
    learn, held_out = Moments(frequency=torch.ones(1)), Moments(frequency=torch.ones(2))
    assert InputStatistics(learn, held_out).judge is held_out
    assert InputStatistics(learn).judge is learn


def test_damping_makes_a_matrix_of_nothing_regular():
    hessian = torch.zeros(2, 4, 4)
    hessian[1] = 3 * torch.ones(4, 4)
    assert torch.equal(damped(hessian, 0.1)[0], torch.eye(4))
    assert torch.allclose(damped(hessian, 0.1)[1], hessian[1] + 0.3 * torch.eye(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_inputs_that_are_not_finite_name_the_weight(value):
    x = torch.ones(3, 1, 32)
    x[1, 0, 5] = value
    with pytest.raises(T2NErrorInvalidArgument, match=r"inputs of `w` are not finite"):
        moments_of(x)
