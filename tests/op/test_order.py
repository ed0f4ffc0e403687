"""Reductions, running totals, sorting and searching."""

import math

import pytest
import torch
from rows import BS, B, Row, check, flags, ids, unary, x

from torch_to_nnef.exceptions import T2NErrorNotImplemented

TIED = ids(3, 9, high=4).float()
GAPS = torch.where(x(4, 7) > 0.8, math.nan, x(4, 7, seed=1))

ROWS = [
    # reductions
    unary(lambda t: (t.mean(), t.sum(0), t.prod(), t.amax((0, 1)), t.aminmax(dim=1), t.max(), t.min()), "reductions"),
    Row("reductions_rank0", lambda t: (t.mean(), t.sum(0), t.prod(0), t.amax(0), t.max(0), t.argmax(), t.any(), t.logsumexp(0), t.cumsum(0), t.sort()), (torch.tensor(2.5),)),
    Row("reductions_half", lambda t: (t.sum(1), t.mean(1), t.std(1), t.cumsum(1), t.logsumexp(1), t.norm(dim=1)), (x(3, 300).abs().half() * 20,), {"args_0": B}),
    Row("argmax_first", lambda t: (t.argmax(1), t.argmin(1), t.argmax(), t.argmin(keepdim=True), t.max(1), t.min(0)), (TIED,), {"args_0": B}),
    Row("argmax_nan", lambda t: (t.argmax(1), t.argmin(1), t.argmax()), (GAPS,), {"args_0": B}),
    Row("extremes_nan", lambda t: (t.amax(1), t.amin(1), t.max(), t.min(0), t.aminmax(dim=1), torch.linalg.vector_norm(t, math.inf, 1)), (GAPS,), {"args_0": B}),
    Row("extremes_inf", lambda t: (t.amax(1), t.amin(1), (t + 1e38).amax(1)), (torch.tensor([[-math.inf] * 2, [math.inf] * 2, [-3.4028235e38, -math.inf]]),), {"args_0": B}),
    unary(lambda t: (torch.var_mean(t, 1), torch.std_mean(t, 0, keepdim=True), t.var(correction=0), t.std(1, correction=2)), "moments"),
    Row("var_dynamic_axis", lambda t: (t.var(1), t.std((0, 1)), t.var(1, correction=2)), (x(3, 7),), {"args_0": BS}),
    *[Row(f"norm_{order}", lambda t, order=order: torch.linalg.vector_norm(t, order, 1), (x(3, 5) + 0.1,), {"args_0": B}) for order in (0, 0.5, 1, 2, 3, -1, math.inf, -math.inf)],
    Row("renorm_half", lambda t: t.renorm(2, 0, 1.5), (x(3, 5).half(),), {"args_0": B}),
    unary(lambda t: (torch.norm(t), torch.dist(t, t.flip(1), 3), t.norm(1, 1)), "norms"),
    Row("logsumexp", lambda t: (t.logsumexp(1), t.logsumexp((0, 1), keepdim=True)), (torch.tensor([[1.0, 100.0, -math.inf], [-math.inf] * 3, [1.0, math.inf, 2.0]]),)),
    Row("nan_reductions", lambda t: (t.nansum(1), t.nanmean(1), t.nanmedian(1), torch.nanmedian(t), t.isnan().sum()), (GAPS,), {"args_0": B}),
    Row("counts", lambda t: (t.count_nonzero(), t.count_nonzero(1), (t > 1).any((0, 1)), (t > -1).all()), (TIED,), {"args_0": B}),
    # running
    Row("cumprod", lambda t: (t.cumprod(0), t.cumprod(1), t.logcumsumexp(1)), (x(3, 5),), {"args_0": BS}),
    Row("cummax", lambda t: (t.cummax(1), t.cummin(0)), (TIED,), {"args_0": BS}),
    Row("cummax_nan", lambda t: (t.cummax(1)[0], t.cummin(0)), (GAPS,), {"args_0": B}),
    Row("logcumsumexp_inf", lambda t: t.logcumsumexp(0), (torch.tensor([-math.inf, -math.inf, 1.0, 100.0]),)),
    Row("cumprod_integers", lambda t: t.cumprod(1), (ids(3, 9, high=90) + 1,), {"args_0": B}),
    Row("diff", lambda t, p: (t.diff(), t.diff(n=2, dim=1), t.diff(prepend=p), t.diff(n=0), (t > 0).diff()), (x(4, 5), x(4, 2)), {"args_0": B, "args_1": B}),
    Row("diff_dynamic", lambda t: t.diff(dim=1), (x(4, 5),), {"args_0": BS}),
    # order
    Row("sort_ties", lambda t: (t.sort(1), t.sort(1, descending=True), t.argsort(0), torch.sort(t, stable=True, dim=0), t.msort()), (TIED,), {"args_0": B}),
    Row("sort_dynamic", lambda t: t.sort(1), (x(3, 5),), {"args_0": BS}),
    Row("kthvalue", lambda t: (t.kthvalue(2), t.kthvalue(3, 1, keepdim=True)), (x(3, 5),), {"args_0": B}),
    Row("median", lambda t: (t.median(1), t.median(1, keepdim=True)), (x(4, 5),), {"args_0": B}),
    Row("median_dynamic", lambda t: (t.median(0)[0], t.median(), t.nanmedian()), (x(3, 5),), {"args_0": B}),
    Row("median_integers", lambda t: (t.median(), t.median(1)[0], t.topk(2)[0], t.kthvalue(2)[0]), (ids(3, 5),), {"args_0": B}),
    Row("quantile", lambda t: (t.quantile(0.3, dim=1), t.nanquantile(0.5, dim=1)), (x(4, 5),), {"args_0": B}),
    Row("mode", lambda t: (t.mode(1), t.mode(0)), (TIED,), {"args_0": B}),
    Row("search", lambda e, t: (torch.searchsorted(e, t), torch.searchsorted(e, t, right=True, out_int32=True), torch.bucketize(t, e[0])), (x(3, 9).sort(1)[0], x(3, 4)), {"args_0": B, "args_1": B}),
    Row("isin", lambda t, e: (torch.isin(t, e), torch.isin(t, e, invert=True)), (ids(3, 5), torch.tensor([1, 3])), {"args_0": B}),
    Row("histc", lambda t: (t.histc(4), t.histc(5, -1.0, 1.0)), (x(3, 5),), {"args_0": B}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_order_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


@pytest.mark.parametrize(
    "function",
    [torch.rand_like, torch.bernoulli, lambda t: torch.randn(2) + t, lambda t: t + torch.randint(3, (2,))],
    ids=["rand_like", "bernoulli", "randn", "randint"],
)
def test_random_numbers_are_refused_with_what_to_do(function, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match="pass them as an input"):
        check(Row("random", lambda t: function(t), (flags(3, 2).float(),)), tmp_path)


@pytest.mark.parametrize("function", [torch.topk, torch.kthvalue], ids=["topk", "kthvalue"])
def test_places_among_equal_integers_are_refused(function, tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match="which of equal elements torch picks"):
        check(Row("ties", lambda t: function(t, 2), (ids(3, 5),)), tmp_path)
