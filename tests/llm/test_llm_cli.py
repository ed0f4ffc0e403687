"""The command line: what it takes, what it calls, how it ends, and how soon it answers."""

import dataclasses
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from torch_to_nnef.cli.llm import app
from torch_to_nnef.cli.methods import listing, summary
from torch_to_nnef.exceptions import T2NErrorIOPytorchTractNotISO, T2NErrorNotImplemented
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.llm_tract.options import LlmOptions

API = {
    "export_dirpath": "-e", "model_slug": "-s", "local_dir": "-d", "force_module_dtype": "-dt", "force_inputs_dtype": "-idt",
    "merge_peft": "-mp", "compression_registry": None, "compression_method": "-c", "force_f32_attention": "-f32-attn",
    "force_f32_linear_accumulator": "-f32-lin-acc", "force_f32_normalization": "-f32-norm", "reify_sdpa_operator": None,
    "num_logits_to_keep": None, "device_map": None, "tract_check_io_tolerance": "-tt", "naming_scheme": "-n",
    "tract_specific_path": None, "tract_specific_version": None, "test_display_token_gens": "-td",
    "dump_with_tokenizer_and_conf": "-dwtac", "export_dir_struct": None, "sample_generation_total_size": "-sgts",
    "no_verify": "-nv", "trust_remote_code": None, "ignore_already_exist_dir": "-iaed", "eval_text": None,
    "tensor_type": None, "include": None, "exclude": None, "fallback": None, "target_bpw": None, "max_kl": None,
    "calibration_text": None, "calibration_npz": None, "calibration_cache": None, "calibration_tokens": None,
}  # fmt: skip


@dataclasses.dataclass
class FakeReport:
    verified: bool = True
    ok: bool = True

    def to_dict(self):
        return {"ok": self.ok}

    def __rich__(self):
        return "the report"


@pytest.fixture
def run(monkeypatch):
    """Run the command with `export_llm` replaced; `run.options` is what it was called with, `run.outcome` what it does."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def export_llm(options):
        run.options = options
        if isinstance(run.outcome, BaseException):
            raise run.outcome
        return run.outcome() if callable(run.outcome) else run.outcome

    def run(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    monkeypatch.setitem(sys.modules, "torch_to_nnef.llm_tract.export", SimpleNamespace(export_llm=export_llm))
    run.options, run.outcome = None, FakeReport()
    return run


def in_subprocess(*args):
    code = (
        "import sys; from torch_to_nnef.cli import t2n_export_llm_to_tract; sys.argv[0] = 't2n_export_llm_to_tract'; "
    )
    return subprocess.run(
        [sys.executable, "-c", code + "t2n_export_llm_to_tract()", *args], capture_output=True, text=True, check=False
    )


def test_help_is_quick_and_names_every_flag():
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        answer = in_subprocess("--help")
        durations.append(time.perf_counter() - start)
    assert answer.returncode == 0
    for field, short in API.items():
        assert f"--{field.replace('_', '-')}" in answer.stdout
        assert short is None or f"  {short}, " in answer.stdout
    # 0.2 s where nothing else runs; with torch it would be seconds.
    assert min(durations) < 1.5


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom torch_to_nnef.cli.llm import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'peft') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_field_of_the_options_is_a_flag():
    assert {field.name for field in dataclasses.fields(LlmOptions)} == set(API)


def test_defaults_are_those_of_the_options(run):
    assert run("-e", "out", "-s", "owner/name").exit_code == 0
    assert run.options == LlmOptions(export_dirpath=Path("out"), model_slug="owner/name")


def test_every_flag_reaches_the_options(run, tmp_path, monkeypatch):
    # Here it is not the target that is tested.
    monkeypatch.setattr("torch_to_nnef.inference_target.tract.UNSERVED_OPTIONS", {})
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    result = run(
        *("-e", "out", "-d", tmp_path, "-dt", "f16", "-idt", "f32", "-mp", "owner/adapter", "-c", "min_max_q4_0_all"),
        *("-f32-attn", "-f32-lin-acc", "-f32-norm", "--no-reify-sdpa-operator", "--num-logits-to-keep", "dynamic"),
        *("--device-map", "t2n_offload_disk", "-tt", "ultra", "-n", "numeric", "--export-dir-struct", "flat", "-td"),
        *("-dwtac", "-sgts", "40", "-nv", "-v", "--trust-remote-code", "-iaed", "--eval-text", text),
    )
    assert result.exit_code == 0, result.output
    assert run.options == LlmOptions(
        export_dirpath=Path("out"),
        local_dir=tmp_path,
        merge_peft="owner/adapter",
        trust_remote_code=True,
        device_map="t2n_offload_disk",
        force_module_dtype="f16",
        force_inputs_dtype="f32",
        compression_method="min_max_q4_0_all",
        force_f32_attention=True,
        force_f32_linear_accumulator=True,
        force_f32_normalization=True,
        reify_sdpa_operator=False,
        num_logits_to_keep="dynamic",
        naming_scheme="numeric",
        no_verify=True,
        tract_check_io_tolerance=TractCheckTolerance.ULTRA,
        test_display_token_gens=True,
        eval_text=text,
        sample_generation_total_size=40,
        dump_with_tokenizer_and_conf=True,
        export_dir_struct="flat",
        ignore_already_exist_dir=True,
    )


def test_an_adapter_may_stand_for_itself(run):
    assert run("-mp", "-s", "owner/adapter", "-e", "out").exit_code == 0
    assert run.options.merge_peft is True
    assert run("-s", "owner/adapter", "-e", "out", "-mp").exit_code == 0
    assert run.options.merge_peft is True
    assert run("-s", "owner/base", "-e", "out").exit_code == 0
    assert run.options.merge_peft is False


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "-e DIR"),
        (["-s", "a/b"], "-e DIR"),
        (["-e", "out"], "one of both"),
        (["-e", "out", "-s", "a/b", "-d", "."], "one of both"),
        (["-e", "out", "-d", "nowhere"], "nowhere does not exist"),
        (["-e", "out", "-s", "a/b", "-dt", "f64"], "f64"),
        (["-e", "out", "-s", "a/b", "-tt", "perfect"], "perfect"),
        (["-e", "out", "-s", "a/b", "-sgts", "1"], "sample_generation_total_size"),
        (["-e", "out", "-s", "a/b", "--num-logits-to-keep", "-1"], "num_logits_to_keep"),
        (["-e", "out", "-s", "a/b", "--num-logits-to-keep", "all"], "num_logits_to_keep"),
        (["-e", "out", "-s", "a/b", "--tract-specific-version", "0.1.2"], "serves '0.23.9' only"),
        (["-e", "out", "-s", "a/b", "--tract-specific-path", "nowhere"], "nowhere does not exist"),
        (["-e", "out", "-s", "a/b", "--eval-text", "nowhere"], "nowhere does not exist"),
        (["-e", "out", "-s", "a/b", "--compression-registry", "no.such.REGISTRY", "-c", "x"], "no.such"),
        (["-e", "out", "-s", "a/b", "--unknown"], "--unknown"),
    ],
)
def test_mistakes_are_told_on_stderr_before_anything_is_done(run, args, says):
    result = run(*args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert run.options is None


@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        (FakeReport(), 0, ""),
        (FakeReport(verified=False, ok=False), 0, ""),
        (FakeReport(ok=False), 1, ""),
        (T2NErrorIOPytorchTractNotISO("outputs differ"), 1, "verification failed: outputs differ\n"),
        (T2NErrorNotImplemented("mamba cannot"), 2, "error: mamba cannot\n"),
        (ModuleNotFoundError("No module named 'transformers'", name="transformers"), 2, "pip install"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(run, outcome, code, says):
    run.outcome = outcome
    result = run("-e", "out", "-s", "owner/name")
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert ("the report" in result.stdout) is isinstance(outcome, FakeReport)


def test_tracebacks_are_shown_if_asked_for_or_unexpected(run):
    run.outcome = T2NErrorNotImplemented("mamba cannot")
    result = run("-e", "out", "-s", "owner/name", "-v")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    run.outcome = ZeroDivisionError("a bug")
    result = run("-e", "out", "-s", "owner/name")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "unexpected ZeroDivisionError: a bug" in result.stderr


def test_the_report_is_json_if_asked_for(run):
    assert run("-e", "out", "-s", "owner/name", "--json").stdout == '{"ok": true}\n'


def test_logs_go_to_stderr_and_leave_logging_as_it_was(run):
    def export():
        logging.getLogger("torch_to_nnef").info("our progress")
        logging.getLogger("other").warning("their gossip")
        warnings.warn("their warning", stacklevel=1)
        return FakeReport()

    before = list(logging.getLogger().handlers)
    run.outcome = export
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        quiet = run("-e", "out", "-s", "owner/name")
        verbose = run("-e", "out", "-s", "owner/name", "-v")
    assert quiet.stderr == "our progress\n"
    assert "their gossip" in verbose.stderr
    assert "their warning" in verbose.stderr
    assert "our progress" not in quiet.stdout
    assert logging.getLogger().handlers == before
    assert logging.getLogger("torch_to_nnef").level == logging.NOTSET


# Methods


@pytest.mark.parametrize("args", [["-c"], ["-c", "list"], ["-c", "-v"], ["--compression-method"]])
def test_c_without_a_value_lists_the_methods(run, args):
    result = run(*args)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    keys = [line.split()[0] for line in lines]
    assert keys[0] == "q40"
    assert {"min_max_q4_0", "q40_gptq"} < set(keys)
    assert all(len(line.split()) > 3 for line in lines)
    assert run.options is None


def test_an_unknown_method_is_refused_with_the_list(run):
    result = run("-e", "out", "-s", "owner/name", "-c", "q5")
    assert result.exit_code == 2
    assert "no compression method 'q5'" in result.stderr
    assert "min_max_q4_0_with_embeddings_99" in result.stderr
    assert run.options is None


def test_a_registry_in_the_current_folder_is_found(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_methods_of_test", raising=False)
    Path("my_methods_of_test.py").write_text('def mine(model, **kw):\n    "Keeps all."\n\nMINE = {"mine": mine}\n')
    registry = ("--compression-registry", "my_methods_of_test.MINE")
    assert run(*registry, "-c").stdout == "mine  Keeps all.\n"
    assert run(*registry, "-c", "mine", "-e", "out", "-s", "owner/name").exit_code == 0
    assert (run.options.compression_registry, run.options.compression_method) == ("my_methods_of_test.MINE", "mine")


def test_a_method_is_described_by_its_docstring_and_what_it_binds():
    from functools import partial

    def method(model, classes=(), percentile=1.0, **kw):
        """Do it.

        In detail.
        """

    class Method:
        """An object."""

        def __call__(self, model, **kw):
            return model

    assert summary(method) == "Do it."
    assert summary(partial(method, percentile=0.99, classes=(int, str))) == "Do it. [percentile=0.99, classes=int|str]"
    assert summary(partial(partial(method, percentile=0.99), method="name")) == "Do it. [percentile=0.99]"
    assert summary(Method()) == "An object."
    assert summary(lambda model: model) == ""
    assert listing({"a": method, "long": lambda model: model}) == "a     Do it.\nlong"


def test_t2n_answers_quickly_too():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom torch_to_nnef.cli.main import app\n"
        "print(CliRunner().invoke(app, ['--help']).stdout, CliRunner().invoke(app, ['--version']).stdout)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("Usage:")
    assert "tract 0." in answer.stdout
    assert answer.stdout.endswith("[]\n")
