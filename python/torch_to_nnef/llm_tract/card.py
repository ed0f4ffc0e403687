"""The model card: what is in the folder, what it cost, how to run it."""

from __future__ import annotations

from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from torch_to_nnef.report.words import facts, verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch_to_nnef.llm_tract.report import LlmReport

_CARD = Template("""\
# $name in tract

A language model ($type), exported to NNEF for [tract](https://github.com/sonos/tract) $tract.

$facts

**$verdict**: $sentence.

$sections
## Inputs and outputs

$io

$symbols. One archive serves prompts and generation: begin with `P` = 0, and give each `out_cache_*` to the `in_cache_*` of the next step.
`modes.json` says the same for programs.

## Python

```python
from torch_to_nnef.llm_tract import TractLLM

llm = TractLLM(".")  # this folder
for piece in llm.generate("The capital of France is", max_new_tokens=32):
    print(piece, end="", flush=True)
```

On a terminal: `t2n chat .`

## Rust

With `tract-nnef = "=$tract"` and `tract-transformers = "=$tract"`; tokens that end a text: $eos.

```rust
$rust```
""")


def model_card(report: LlmReport, modes: Mapping[str, Any]) -> str:
    """Markdown; `modes` as `layout.modes` gives it."""
    word, sentence = verdict(report)
    model = modes["model"]
    ports = [*modes["inputs"].items(), *modes["outputs"].items()]
    shown = {_series(name): (fact["dtype"], f"[{', '.join(map(str, fact['shape']))}]") for name, fact in ports}
    return _CARD.substitute(
        name=report.model,
        type=model["type"],
        tract=report.versions["tract"],
        facts=_table(("", ""), facts(report)),
        verdict=word,
        sentence=sentence,
        sections="".join(f"## {s.title}\n\n{_table(s.header, s.rows)}\n\n" for s in report.sections),
        io=_table(("name", "type", "shape"), [(f"`{name}`", *fact) for name, fact in shown.items()]),
        symbols="; ".join(f"`{symbol}`: {meaning}" for symbol, meaning in modes["symbols"].items()),
        eos=", ".join(map(str, model["eos_token_ids"])) or "none",
        rust=(files("torch_to_nnef.llm_tract") / "generate.rs").read_text(encoding="utf-8"),
    )


def _series(name: str) -> str:
    """`in_cache_key_12` -> `in_cache_key_*`: layers are alike."""
    stem = name.rstrip("0123456789")
    return name if stem == name else f"{stem}*"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
