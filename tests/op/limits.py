"""Why an operator is refused for some samples, or for all: what `test_opinfo.py` demands of every `r`, and the support page prints."""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Whose limit it is; only `GAP` counts against the coverage."""

    TRACT = "tract"
    DATA = "data"
    RANDOM = "random"
    TORCH = "torch"
    GAP = "gap"


MEANING = {
    Kind.TRACT: "tract has no operators to say it, or computes it differently",
    Kind.DATA: "the size of the result depends on the values",
    Kind.RANDOM: "an archive gives the same output every time: make the numbers an input",
    Kind.TORCH: "torch.export cannot capture it, or it is no computation of an inference graph",
    Kind.GAP: "tract could; not done yet",
}


@dataclass(frozen=True)
class Limit:
    """`what` is refused and why, in one line."""

    kind: Kind
    what: str


# operator of OpInfo, or `prefix*` -> its limit
LIMITS: dict[str, Limit] = {}
