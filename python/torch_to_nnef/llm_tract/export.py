"""A checkpoint to a folder with a verified archive: all that `t2n_export_llm_to_tract` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from torch_to_nnef._native import __version__, tract_version
from torch_to_nnef.compress import Choice, dynamic_load_registry
from torch_to_nnef.exceptions import T2NError, T2NErrorIOPytorchTractNotISO
from torch_to_nnef.export import Naming, Plan, Steps, captured_graph, locate, relower
from torch_to_nnef.files import require_space
from torch_to_nnef.graph.convert import to_graph
from torch_to_nnef.graph.folds import find_folds
from torch_to_nnef.graph.inputs import prepare
from torch_to_nnef.graph.uses import weight_uses
from torch_to_nnef.llm_tract.calibration import calibration_of, check_calibration, judged_on
from torch_to_nnef.llm_tract.card import model_card
from torch_to_nnef.llm_tract.causal import Signature, as_step
from torch_to_nnef.llm_tract.checkpoint import DTYPES, Checkpoint
from torch_to_nnef.llm_tract.families import attention_of, step_signature, vocabulary_of
from torch_to_nnef.llm_tract.generation import GenerationComparison, TorchSteps, compare_generation, texts
from torch_to_nnef.llm_tract.layout import Layout, modes, properties, replaced_folder
from torch_to_nnef.llm_tract.precision import cache_dtype, forced_for, widened
from torch_to_nnef.llm_tract.quality import FloatReference, Quality
from torch_to_nnef.llm_tract.report import LlmReport, condensed
from torch_to_nnef.llm_tract.scenarios import scenarios, verify_scenarios
from torch_to_nnef.llm_tract.steps import TractSteps
from torch_to_nnef.llm_tract.texts import PROSE, QUESTION, windows
from torch_to_nnef.log import LOGGER
from torch_to_nnef.nnef.names import VariableNamingScheme
from torch_to_nnef.nnef.writer import write_archive
from torch_to_nnef.quantize.apply import row_of
from torch_to_nnef.quantize.budget import Budget
from torch_to_nnef.quantize.rows import TensorRow, record, recording
from torch_to_nnef.quantize.targets import Selection, find_targets
from torch_to_nnef.report import Section, Totals
from torch_to_nnef.report.progress import progress_bars
from torch_to_nnef.report.words import size
from torch_to_nnef.tensor.quant import stored_nbytes
from torch_to_nnef.tract_model import TractModel
from torch_to_nnef.turns import one_at_a_time
from torch_to_nnef.verify import Comparison, raise_on_mismatch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from torch_to_nnef.graph.capture import Captured
    from torch_to_nnef.graph.ir import Graph
    from torch_to_nnef.inference_target import TractNNEF
    from torch_to_nnef.llm_tract.options import LlmOptions
    from torch_to_nnef.quantize.apply import Progress

_GENERATED = 32  # tokens compared


@one_at_a_time
def export_llm(options: LlmOptions) -> LlmReport:
    """Load, compress, export and verify what `options` name, and leave it in `options.export_dirpath`; returns the report.

    The folder appears whole, or not at all if anything fails. Raises what `LlmOptions`, `Checkpoint`, `step_signature` and
    `export_model_to_nnef` raise; `T2NErrorIOPytorchTractNotISO` if tract's outputs, or the text it generates, are not torch's.
    """
    choice = _choice(options)
    check_calibration(options, choice.methods)
    with replaced_folder(options) as layout:
        checkpoint = Checkpoint.find(options)
        trusted, cached = options.trust_remote_code, options.force_inputs_dtype
        signature = step_signature(checkpoint.config, options.logits, trust_remote_code=trusted)
        work = Work(options, checkpoint, replace(signature, cached=cached and cache_dtype(cached)))
        with work.steps("load"):
            work.load()
        return work.export(choice, layout)


@dataclass
class Work:
    """An export on its way: what is known from the start, then the model, then what was found out."""

    options: LlmOptions
    checkpoint: Checkpoint
    signature: Signature
    steps: Steps = field(default_factory=Steps)
    notes: list[str] = field(default_factory=list)
    model: PreTrainedModel = field(init=False)
    tokenizer: PreTrainedTokenizerBase | None = field(init=False)
    forced: Mapping[str, str] = field(init=False)

    def note(self, text: str) -> None:
        """Say it now, and in the report."""
        LOGGER.warning("%s", text)
        self.notes.append(text)

    def load(self) -> None:
        """Model and tokenizer."""
        try:
            self.tokenizer = self.checkpoint.tokenizer()
        except T2NError as error:
            if self.options.dump_with_tokenizer_and_conf or self.options.eval_text is not None:
                raise
            self.tokenizer = None
            self.note(f"without a tokenizer there are no texts, so neither perplexity nor answers ({error})")
        attention = attention_of(self.checkpoint.config)
        self.model = widened(self.checkpoint.load(self._dtype(), self.options.device_map, attention))
        self.forced = forced_for(self.checkpoint.config, self.model.dtype)
        for option, reason in self.forced.items():
            self.note(f"{option}: {reason}")

    def _dtype(self) -> torch.dtype:
        """To load in: what was asked for, or is stored; bf16 as f32, which has all its numbers."""
        stored, asked = self.checkpoint.dtype, self.options.force_module_dtype
        dtype = DTYPES[asked] if asked else stored
        return torch.float32 if dtype is stored is torch.bfloat16 else dtype

    def export(self, choice: Choice, layout: Layout) -> LlmReport:
        """From the loaded model to the files of `layout`."""
        original = Totals.of((), *_extent(self.model))
        # At least: all packed to 4.5 bits, if any, and half of it compressed away.
        least = original.parameter_count * 9 // 16 if choice.methods else original.parameter_bytes_before
        require_space(layout.archive, least // 2)
        with self._float_reference() as reference, recording() as rows, progress_bars() as bars:
            with self.steps("capture"):
                captured, graph = self.capture()
            with self.steps("compress"):
                if choice.methods:
                    captured, graph = self._compress(choice, captured, graph, layout, bars("compress"))
                elif self.checkpoint.packed:
                    for weight in find_targets(self.model, None, Selection(weight_uses(graph))):
                        record(row_of(weight, None, ""))
            with self.steps("lower"):
                target = self._target(rows)
                plan = self._plan(captured, graph, target)
            with self.steps("write"):
                layout.archive.parent.mkdir(exist_ok=True)
                archive_bytes = write_archive(plan.document, layout.archive, "tgz", None, bars("write"))
            if self.options.no_verify:
                found = _Findings()
            else:
                with self.steps("verify"):
                    found = self._verify(plan, layout, reference)
        report = LlmReport(
            model=self.checkpoint.name,
            method=self.method,
            archive_path=replace(layout, folder=self.options.export_dirpath).archive,
            archive_bytes=archive_bytes,
            rows=tuple(rows),
            totals=_totals(rows, self.model, original),
            archive=found.archive,
            arithmetic=plan.arithmetic(),
            generation=found.generation,
            quality=found.quality,
            notes=tuple(self.notes),
            sections=self._sections(found, reference),
            steps=self.steps.taken(),
            versions={"torch": torch.__version__, "tract": tract_version, "torch_to_nnef": __version__},
        )
        self._write(report, layout)
        return report

    @property
    def method(self) -> str | None:
        """By which weights are packed, now or before."""
        return self.options.compression_method or self.checkpoint.packed

    def _float_reference(self) -> AbstractContextManager[FloatReference | None]:
        """The model on a text before its weights change."""
        if self.options.no_verify or self.tokenizer is None:
            return nullcontext()
        with self.steps("read a text in float"):
            text = windows(self.tokenizer, self.options.eval_text, context=self.signature.context)
            steps = TorchSteps(self.model, self.signature)
            name = "packed torch" if self.checkpoint.packed else "float torch"
            return FloatReference(steps, text, self.tokenizer, _extent(self.model)[1], name)

    def capture(self) -> tuple[Captured, Graph]:
        """The graph of a step, with its symbols."""
        step = as_step(self.model, self.signature)
        axes = self.signature.dynamic_axes
        return captured_graph(step, prepare(step, self._sample(), self.signature.input_names, axes))

    def _sample(self) -> tuple[torch.Tensor, ...]:
        return self.signature.sample(vocabulary_of(self.model.config), self.model.dtype)

    def _compress(
        self, choice: Choice, captured: Captured, graph: Graph, layout: Layout, progress: Progress
    ) -> tuple[Captured, Graph]:
        """Apply `choice`; the capture holds as long as the modules are the same ones, whatever their weights."""
        before = _modules(self.model)
        options = self.options
        calibration = calibration_of(options, self.model, self.tokenizer, self.signature.context)
        uses, folds = weight_uses(graph), find_folds(graph, self.signature.carried_positions)
        self.model = choice(
            self.model,
            Selection(uses, options.include or None, options.exclude or None, folds),
            judged_on(calibration, self.tokenizer, self.signature.context) if choice.budget else (),
            tokenizer=self.tokenizer,
            export_dirpath=layout.folder,
            local_dir=self.checkpoint.folder,
            progress=progress,
            calibration=calibration,
            calibration_cache=options.calibration_cache,
        )
        if _modules(self.model) != before:
            return self.capture()
        captured = captured.rebind(self.model)
        return captured, to_graph(captured)

    def _target(self, rows: Sequence[TensorRow]) -> TractNNEF:
        """With properties that say what was done, `rows` being what became of the weights."""
        forced = dict.fromkeys(self.forced, True)
        target = self.options.target(dynamic_axes=self.signature.dynamic_axes, **forced)
        said = properties(self.checkpoint, self.signature, target, self.model.dtype, self.method, rows)
        return replace(target, specific_properties=said)

    def _plan(self, captured: Captured, graph: Graph, target: TractNNEF) -> Plan:
        names = self.signature
        naming = Naming(names.input_names, names.output_names, scheme=VariableNamingScheme(self.options.naming_scheme))
        return relower(captured, graph, type(self.model).__name__, target, naming, names.extensions)

    def _verify(self, plan: Plan, layout: Layout, reference: FloatReference | None) -> _Findings:
        """The scenarios, then text; raises at the first that is wrong."""
        held = sum(stored_nbytes(variable.tensor) for variable in plan.document.variables)
        LOGGER.info("verification: tract holds the archive too, about %s", size(held))
        step, tolerance = as_step(self.model, self.signature), self.options.tract_check_io_tolerance
        ids = self._ids(PROSE)
        runs = scenarios(step, self.signature, self._sample(), ids, self.options.sample_generation_total_size)
        layout.write_tests(runs)
        tract = TractModel.load(layout.archive)
        names = plan.document.outputs
        archive = verify_scenarios(
            tract, runs, tolerance, lambda inputs: dict(zip(names, plan.slack(inputs), strict=True))
        )
        sets = [run.input_set for run in runs]
        raise_on_mismatch(archive, sets, lambda inputs: locate(plan, layout.archive, inputs, tolerance), plan.advice)
        found = _Findings(tuple(map(condensed, archive)))
        if (self.signature.logits or 0) > 1:
            self.note("the archive takes no single token, so no text was generated: --num-logits-to-keep 1 can")
            return found
        in_torch, in_tract = TorchSteps(self.model, self.signature), TractSteps(tract)
        context = self.signature.context or 2 * _GENERATED
        prompt = self._ids(QUESTION)[: context // 2]
        count = min(_GENERATED, context - len(prompt))
        slack = max(output.slack for run in archive for output in run.outputs if output.name == names[0])
        found.generation = compare_generation(in_torch, in_tract, prompt, count, tolerance, self.model.dtype, slack)
        if not found.generation.ok:
            raise T2NErrorIOPytorchTractNotISO(f"tract does not generate torch's text: {found.generation}")
        if reference is not None:
            forms = [("quantized torch", in_torch, _extent(self.model)[1])] if self.options.compresses else []
            found.quality = reference.quality([*forms, ("archive in tract", in_tract, tract.weight_bytes)])
        return found

    def _sections(self, found: _Findings, reference: FloatReference | None) -> tuple[Section, ...]:
        """The tables of an `LlmReport` beside those of every report."""
        tables = [found.quality.section()] if found.quality else []
        if found.generation is not None:
            tables.append(Section("Greedy text: torch against tract", ("outcome",), ((str(found.generation),),)))
            if self.options.test_display_token_gens and self.tokenizer is not None and reference is not None:
                tables.append(texts(self.tokenizer, found.generation, reference.answer))
        if self.notes:
            tables.append(Section("Notes", ("",), tuple((note,) for note in self.notes)))
        return tuple(tables)

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text; without a tokenizer, any."""
        if self.tokenizer is None:
            generator = torch.Generator().manual_seed(0)
            some: list[int] = torch.randint(
                vocabulary_of(self.model.config), (_GENERATED,), generator=generator
            ).tolist()
            return some
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _write(self, report: LlmReport, layout: Layout) -> None:
        config, name = self.model.config, self.checkpoint.name
        how = modes(
            self.signature,
            name=name,
            model_type=config.model_type,
            vocabulary=vocabulary_of(config),
            dtype=self.signature.cached or self.model.dtype,
            eos_ids=self.checkpoint.eos_ids,
        )
        tokenizer = self.tokenizer if self.options.dump_with_tokenizer_and_conf else None
        layout.write(report, model_card(report, how), how, config, tokenizer)


@dataclass
class _Findings:
    """What verification found."""

    archive: tuple[Comparison, ...] = ()
    generation: GenerationComparison | None = None
    quality: Quality | None = None


def _choice(options: LlmOptions) -> Choice:
    """Before anything is loaded. Raises `T2NErrorInvalidArgument` for a registry or a key that is not there."""
    registry = dynamic_load_registry(options.compression_registry)
    return Choice(
        options.compression_method,
        registry,
        options.overrides,
        options.fallback,
        Budget(options.target_bpw, options.max_kl),
    )


def _modules(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def _extent(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, and the bytes they take; shared ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(stored_nbytes(p) for p in parameters)


def _totals(rows: Sequence[TensorRow], model: nn.Module, original: Totals) -> Totals:
    return replace(
        Totals.of(rows), parameter_count=original.parameter_count,
        parameter_bytes_before=original.parameter_bytes_before, parameter_bytes_after=_extent(model)[1],
    )  # fmt: skip
