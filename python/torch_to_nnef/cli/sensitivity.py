"""`t2n sensitivity`: which weights of a language model bear quantization worst."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from torch_to_nnef.cli.arguments import Json, Verbose
from torch_to_nnef.cli.outcome import outcome
from torch_to_nnef.llm_tract.options import DtypeName, LlmOptions

_WIDTH = 160


def sensitivity(
    model_slug: Annotated[
        str | None, Option("-s", "--model-slug", help="Model of the Hugging Face hub; of GGUF: owner/name/file.gguf.")
    ] = None,
    local_dir: Annotated[
        Path | None, Option("-d", "--local-dir", help="Folder with a checkpoint, or a .gguf file.")
    ] = None,
    method: Annotated[str, Option("-c", "--method", help="Key of the registry.")] = "q40",
    compression_registry: Annotated[
        str, Option(help="Mapping of methods as pkg.mod.NAME, found from the current folder too.")
    ] = LlmOptions.compression_registry,
    calibration_text: Annotated[
        Path | None, Option(help="Text file to learn from and to measure on; none: a built-in text.")
    ] = None,
    calibration_npz: Annotated[
        Path | None, Option(help="Arrays [samples, ...] instead, by input name: input_ids...")
    ] = None,
    calibration_tokens: Annotated[
        int, Option(metavar="N", help="How much of the text is read.")
    ] = LlmOptions.calibration_tokens,
    include: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Only these weights; repeat it. A glob, or a /regex/.")
    ] = None,
    exclude: Annotated[list[str] | None, Option(metavar="PATTERN", help="Not these weights; repeat it.")] = None,
    force_module_dtype: Annotated[
        DtypeName | None, Option("-dt", "--force-module-dtype", help="Dtype to compute in.")
    ] = None,
    trust_remote_code: Annotated[bool, Option(help="Run code that comes with the checkpoint.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantize each weight of a language model alone, and say how far the next token's distribution moves, the worst first.

    The model runs once for each weight, from the block on that holds it. What costs most for its bytes is what to keep in f16:
    t2n_export_llm_to_tract --tensor-type, or --target-bpw and --max-kl, which choose so themselves.
    """
    with outcome(verbose):
        options = LlmOptions(
            export_dirpath=Path(),
            model_slug=model_slug,
            local_dir=local_dir,
            compression_method=method,
            compression_registry=compression_registry,
            calibration_text=calibration_text,
            calibration_npz=calibration_npz,
            calibration_tokens=calibration_tokens,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            force_module_dtype=force_module_dtype,
            trust_remote_code=trust_remote_code,
        )
        from torch_to_nnef.llm_tract.sensitivity import llm_sensitivity

        found = llm_sensitivity(options)
        if as_json:
            print(json.dumps(found.to_dict(), ensure_ascii=False))
        else:
            from rich.console import Console

            # In a file or a pipe names of weights stay in one piece.
            Console(width=None if sys.stdout.isatty() else _WIDTH).print(found.table())
