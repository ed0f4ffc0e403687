"""The folder an export leaves: where its files lie, what they hold, and how it takes its place.

`modes.json` says how to run the archive without knowing the family of the model:

- `format`: 1. `model`: `name`, `type`, `dtype` (of caches and logits, "f32" or "f16"), `vocabulary` (ids), `context` (most tokens, past
  and new; null if nothing bounds it), `eos_token_ids`.
- `files`: `archive`, `config`, `tokenizer` (a folder; null if it was not asked for), relative to the folder.
- `symbols`: what each size means. `inputs`, `outputs`: name -> `dtype` and `shape`, of numbers and expressions in symbols.
- `carried`: cache input -> the output that is its value in the next step. The first step takes caches with P = 0.
- `modes`: `prompt_processing` and, if the archive takes single tokens, `text_generation`: symbol -> least and most of its size (null: no
  bound). All modes have all inputs and outputs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef._native import write_text
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorRuntime
from torch_to_nnef.export import staged
from torch_to_nnef.files import alone_in, placed, writing
from torch_to_nnef.isolated import save_arrays
from torch_to_nnef.llm_tract.model import read_modes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from torch_to_nnef.inference_target import TractNNEF
    from torch_to_nnef.llm_tract.causal import Signature
    from torch_to_nnef.llm_tract.checkpoint import Checkpoint
    from torch_to_nnef.llm_tract.options import DirStruct, LlmOptions
    from torch_to_nnef.llm_tract.scenarios import Scenario
    from torch_to_nnef.quantize.rows import TensorRow
    from torch_to_nnef.report import Report

SCENARIOS = ("export", "prompt", "prompt_with_past", "text_generation")
_SYMBOLS = {"S": "new tokens", "P": "tokens in the caches, the past", "K": "positions that get logits"}
_FOLDERS = ("model", "tests", "tokenizer")
# What tokenizers of transformers write; in a flat folder nothing else tells them from files of the user.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True)
class Layout:
    """Where the files of an export lie in `folder`: by kind in folders (deep), or all in one (flat)."""

    folder: Path
    struct: DirStruct = "deep"

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Layout:
        """The layout of an export that exists. Raises `T2NErrorInvalidArgument` if `folder` is none."""
        for struct in ("deep", "flat"):
            layout = cls(Path(folder), struct)
            if layout.archive.exists() and layout.modes.exists():
                return layout
        raise T2NErrorInvalidArgument(
            f"{folder} is no folder of an exported language model: it has no modes.json and model.nnef.tgz"
        )

    @property
    def archive(self) -> Path:
        """`model.nnef.tgz`."""
        return self._in("model") / "model.nnef.tgz"

    @property
    def config(self) -> Path:
        """The config of transformers."""
        return self._in("model") / "config.json"

    @property
    def modes(self) -> Path:
        """How to run the archive; see the docstring of the module."""
        return self.folder / "modes.json"

    @property
    def tokenizer(self) -> Path:
        """The folder `AutoTokenizer` loads; it has a `tokenizer_config.json` if the tokenizer was dumped."""
        return self._in("tokenizer")

    @property
    def report_json(self) -> Path:
        """`Report.to_json`."""
        return self.folder / "report.json"

    @property
    def report_html(self) -> Path:
        """`Report.to_html`."""
        return self.folder / "report.html"

    @property
    def report_markdown(self) -> Path:
        """`Report.to_markdown`."""
        return self.folder / "report.md"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"

    def test(self, scenario: str, side: str) -> Path:
        """Arrays by name of one side ("inputs" or "outputs") of a scenario."""
        return self._in("tests") / f"{scenario}_{side}.npz"

    def read_modes(self) -> dict[str, Any]:
        """What `modes.json` says. Raises `T2NErrorInvalidArgument` if it is of a later format or no JSON."""
        return read_modes(self.folder)

    def write_tests(self, scenarios: Sequence[Scenario]) -> None:
        """Inputs and outputs of every scenario; the same values make the same bytes."""
        for scenario in scenarios:
            for side, arrays in zip(("inputs", "outputs"), scenario.arrays, strict=True):
                path = self.test(scenario.name, side)
                with writing(path):
                    path.parent.mkdir(exist_ok=True)
                    save_arrays(path, arrays)

    def write(
        self,
        report: Report,
        card: str,
        modes: Mapping[str, Any],
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Everything beside archive and tests. `modes`: as the function `modes` gives it."""
        with writing(self.config):
            config.to_json_file(self.config)
        if tokenizer is not None:
            try:
                tokenizer.save_pretrained(self.tokenizer)
            except Exception as error:  # tokenizers has no other class for a full disk
                raise T2NErrorRuntime(f"cannot write the tokenizer {str(placed(self.tokenizer))!r}: {error}") from error
        where = {"archive": self.archive, "config": self.config, "tokenizer": self.tokenizer if tokenizer else None}
        files = {kind: path and path.relative_to(self.folder).as_posix() for kind, path in where.items()}
        write_text(self.modes, json.dumps({**modes, "files": files}, indent=2) + "\n")
        report.to_json(self.report_json)
        report.to_html(self.report_html)
        report.to_markdown(self.report_markdown)
        write_text(self.card, card)

    def _in(self, kind: str) -> Path:
        return self.folder / kind if self.struct == "deep" else self.folder


@contextmanager
def replaced_folder(options: LlmOptions) -> Iterator[Layout]:
    """A layout in a folder beside `options.export_dirpath`, which takes its place in one step if the block ends well.

    Of a folder that is there (and may be replaced), files at paths of a layout go, all others stay.
    After an error nothing is left, and what was there is as it was.

    Raises `T2NErrorInvalidArgument`, before the block, for a folder that may not or cannot be replaced.
    """
    with writing(options.export_dirpath):
        path = options.export_dirpath.resolve()
        _check_place(path, options.ignore_already_exist_dir)
    with ExitStack() as until_placed, staged(path) as beside:
        layout = Layout(beside, options.export_dir_struct)
        with writing(path):
            layout.archive.parent.mkdir(parents=True)
        yield layout
        with writing(path):
            # Another export to the same path would take away the folder whose files are linked.
            until_placed.enter_context(alone_in(path.parent))
            _check_place(path, options.ignore_already_exist_dir)
            _keep_others(path, layout)


def modes(
    signature: Signature, *, name: str, model_type: str, vocabulary: int, dtype: torch.dtype, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """The content of `modes.json` but for `files`; dtype: of the caches in torch."""
    kept, context = signature.logits, signature.context
    least = max(kept or 1, 1)
    real = "f16" if dtype is torch.float16 else "f32"
    caches = {cache: (heads, size) for cache, (heads, size) in signature.caches}
    rows: str | int = {None: "K", 0: "S"}.get(kept) or least
    positions = {"logits_to_keep": _fact("i64", ["K"])} if kept is None else {}
    bounds = {"S": _range(least, context), "P": _range(0, context and context - least)}
    runs = {"prompt_processing": bounds}
    if least == 1:
        runs["text_generation"] = {"S": _range(1, 1), "P": _range(1, context and context - 1)}
    return {
        "format": 1,
        "model": {
            "name": name,
            "type": model_type,
            "dtype": real,
            "vocabulary": vocabulary,
            "context": context,
            "eos_token_ids": list(eos_ids),
        },
        "symbols": {symbol: _SYMBOLS[symbol] for symbol in ("S", "P", *(("K",) if kept is None else ()))},
        "inputs": {
            "input_ids": _fact("i64", [1, "S"]),
            **positions,
            **{f"in_cache_{cache}": _fact(real, [1, heads, "P", size]) for cache, (heads, size) in caches.items()},
        },
        "outputs": {
            "outputs": _fact(real, [1, rows, vocabulary]),
            **{f"out_cache_{cache}": _fact(real, [1, heads, "S+P", size]) for cache, (heads, size) in caches.items()},
        },
        "carried": signature.carried,
        "modes": runs,
    }


def properties(
    checkpoint: Checkpoint,
    signature: Signature,
    target: TractNNEF,
    dtype: torch.dtype,
    method: str | None,
    rows: Sequence[TensorRow],
) -> dict[str, str]:
    """What an archive says of itself: the model and what was done to it; neither paths nor dates.

    target: with the options that are in force, asked for or not. rows: what became of each weight.
    """
    forced = {
        "attention": target.force_attention_inner_in_f32,
        "linear_accumulation": target.force_linear_accumulation_in_f32,
        "normalization": target.force_norm_in_f32,
    }
    quantized = sum(row.quantized for row in rows)
    said = {
        "model_name": checkpoint.name,
        "model_type": checkpoint.config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "compression_method": method or "none",
        "compressed_tensors": f"{quantized} of {len(rows)}" if method else "",
        "computed_in_f32": ", ".join(part for part, is_forced in forced.items() if is_forced),
        "num_logits_to_keep": "dynamic" if signature.logits is None else str(signature.logits),
        "context": "" if signature.context is None else str(signature.context),
    }
    return {key: text for key, text in said.items() if text}


_OURS = frozenset(
    path
    for layout in (Layout(Path(), "deep"), Layout(Path(), "flat"))
    for path in (
        *(
            layout.archive,
            layout.config,
            layout.modes,
            layout.report_json,
            layout.report_html,
            layout.report_markdown,
            layout.card,
        ),
        *(layout.test(scenario, side) for scenario in SCENARIOS for side in ("inputs", "outputs")),
        *(layout.tokenizer / name for name in _TOKENIZER_FILES),
    )
)


def _is_ours(path: Path) -> bool:
    """Whether `path`, relative to its folder, is of an export, in whichever layout."""
    return path in _OURS or path.parts[0] == "tokenizer"


def _fact(dtype: str, shape: list[int | str]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape}


def _range(least: int, most: int | None) -> dict[str, int | None]:
    return {"least": least, "most": most}


def _check_place(path: Path, may_replace: bool) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise T2NErrorInvalidArgument(f"{path} exists and is not a folder")
    if not may_replace:
        raise T2NErrorInvalidArgument(
            f"{path} exists; pass --ignore-already-exist-dir (-iaed) to replace the export in it"
        )
    if path.is_mount():
        raise T2NErrorInvalidArgument(
            f"{path} is a mount point, which cannot be replaced in one step: name a folder in it"
        )


def _keep_others(path: Path, layout: Layout) -> None:
    """Link what is in `path` and is not of an export into the new folder."""
    for root, folders, files in os.walk(path, onerror=_raised):
        here = Path(root).relative_to(path)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in folders:
            if name not in links and here / name not in map(Path, _FOLDERS):
                (layout.folder / here / name).mkdir(exist_ok=True, parents=True)
        for name in (*files, *links):
            if not _is_ours(here / name):
                _link(Path(root) / name, layout.folder / here / name)


def _raised(error: OSError) -> None:
    """A folder that cannot be looked into might hold what must stay; one that is not there does not."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _link(old: Path, new: Path) -> None:
    new.parent.mkdir(exist_ok=True, parents=True)
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        pass  # a compression method wrote its own
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)
