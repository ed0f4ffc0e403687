"""Why an operator is refused for some samples, or for all: what `test_opinfo.py` demands of every `r`, and the support page prints."""

from enum import Enum


class Kind(Enum):
    """Whose limit it is; only `GAP` counts against the coverage."""

    TRACT = "tract cannot express it"
    DATA = "the size of the result depends on the data"
    RANDOM = "random numbers: an archive gives the same output every time"
    TORCH = "torch.export cannot capture it, or it is no operator of an inference graph"
    GAP = "could be expressed, is not yet"


# operator (OpInfo name, `prefix*` for a family) -> (kind, reason)
LIMITS: dict[str, tuple[Kind, str]] = {}
