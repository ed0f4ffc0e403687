"""Why torch.export could not take a model: one short report with the user's line; torch's own text stays behind `__cause__`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch_to_nnef.exceptions import T2NError, T2NErrorDynamicShapeValue, T2NErrorNotImplemented
from torch_to_nnef.graph.guards import Watch
from torch_to_nnef.graph.places import Place, raised

_CHOOSE = "compute both sides and choose with torch.where (or torch.cond), or take the decision out of the model"
# In torch's report or the user's line -> what it means, what to do instead. The first that matches counts.
_REASONS: Sequence[tuple[str, str, str, str]] = (
    (
        r"[Dd]ata.?[Dd]ependent",
        r"\b(if|elif|while|assert|and|or|not)\b",
        "a Python branch or loop depends on the value of a tensor, which is known only when the model runs",
        _CHOOSE,
    ),
    (
        r"[Dd]ata.?[Dd]ependent",
        "",
        "a Python number is read out of a tensor (`.item()`, `int(tensor)`, `range(tensor)`), and decides what is computed",
        "keep it a tensor (masks, torch.where, gather), or give it to the model's constructor as a constant",
    ),
    (
        r"\.numpy\(\)|numpy",
        "",
        "the model leaves torch for numpy",
        "use the torch function of the same kind, or compute it before the model",
    ),
    (
        r"assigned during export|attribute.*(assigned|mutated|created)",
        "",
        "the model writes into its own attributes while it runs; an archive keeps no state",
        "take the state as an input and return the new value as an output",
    ),
)
_UNROLLED = "\n  hint: a Python loop is unrolled; where it runs a cell step by step, give all steps to nn.LSTM, nn.GRU or nn.RNN"
# Where torch's advice to its own developers starts.
_ADVICE = re.compile(
    r"\n\s*\n|\nCaused by|\nFor more|\nFor extended|\nconsider using|\nThe error above|\nThe following call|\(unhinted",
    re.S,
)


def explain(error: Exception, name: str, watch: Watch) -> T2NError:
    """The error to raise in the place of `error`, which the capture of the model `name` ended with."""
    own = next((e for e in _chain(error) if isinstance(e, T2NError)), None)
    place = raised(own or error, watch.modules)
    if own is not None:
        return type(own)(f"{own}{_at(place)}")
    if fixed := watch.specialized():
        return T2NErrorDynamicShapeValue(
            "\n".join(
                f"torch.export fixed a dimension that was asked to be dynamic: axis {axis.symbol!r} (dimension {axis.axis} of input "
                f"{axis.input!r}) became {size}{_at(line)}"
                for axis, size, line in fixed
            )
            + "\n  hint: say sizes by x.shape instead of numbers, keep them out of int() and range(), or leave the axis out of dynamic_axes"
            + _UNROLLED * any(line is not None and re.search(r"\bfor\b", line.source) for _, _, line in fixed)
        )
    kind, text = type(error).__name__, _ADVICE.split(str(error).strip(), maxsplit=1)[0].strip()
    source = place.source if place else ""
    for report, line, what, hint in _REASONS:
        if re.search(report, f"{kind} {text}") and re.search(line, source):
            return T2NErrorNotImplemented(
                f"{name} cannot be captured: {what}{_at(place)}\n  torch: {text}\n  hint: {hint}"
            )
    return T2NErrorNotImplemented(f"torch.export could not capture {name}: {kind}: {text}{_at(place)}")


def keeps_state(written: Mapping[str, object]) -> T2NErrorNotImplemented:
    """The error for a model that writes into buffers or inputs: their names, and where."""
    return T2NErrorNotImplemented(
        "the model writes into its buffers or inputs while it runs; an archive keeps no state:"
        + "".join(f"\n  `{fqn}` at {place}" for fqn, place in written.items())
        + "\n  hint: take the old value as an input and return the new one as an output"
    )


def _chain(error: BaseException | None) -> Sequence[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _at(place: Place | None) -> str:
    return f"\n  at {place}" if place else ""
