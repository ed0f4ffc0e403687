"""`t2n quantize-shards`: a checkpoint to a packed one, weight by weight, on one machine or many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from torch_to_nnef.cli.arguments import Json, Verbose
from torch_to_nnef.cli.outcome import outcome
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.llm_tract.options import Fallback, LlmOptions


def quantize_shards(
    checkpoint: Annotated[
        Path, Argument(metavar="CHECKPOINT_DIR", help="Folder with a checkpoint in safetensors.", show_default=False)
    ],
    out: Annotated[
        Path, Argument(metavar="OUT", help="Folder to write; the same for all workers.", show_default=False)
    ],
    shard: Annotated[str, Option("--shard", metavar="I/N", help="Do the share of worker I of N.")] = "1/1",
    method: Annotated[
        str, Option("-c", "--method", "--compression-method", help="Key of the registry; a method without data.")
    ] = "q40",
    compression_registry: Annotated[
        str, Option(help="Mapping of methods as pkg.mod.NAME, found from the current folder too.")
    ] = LlmOptions.compression_registry,
    tensor_type: Annotated[
        list[str] | None,
        Option(metavar="PATTERN=METHOD", help="Weights by another method, or kept in f16 or f32; repeat it."),
    ] = None,
    include: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Only these weights; repeat it. A glob, or a /regex/.")
    ] = None,
    exclude: Annotated[list[str] | None, Option(metavar="PATTERN", help="Not these weights; repeat it.")] = None,
    fallback: Annotated[
        Fallback | None, Option(help="Weights with rows that Q40 cannot hold: f16, pad, error, or as they are.")
    ] = LlmOptions.fallback,
    files: Annotated[int, Option(min=1, help="Files to write, about; as many workers can share the work.")] = 32,
    ray: Annotated[
        bool, Option("--ray", help="Run on a Ray cluster that reaches both folders; needs the extra [ray].")
    ] = False,
    ray_address: Annotated[str | None, Option(help="Of the cluster; none: start one on this machine.")] = None,
    retries: Annotated[int, Option(min=0, help="Of a file, after its worker was lost or could not write.")] = 3,
    trust_remote_code: Annotated[bool, Option(help="Run code that comes with the checkpoint.")] = False,
    force: Annotated[bool, Option("--force", help="Begin anew, of one worker; other files in OUT stay.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Pack the weights of a checkpoint one by one into a checkpoint that t2n_export_llm_to_tract -d takes as it is.

    Stopped at any moment, the same command goes on where it was. Workers on several machines take --shard 1/N to N/N of one folder; the
    last of them completes it.
    """
    with outcome(verbose):
        from torch_to_nnef.llm_tract.shards import quantize_shards as run
        from torch_to_nnef.report.progress import progress_bars
        from torch_to_nnef.report.words import size

        options = LlmOptions(
            export_dirpath=out,
            local_dir=checkpoint,
            compression_method=method,
            compression_registry=compression_registry,
            tensor_type=tuple(tensor_type or ()),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            fallback=fallback,
            trust_remote_code=trust_remote_code,
            ignore_already_exist_dir=force,
        )
        cluster = None
        if ray:
            from torch_to_nnef.llm_tract.shards_ray import on_ray

            cluster = on_ray(ray_address, retries)
        with progress_bars() as bars:
            done = run(options, _share(shard), files, cluster, bars("quantize"))
        if as_json:
            print(json.dumps(done.to_dict()))
        elif done.complete:
            print(f"{done.folder}: {size(done.bytes_before)} -> {size(done.bytes_after)} in {done.files} files")
        else:
            print(f"{done.folder}: {done.done} of {done.files} files; it is a checkpoint once all workers are done")


def _share(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise T2NErrorInvalidArgument(f"--shard {text}: expected I/N, such as 1/4")
    return int(index), int(count)
