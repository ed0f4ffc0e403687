"""`t2n sensitivity`, and the budgets of the export command: on a tiny model, through the command line."""

import json
import subprocess
import sys
import time

import pytest
from tests.llm.tiny import TEXT, tiny_llama
from typer.testing import CliRunner

from torch_to_nnef.cli.main import app
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions

LINEARS = 2 * 7 + 2  # two blocks, the embedding and the head


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return lambda *args: CliRunner().invoke(app, ["sensitivity", *map(str, args)])


def test_json_has_every_weight_the_worst_first(run, checkpoint):
    result = run("-d", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    costs = [row["cost"] for row in found["costs"]]
    assert len(costs) == LINEARS
    assert costs == sorted(costs, reverse=True)
    assert all(cost > 0 for cost in costs)
    assert found["method"] == "q40"
    assert found["tokens"] > 0


def test_table_and_calibration_text_and_filters(run, checkpoint, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text(TEXT * 3)
    given = ["-d", checkpoint, "--calibration-text", text, "--method", "q40_gptq", "--include", "*.mlp.*"]
    result = run(*given, "--exclude", "/layers.1.mlp.up/")
    assert result.exit_code == 0, result.output
    assert "down_proj" in result.stdout
    assert "q_proj" not in result.stdout
    assert "layers.1.mlp.up" not in result.stdout
    assert "KL to float" in result.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "nothing"], "no compression method 'nothing'"),
        (["--method", "q40_gptq"], "learns from data"),
        (["--include", "nothing.*"], "selects none"),
    ],
)
def test_mistakes_are_told(run, checkpoint, args, said):
    result = run("-d", checkpoint, *args)
    assert result.exit_code == 2
    assert said in result.output


def test_help_is_quick():
    began = time.process_time()
    code = "import sys; sys.argv = ['t2n', 'sensitivity', '--help']; from torch_to_nnef.cli import t2n; t2n()"
    run = [sys.executable, "-X", "importtime", "-c", code]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    assert " torch\n" not in text
    assert time.process_time() - began < 2


@pytest.mark.parametrize("asked", [{"target_bpw": 7.0}, {"max_kl": 0.01}])
def test_export_within_a_budget(checkpoint, tmp_path, asked):
    report = export_llm(
        LlmOptions(export_dirpath=tmp_path / "out", local_dir=checkpoint, compression_method="q40", **asked)
    )
    assert report.ok
    packed = [row for row in report.rows if row.quantized]
    kept = [row for row in packed if row.storage == "f16"]
    assert len(packed) == LINEARS
    assert 0 < len(kept) < LINEARS
    assert all("KL in q40 alone" in row.method for row in kept)
