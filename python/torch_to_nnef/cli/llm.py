"""`t2n_export_llm_to_tract`: a causal language model, from checkpoint to a folder with a verified archive."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand

from torch_to_nnef.cli.arguments import Verbose
from torch_to_nnef.cli.outcome import Outcome, outcome
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.llm_tract.options import DirStruct, DtypeName, Fallback, LlmOptions, NamingScheme

_LIST, _ITSELF = "list", ""
# Options that may stand without a value, and what that means.
_BARE = {"-c": _LIST, "--compression-method": _LIST, "-mp": _ITSELF, "--merge-peft": _ITSELF}


class _WithBareOptions(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for arg, after in zip(args, [*args[1:], "-"], strict=False):  # one more than none
            given += [arg, _BARE[arg]] if arg in _BARE and after.startswith("-") else [arg]
        return super().parse_args(ctx, given)


# Plain help: the other cuts long names.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(cls=_WithBareOptions)
def export_llm_to_tract(
    ctx: typer.Context,
    export_dirpath: Annotated[Path | None, Option("-e", "--export-dirpath", help="Folder to write (required).")] = None,
    model_slug: Annotated[
        str | None,
        Option("-s", "--model-slug", help="Model of the Hugging Face hub; of GGUF repositories owner/name/file.gguf."),
    ] = LlmOptions.model_slug,
    local_dir: Annotated[
        Path | None, Option("-d", "--local-dir", help="Folder with a checkpoint, or a .gguf file.")
    ] = LlmOptions.local_dir,
    merge_peft: Annotated[
        str | None,
        Option(
            "-mp",
            "--merge-peft",
            metavar="[ADAPTER]",
            help="Merge a PEFT adapter (folder or slug) into the model; without a value: the model is an "
            "adapter, to merge into its base.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code/--no-trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = LlmOptions.trust_remote_code,
    device_map: Annotated[
        str,
        Option(
            "--device-map",
            help="t2n_auto: in memory if half of what is free suffices, else t2n_offload_disk: weights stay "
            "in their files until needed; or a device map of transformers.",
        ),
    ] = LlmOptions.device_map,
    force_module_dtype: Annotated[
        DtypeName | None, Option("-dt", "--force-module-dtype", help="Type of the model; default: the checkpoint's.")
    ] = LlmOptions.force_module_dtype,
    force_inputs_dtype: Annotated[
        DtypeName | None, Option("-idt", "--force-inputs-dtype", help="Type of the caches; default: the model's.")
    ] = LlmOptions.force_inputs_dtype,
    compression_method: Annotated[
        str | None,
        Option(
            "-c", "--compression-method", metavar="[KEY]", help="How to quantize; without a value: list the methods."
        ),
    ] = LlmOptions.compression_method,
    compression_registry: Annotated[
        str,
        Option("--compression-registry", help="Mapping of methods as pkg.mod.NAME, found from the current folder too."),
    ] = LlmOptions.compression_registry,
    tensor_type: Annotated[
        list[str] | None,
        Option(
            "--tensor-type",
            metavar="PATTERN=METHOD",
            help="Weights that a pattern matches by another method, or kept in f16 or f32; repeat it, the first match counts. "
            "A pattern is a glob on the name of a weight or its module, or a /regex/.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, Option("--include", metavar="PATTERN", help="Compress only these weights; repeat it.")
    ] = None,
    exclude: Annotated[
        list[str] | None, Option("--exclude", metavar="PATTERN", help="Leave these weights; repeat it.")
    ] = None,
    fallback: Annotated[
        Fallback | None,
        Option(
            "--fallback",
            help="Weights with rows that Q40 cannot hold: f16, pad (with zeros), error, or (default) as they are.",
        ),
    ] = LlmOptions.fallback,
    target_bpw: Annotated[
        float | None,
        Option("--target-bpw", metavar="BITS", help="Keep in f16 what costs most, with so many bits a weight at most."),
    ] = LlmOptions.target_bpw,
    max_kl: Annotated[
        float | None,
        Option(
            "--max-kl", metavar="NATS", help="Keep in f16 as little as brings the KL divergence from float to this."
        ),
    ] = LlmOptions.max_kl,
    calibration_text: Annotated[
        Path | None, Option("--calibration-text", help="Text file that methods learn from.")
    ] = LlmOptions.calibration_text,
    calibration_npz: Annotated[
        Path | None,
        Option("--calibration-npz", help="Arrays [samples, ...] that methods learn from, by input name: input_ids..."),
    ] = LlmOptions.calibration_npz,
    calibration_cache: Annotated[
        Path | None,
        Option(
            "--calibration-cache", help="File that keeps what was learned of the inputs of weights, to use it again."
        ),
    ] = LlmOptions.calibration_cache,
    calibration_tokens: Annotated[
        int, Option("--calibration-tokens", metavar="N", help="How much of the text is read.")
    ] = LlmOptions.calibration_tokens,
    force_f32_attention: Annotated[
        bool, Option("-f32-attn", "--force-f32-attention", help="Attention computes in f32.")
    ] = LlmOptions.force_f32_attention,
    force_f32_linear_accumulator: Annotated[
        bool, Option("-f32-lin-acc", "--force-f32-linear-accumulator", help="Linear layers sum in f32.")
    ] = LlmOptions.force_f32_linear_accumulator,
    force_f32_normalization: Annotated[
        bool, Option("-f32-norm", "--force-f32-normalization", help="Normalizations compute in f32.")
    ] = LlmOptions.force_f32_normalization,
    reify_sdpa_operator: Annotated[
        bool | None,
        Option(
            "--reify-sdpa-operator/--no-reify-sdpa-operator",
            help="Attention as tract's operator, or spelled out; default: the faster.",
        ),
    ] = LlmOptions.reify_sdpa_operator,
    num_logits_to_keep: Annotated[
        str,
        Option(
            "--num-logits-to-keep",
            metavar="N|dynamic",
            help="Positions, from the end, that get logits; 0: all; dynamic: an input names them.",
        ),
    ] = str(LlmOptions.num_logits_to_keep),
    naming_scheme: Annotated[
        NamingScheme, Option("-n", "--naming-scheme", help="Names of values in graph.nnef.")
    ] = LlmOptions.naming_scheme,
    tract_check_io_tolerance: Annotated[
        TractCheckTolerance, Option("-tt", "--tract-check-io-tolerance", help="How close tract must be to torch.")
    ] = LlmOptions.tract_check_io_tolerance,
    tract_specific_path: Annotated[
        Path | None, Option("--tract-specific-path", help="tract program that checks instead of the built-in tract.")
    ] = LlmOptions.tract_specific_path,
    tract_specific_version: Annotated[
        str | None, Option("--tract-specific-version", help="Version of tract to write for.")
    ] = LlmOptions.tract_specific_version,
    no_verify: Annotated[
        bool, Option("-nv", "--no-verify", help="Write the archive without running it.")
    ] = LlmOptions.no_verify,
    sample_generation_total_size: Annotated[
        int | None,
        Option("-sgts", "--sample-generation-total-size", metavar="N", help="Tokens of the samples it is verified on."),
    ] = LlmOptions.sample_generation_total_size,
    test_display_token_gens: Annotated[
        bool, Option("-td", "--test-display-token-gens", help="Show the texts that torch and tract generate.")
    ] = LlmOptions.test_display_token_gens,
    eval_text: Annotated[
        Path | None, Option("--eval-text", help="Text file to take perplexity and KL divergence on.")
    ] = LlmOptions.eval_text,
    dump_with_tokenizer_and_conf: Annotated[
        bool, Option("-dwtac", "--dump-with-tokenizer-and-conf", help="Leave the tokenizer and the config too.")
    ] = LlmOptions.dump_with_tokenizer_and_conf,
    export_dir_struct: Annotated[
        DirStruct, Option("--export-dir-struct", help="Files in folders by kind, or all in one.")
    ] = LlmOptions.export_dir_struct,
    ignore_already_exist_dir: Annotated[
        bool,
        Option(
            "-iaed",
            "--ignore-already-exist-dir",
            "--force",
            help="Replace the export in a folder that exists; other files in it stay.",
        ),
    ] = LlmOptions.ignore_already_exist_dir,
    as_json: Annotated[bool, Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Export a causal language model to an archive for tract, and verify it.

    Exits with 0 if all is well, 1 if tract's results are not torch's, 2 after an error, 130 when interrupted.
    """
    with outcome(verbose):
        _run(ctx.params, as_json)


def _run(given: dict[str, Any], as_json: bool) -> None:
    method, registry = given["compression_method"], given["compression_registry"]
    if method is not None and _is_listing(method, registry):
        return
    if given["export_dirpath"] is None:
        raise T2NErrorInvalidArgument("name the folder to write: -e DIR")
    values: dict[str, Any] = {field.name: given[field.name] for field in fields(LlmOptions)}
    values |= {name: read(values[name]) for name, read in _READ.items()}
    options = LlmOptions(**values)

    from torch_to_nnef.llm_tract.export import export_llm

    report = export_llm(options)
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(report)
    if report.verified and not report.ok:
        raise SystemExit(Outcome.NEGATIVE)


# Texts of the command line that are something else in `LlmOptions`.
_READ: dict[str, Callable[[Any], Any]] = {
    "tensor_type": lambda texts: tuple(texts or ()),
    "include": lambda texts: tuple(texts or ()),
    "exclude": lambda texts: tuple(texts or ()),
    "num_logits_to_keep": lambda text: int(text) if text.isdecimal() else text,
    "merge_peft": lambda text: text is not None and (text or True),
}


def _is_listing(key: str, registry: str) -> bool:
    """Print the methods if that is what `key` asks for. Raises `T2NErrorInvalidArgument` if it is none of them."""
    from torch_to_nnef.cli.methods import listing
    from torch_to_nnef.compress import dynamic_load_registry

    methods = dynamic_load_registry(registry)
    if key in methods:
        return False
    if key != _LIST:
        raise T2NErrorInvalidArgument(f"no compression method {key!r}; {registry} has\n{listing(methods)}")
    print(listing(methods))
    return True
