"""What a model is to this evaluation: how it is calibrated, exported and measured."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_to_nnef import TractNNEF


@dataclass(frozen=True)
class Column:
    """A number that is measured: its name in results, its heading, how it is written, whether less of it is better."""

    key: str
    heading: str
    form: str
    least: bool = True


@dataclass(frozen=True)
class Subject:
    """A float model, and the data it is judged on.

    asked: filters (`include` or `exclude`) of the weights that are quantized. calibration: batches no measure sees.
    measure: numbers of a quantized copy of the model, of names as in `columns`. step: the module that is exported, of such a copy.
    carried: inputs of the step that are outputs of the one before, by position.
    """

    title: str
    columns: Sequence[Column]
    model: nn.Module
    asked: Mapping[str, Any]
    calibration: Sequence[Any]
    measure: Callable[[nn.Module], dict[str, Any]]
    sample: tuple[Tensor, ...]
    target: TractNNEF
    names: Mapping[str, Sequence[str]]
    carried: Mapping[int, int] = field(default_factory=dict)
    step: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    tokenizer: Any = None


def package_folder(name: str) -> Path:
    """Where a package is that only has files for us; it is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"no package {name}: `make dev` installs it")
    return Path(next(iter(found.submodule_search_locations)))


def documents(name: str) -> list[str]:
    """Documents of `lee` (held out: 50 short news) or `lee_background` (to calibrate: 300 others), one a line (Lee et al. 2005)."""
    text = (package_folder("gensim") / "test" / "test_data" / f"{name}.cor").read_text(encoding="latin-1")
    return [line for line in text.splitlines() if line.strip()]
