"""`python tests/op/support.py` runs every recorded sample, and writes `outcomes.json` and `docs/supported_ops.md`.

With names it measures those operators alone, with `--missing` those that are not recorded.
"""

import json
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import opinfo
import torch
from limits import LIMITS, MEANING, Kind, Limit

from torch_to_nnef.op.registry import table

OUTCOMES = Path(__file__).parent / "outcomes.json"
PAGE = Path(__file__).parents[2] / "docs" / "supported_ops.md"
# Samples of each dtype that are recorded, spread over those torch has.
MOST = {"f32": 5, "f16": 2, "i64": 2, "i32": 1, "bool": 1}

Found = dict[str, str]


def recorded() -> dict[str, Found]:
    """Operator -> {dtype: one code a sample, "dynamic": which axes}."""
    return json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}


def by_dtype(found: Found) -> Found:
    """The codes alone."""
    return {dtype: codes for dtype, codes in found.items() if dtype != "dynamic"}


def limit(name: str) -> tuple[str, Limit] | None:
    """The key of `LIMITS` that is about `name`, and what it says; the longest prefix wins."""
    keys = [key for key in LIMITS if key == name or (key.endswith("*") and name.startswith(key[:-1]))]
    best = max(keys, key=lambda key: (key == name, len(key)), default=None)
    return None if best is None else (best, LIMITS[best])


def status(found: Found) -> str:
    """`passes`, `partly`, `refused`, or `untested` for what torch tests in other dtypes only."""
    codes = "".join(by_dtype(found).values())
    if not codes:
        return "untested"
    if set(codes) == {opinfo.PASSED}:
        return "passes"
    return "partly" if opinfo.PASSED in codes else "refused"


def coverage(found: dict[str, Found]) -> tuple[int, int]:
    """Operators that pass, with limits of tract's or not, and those that tract could express."""
    counts = Counter(_counted(name, each) for name, each in found.items())
    return counts["passing"], counts["passing"] + counts["gap"]


def _counted(name: str, found: Found) -> str:
    its = limit(name)
    if its is not None and its[1].kind is Kind.GAP:
        return "gap"
    return "passing" if status(found) in ("passes", "partly") else "outside"


def measure(name: str) -> tuple[str, Found, list[str]]:
    """Run every recorded sample of one operator; also the reasons of what did not pass."""
    op, found, reasons = _ops()[name], {}, []
    for dtype, most in MOST.items():
        results = [opinfo.outcome(sample, dtype) for sample in opinfo.chosen(op, dtype, most)]
        if results:
            found[dtype] = "".join(result.code for result in results)
        reasons += [f"{dtype} {result.code} {result.reason}" for result in results if result.reason]
    found["dynamic"] = opinfo.dynamic(op)
    return name, found, reasons


_ops = cache(opinfo.ops)


def page(found: dict[str, Found]) -> str:
    """`docs/supported_ops.md`."""
    passing, expressible = coverage(found)
    statuses = Counter(status(each) for each in found.values())
    kinds = Counter(its[1].kind for name in found if status(found[name]) == "refused" and (its := limit(name)))
    samples = Counter(code for each in found.values() for codes in by_dtype(each).values() for code in codes)
    lines = [
        "# Supported operators",
        "",
        "Written by `make support` from torch's own samples of every operator (OpInfo): each is exported through the public API, run in",
        "tract, and compared with torch. CI runs one sample an operator, `make test-slow` all that are counted here.",
        "",
        f"- **{passing} of {expressible}** operators that tract can express pass ({100 * passing / expressible:.1f} %):",
        f"  {statuses['passes']} whole, {passing - statuses['passes']} with the limits named below.",
        f"- {statuses['refused']} are refused at export with an error that says why: {_counts(kinds)}.",
        f"- {statuses['untested']} have samples of other types only (complex, sparse) and are not counted.",
        f"- Samples: {samples[opinfo.PASSED]} pass, {samples[opinfo.REFUSED]} are refused at export,",
        f"  {samples[opinfo.WRONG]} are found wrong by the check in tract, which raises and leaves no archive.",
        "",
        "Columns: samples that pass of those tried, by dtype; *dynamic*: which axes may be symbols (`all`: every axis, equal sizes sharing",
        "one; `first`: the leading axis; empty: torch or tract fixes the sizes of these samples).",
        "",
        *_limits(),
        "",
        "## Operators",
        "",
        f"| operator | {' | '.join(MOST)} | dynamic | limit |",
        f"|---|{'---|' * len(MOST)}---|---|",
        *(_row(name, each) for name, each in sorted(found.items()) if status(each) != "untested"),
        "",
        "## Handlers",
        "",
        "What these do not cover is spelled out by torch in simpler operators first.",
        "",
        *_handlers(),
    ]
    return "\n".join(lines) + "\n"


def _counts(kinds: Counter) -> str:
    return ", ".join(f"{count} {kind.value}" for kind, count in kinds.most_common())


def _limits() -> list[str]:
    return ["| limit | meaning |", "|---|---|", *(f"| {kind.value} | {text} |" for kind, text in MEANING.items())]


def _row(name: str, found: Found) -> str:
    codes = by_dtype(found)
    cells = [f"{codes[d].count(opinfo.PASSED)}/{len(codes[d])}" if d in codes else "" for d in MOST]
    its = limit(name) if status(found) != "passes" else None
    reason = f"{its[1].kind.value}: {its[1].what}" if its else ""
    dynamic = "" if found["dynamic"] == "none" else found["dynamic"]
    return f"| `{name}` | {' | '.join(cells)} | {dynamic} | {reason} |"


def _handlers() -> list[str]:
    families = defaultdict(list)
    ops = table()
    for op in ops:
        families[ops[op].lower.__module__.rsplit(".", 1)[1]].append(re.sub(r"^aten\.|\.default$", "", str(op)))
    return [
        f"- **{family}**: {', '.join(f'`{op}`' for op in sorted(names))}" for family, names in sorted(families.items())
    ]


def main(names: list[str]) -> None:
    """Measure all operators, or those named, in as many processes as there are cores."""
    found, every = recorded(), _ops()
    wanted = [n for n in every if n not in found] if names == ["--missing"] else names or list(every)
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool() as pool:
        for done, (name, each, reasons) in enumerate(pool.imap_unordered(measure, wanted), 1):
            found[name] = each
            _write({name: found[name] for name in sorted(every) if name in found})
            print(f"{done}/{len(wanted)} {name} {each}", *sorted(set(reasons)), sep="\n    ", flush=True)


def _write(found: dict[str, Found]) -> None:
    OUTCOMES.write_text(json.dumps(found, indent=0) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
