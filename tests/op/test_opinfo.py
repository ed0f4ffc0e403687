"""torch's own samples of every operator do what `outcomes.json` says, and what is refused has its reason in `limits.py`.

`make support` writes the expected outcomes and `docs/supported_ops.md` anew. By default one f32 sample of every operator runs; the slow
test runs all that are recorded, in every dtype.
"""

from pathlib import Path

import opinfo
import pytest
import support
from limits import LIMITS, Kind

OPS = opinfo.ops()
EXPECTED = support.recorded()


def happened(name, dtype, wanted):
    """Outcomes of the samples at the indices `wanted`, and why those that did not pass did not."""
    samples = opinfo.chosen(OPS[name], dtype, support.MOST[dtype])
    found = {i: opinfo.outcome(samples[i], dtype) for i in wanted if i < len(samples)}
    return {i: o.code for i, o in found.items()}, [o.reason for o in found.values() if o.reason]


@pytest.mark.parametrize("name", [name for name in OPS if EXPECTED[name].get("f32")])
def test_one_sample(name):
    expected = EXPECTED[name]["f32"]
    middle = len(expected) // 2
    codes, reasons = happened(name, "f32", [middle])
    assert codes == {middle: expected[middle]}, reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_every_recorded_sample(name):
    for dtype, expected in EXPECTED[name].items():
        if dtype != "dynamic":
            codes, reasons = happened(name, dtype, range(len(expected)))
            assert "".join(codes.values()) == expected, reasons
    assert opinfo.dynamic(OPS[name]) == EXPECTED[name]["dynamic"]


def test_every_operator_of_torch_is_recorded():
    assert set(EXPECTED) == set(OPS)


def test_what_does_not_pass_has_its_reason_and_no_reason_is_idle():
    imperfect = {name for name in OPS if support.status(EXPECTED[name]) in ("partly", "refused")}
    unexplained = sorted(name for name in imperfect if support.limit(name) is None)
    assert unexplained == []
    used = {support.limit(name)[0] for name in imperfect}
    assert sorted(set(LIMITS) - used) == []


def test_nothing_fails_the_check_but_where_it_is_explained():
    wrong = [name for name, found in EXPECTED.items() if opinfo.WRONG in "".join(support.by_dtype(found).values())]
    assert [name for name in wrong if support.limit(name)[1].kind not in (Kind.TRACT, Kind.TORCH)] == []


def test_the_coverage_is_what_was_promised():
    passing, expressible = support.coverage(EXPECTED)
    assert passing / expressible >= 0.95


def test_the_support_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "supported_ops.md"
    assert page.read_text() == support.page(EXPECTED)
