"""Options of an LLM export: what the command line takes, as plain data. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.inference_target import TractCheckTolerance, TractNNEF

DtypeName = Literal["f32", "f16", "bf16"]
NamingScheme = Literal["raw", "natural_verbose", "natural_verbose_camel", "numeric"]
DirStruct = Literal["deep", "flat"]
Fallback = Literal["f16", "pad", "error"]
DEFAULT_REGISTRY = "torch_to_nnef.compress.DEFAULT_COMPRESSION"


@dataclass(frozen=True, kw_only=True)
class LlmOptions:
    """What to export, how, and where to; each field is the flag of `t2n_export_llm_to_tract` of that name.

    export_dirpath: the folder to write. It must not exist, unless ignore_already_exist_dir: then our files in it are replaced, in one
    step once the new ones are complete, and others stay.
    model_slug: a model of the hub (or of its offline cache). local_dir: a folder with a checkpoint, or a `.gguf` file. One of both.
    merge_peft: True merges the PEFT adapter that slug or folder is into its base model; a text names an adapter (folder or slug) to merge
    into the model that slug or folder is.
    trust_remote_code: let transformers run code that comes with the checkpoint.
    device_map: `t2n_auto` (in memory if the weights take at most half of what is free, else as the next), `t2n_offload_disk` (weights
    stay in their files until they are needed), `cpu`, or a device map of transformers.
    force_module_dtype: dtype to compute in; None: the checkpoint's own. force_inputs_dtype: dtype of the cache inputs; None: the same.
    compression_registry: `pkg.mod.NAME` of a mapping of methods, found from the current folder too. compression_method: a key of it;
    None: weights stay as they are.
    tensor_type: `PATTERN=METHOD`: the weights that a pattern matches by another method, or kept in `f16` or `f32`; the first that matches
    counts. include, exclude: patterns of the only weights, or of those not, to compress. A pattern is a glob on the name of a weight or of
    its module, or a regex between slashes. fallback: what becomes of rows that Q40 cannot hold: they stay (None), `f16`, `pad`,
    zeros behind them where what reads them allows it, or `error`.
    target_bpw: most bits a weight on average, over those that are packed otherwise; max_kl: most KL(float || compressed) of the next token.
    What costs most for its bytes then stays in f16; measured on 512 tokens of held-out calibration data, or of a built-in text.
    calibration_text: a text file (UTF-8) to learn from, its first calibration_tokens tokens; calibration_npz: instead of it, arrays
    [samples, ...] by the names of the model's inputs, such as `input_ids`. calibration_cache: a file that keeps what was learned of the
    float model's inputs; one that is there already is read, and no data is needed.
    force_f32_attention, force_f32_linear_accumulator, force_f32_normalization: what a half precision model computes in f32.
    reify_sdpa_operator: write attention as tract's own operator (True), spelled out (False), or as is faster (None).
    num_logits_to_keep: positions, counted from the end, that get logits; 0: all; "dynamic": named by an input `logits_to_keep`.
    naming_scheme: how values are named in graph.nnef.
    no_verify: write the archive without running it. tract_check_io_tolerance: how close tract must be to torch, in the four scenarios.
    tract_specific_path: a tract program that checks instead of the linked tract. tract_specific_version: tract to write for.
    test_display_token_gens: show the texts torch and tract generate. eval_text: a text file to take perplexity and KL divergence on.
    sample_generation_total_size: tokens that the sample text and its continuation have together; None: 32 after the sample text.
    dump_with_tokenizer_and_conf: leave the tokenizer and the config in the folder too.
    export_dir_struct: `deep` (folders by kind) or `flat` (all files in one).

    Raises `T2NErrorInvalidArgument` for values that do not fit, `T2NErrorNotFoundFile` for paths that do not exist.
    """

    export_dirpath: Path
    model_slug: str | None = None
    local_dir: Path | None = None
    merge_peft: bool | str = False
    trust_remote_code: bool = False
    device_map: str = "t2n_auto"
    force_module_dtype: DtypeName | None = None
    force_inputs_dtype: DtypeName | None = None
    compression_registry: str = DEFAULT_REGISTRY
    compression_method: str | None = None
    tensor_type: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fallback: Fallback | None = None
    target_bpw: float | None = None
    max_kl: float | None = None
    calibration_text: Path | None = None
    calibration_npz: Path | None = None
    calibration_cache: Path | None = None
    calibration_tokens: int = 8192
    force_f32_attention: bool = False
    force_f32_linear_accumulator: bool = False
    force_f32_normalization: bool = False
    reify_sdpa_operator: bool | None = None
    num_logits_to_keep: int | Literal["dynamic"] = 1
    naming_scheme: NamingScheme = "natural_verbose"
    no_verify: bool = False
    tract_check_io_tolerance: TractCheckTolerance = TractCheckTolerance.APPROXIMATE
    tract_specific_path: Path | None = None
    tract_specific_version: str | None = None
    test_display_token_gens: bool = False
    eval_text: Path | None = None
    sample_generation_total_size: int | None = None
    dump_with_tokenizer_and_conf: bool = False
    export_dir_struct: DirStruct = "deep"
    ignore_already_exist_dir: bool = False

    def __post_init__(self) -> None:
        for name in ("export_dirpath", "calibration_cache", *_READ):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))
        if (self.model_slug is None) == (self.local_dir is None):
            raise T2NErrorInvalidArgument("name the model by model_slug (-s) or local_dir (-d), one of both")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(filter(None, allowed))
                raise T2NErrorInvalidArgument(f"{name}: {value!r} is not one of {choices}")
        for name in _READ:
            if (path := getattr(self, name)) is not None and not path.exists():
                raise T2NErrorNotFoundFile(f"{name}: {path} does not exist")
        _check_count("num_logits_to_keep", self.num_logits_to_keep, 0, "dynamic")
        _check_count("sample_generation_total_size", self.sample_generation_total_size, 2, None)
        _check_count("calibration_tokens", self.calibration_tokens, 2, None)
        if self.calibration_text is not None and self.calibration_npz is not None:
            raise T2NErrorInvalidArgument(
                "calibration data is a text (calibration_text) or arrays (calibration_npz), not both"
            )
        for text in self.tensor_type:
            if not all(text.rpartition("=")[::2]):
                raise T2NErrorInvalidArgument(f"tensor_type: {text!r} is not PATTERN=METHOD")
        if self.merge_peft == "":
            raise T2NErrorInvalidArgument("merge_peft: the name of an adapter is empty")
        object.__setattr__(self, "tract_check_io_tolerance", self.target().check_io_tolerance)

    @property
    def logits(self) -> int | None:
        """`num_logits_to_keep` as `Signature` takes it."""
        return None if self.num_logits_to_keep == "dynamic" else self.num_logits_to_keep

    @property
    def overrides(self) -> dict[str, str]:
        """`tensor_type`: pattern -> method."""
        chosen: dict[str, str] = {}
        for text in self.tensor_type:
            pattern, _, method = text.rpartition("=")
            chosen.setdefault(pattern, method)
        return chosen

    @property
    def compresses(self) -> bool:
        """Whether any weight is to change."""
        return self.compression_method is not None or bool(self.tensor_type)

    @property
    def source(self) -> str:
        """The model as the user named it."""
        return self.model_slug if self.model_slug is not None else str(self.local_dir)

    def target(self, **options: Any) -> TractNNEF:
        """The inference target these options ask for; `options` add to it.

        Raises `T2NErrorInvalidArgument` for a tract version that this build cannot serve.
        """
        target = TractNNEF(
            version=self.tract_specific_version or TractNNEF.latest_version(),
            check_io=not self.no_verify,
            check_io_tolerance=self.tract_check_io_tolerance,
            specific_tract_binary_path=self.tract_specific_path,
            force_attention_inner_in_f32=self.force_f32_attention,
            force_linear_accumulation_in_f32=self.force_f32_linear_accumulator,
            force_norm_in_f32=self.force_f32_normalization,
            reify_sdpa_operator=self.reify_sdpa_operator,
        )
        return replace(target, **options)


_READ = ("local_dir", "tract_specific_path", "eval_text", "calibration_text", "calibration_npz")
_CHOICES = {
    "fallback": (*get_args(Fallback), None),
    "force_module_dtype": (*get_args(DtypeName), None),
    "force_inputs_dtype": (*get_args(DtypeName), None),
    "naming_scheme": get_args(NamingScheme),
    "export_dir_struct": get_args(DirStruct),
}


def _check_count(name: str, value: Any, least: int, instead: str | None) -> None:
    if value == instead:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        alternative = f" or {instead!r}" if instead else ""
        raise T2NErrorInvalidArgument(f"{name}: {value!r} is not a number from {least} on{alternative}")
