"""Two archives on the same inputs, in Python and by `t2n compare`."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from torch_to_nnef import TractModel, quantize_and_verify
from torch_to_nnef.cli.main import app
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.tract_model import Fact
from torch_to_nnef.verify.side_by_side import random_inputs, side_by_side

APPROXIMATE = TractCheckTolerance.APPROXIMATE


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Of one net: in float, and packed."""
    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 24)).eval()
    ids, names = torch.randint(20, (2, 5)), {"input_names": ["ids"], "output_names": ["logits"]}
    for name, method in (("float", None), ("packed", "q40")):
        quantize_and_verify(
            model, ids, folder / f"{name}.nnef.tgz", method, dynamic_axes={"ids": {0: "B", 1: "S"}}, **names
        )
    return folder


def run(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def test_distances_are_those_of_the_outputs(archives):
    a, b = (TractModel.load(archives / f"{name}.nnef.tgz") for name in ("float", "packed"))
    inputs = random_inputs(a.inputs, {"S": 7})
    assert inputs["ids"].shape == (3, 7)
    found = side_by_side(a, b, inputs, APPROXIMATE)
    p, q = (torch.from_numpy(model.run(**inputs)["logits"]).double().log_softmax(-1) for model in (a, b))
    gaps = (p.exp() * (p - q)).sum(-1)
    assert found.divergences["logits"].kl_mean == pytest.approx(float(gaps.mean()), rel=1e-6)
    assert found.divergences["logits"].kl_max == pytest.approx(float(gaps.max()), rel=1e-6)
    assert found.divergences["logits"].top1_same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.weight_bytes == (a.weight_bytes, b.weight_bytes)
    assert found.weight_bytes[0] > 4 * found.weight_bytes[1]
    assert not found.ok
    assert side_by_side(a, a, inputs, TractCheckTolerance.EXACT).ok


def test_the_command_says_so_by_its_exit_code(archives, tmp_path):
    paths = archives / "float.nnef.tgz", archives / "packed.nnef.tgz"
    same, other = run(paths[0], paths[0], "-tt", "exact"), run(*paths, "--size", "B=1", "--json")
    assert (same.exit_code, other.exit_code) == (0, 1)
    assert "all within the tolerance" in " ".join(same.stdout.split())
    read = json.loads(other.stdout)
    assert (read["ok"], read["outputs"][0]["name"], read["outputs"][0]["shape"]) == (False, "logits", [1, 3, 24])
    assert read["outputs"][0]["divergence"]["kl_mean"] > 0
    np.savez(tmp_path / "in.npz", ids=np.zeros((1, 2), np.int64))
    assert json.loads(run(*paths, "--npz", tmp_path / "in.npz", "--json").stdout)["outputs"][0]["shape"] == [1, 2, 24]
    llm = tmp_path / "llm"
    (llm / "model").mkdir(parents=True)
    (llm / "model" / "model.nnef.tgz").write_bytes(paths[0].read_bytes())
    assert run(llm, paths[0]).exit_code == 0
    (llm / "tests").mkdir()
    (llm / "tests" / "prompt_with_past_inputs.npz").write_bytes((tmp_path / "in.npz").read_bytes())
    for options, shape in ([], [1, 2, 24]), (["--size", "B=2"], [2, 3, 24]):
        assert json.loads(run(llm, paths[0], *options, "--json").stdout)["outputs"][0]["shape"] == shape


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--size", "X=2"], "no input has a symbol X; there are B, S"),
        (["--size", "B"], "expected SYMBOL=N"),
        (["--npz", "absent.npz"], "no inputs at"),
        (["--npz", __file__], "is not an .npz file"),
    ],
)
def test_inputs_that_cannot_be_are_errors(archives, args, words):
    path = archives / "float.nnef.tgz"
    result = run(path, path, *args)
    assert result.exit_code == 2
    assert words in result.stderr


def test_archives_of_different_signatures_are_refused(archives, tmp_path):
    quantize_and_verify(nn.Linear(4, 4), torch.ones(1, 4), tmp_path / "other.nnef.tgz", None)
    result = run(archives / "float.nnef.tgz", tmp_path / "other.nnef.tgz")
    assert result.exit_code == 2
    assert "different inputs" in result.stderr


def test_random_inputs_fit_and_are_the_same_each_time():
    facts = (Fact("x", "float16", ("B", 4)), Fact("mask", "bool", ("B",)), Fact("n", "int32", ()))
    one, two = random_inputs(facts, {"B": 2}), random_inputs(facts, {"B": 2})
    assert {name: (array.dtype.name, array.shape) for name, array in one.items()} == {
        "x": ("float16", (2, 4)), "mask": ("bool", (2,)), "n": ("int32", ()),
    }  # fmt: skip
    assert all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(T2NErrorInvalidArgument, match=r"S\+P.*--npz"):
        random_inputs((Fact("x", "float32", ("S+P",)),), {})


def test_json_has_no_numbers_that_are_not_json(archives, tmp_path):
    path, broken = archives / "float.nnef.tgz", tmp_path / "broken.npz"

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(run(path, path, "--json").stdout, parse_constant=refuse)
    assert float(read["outputs"][0]["snr_db"]) == math.inf
    np.savez_compressed(broken, ids=np.zeros((1, 2), np.int64))
    broken.write_bytes(broken.read_bytes()[:-40])
    result = run(path, path, "--npz", broken)
    assert (result.exit_code, "is not an .npz file" in result.stderr) == (2, True)


def test_masked_logits_and_none_at_all_have_no_nan():
    def model(logits):
        facts = (Fact("logits", "float32", logits.shape),)
        return SimpleNamespace(inputs=(), outputs=facts, weight_bytes=0, run=lambda: {"logits": logits})

    exact = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    exact[:, 30:] = -np.inf
    other = np.where(exact > -np.inf, exact + np.linspace(0, 1, 40, dtype=np.float32), -np.inf)
    found = side_by_side(model(exact), model(other), {}, APPROXIMATE).divergences["logits"]
    kept = side_by_side(model(exact[:, :30]), model(other[:, :30]), {}, APPROXIMATE).divergences["logits"]
    assert found.kl_mean == pytest.approx(kept.kl_mean)
    assert found.kl_mean > 0
    none = model(exact[:0])
    assert side_by_side(none, none, {}, APPROXIMATE).divergences == {}


def test_only_the_widest_output_may_be_logits():
    def model(**outputs):
        facts = tuple(Fact(name, "float32", array.shape) for name, array in outputs.items())
        return SimpleNamespace(inputs=(), outputs=facts, weight_bytes=0, run=lambda: outputs)

    logits, cache = np.ones((1, 50), np.float32), np.ones((1, 32), np.float32)
    both = model(outputs=logits, cache=cache)
    assert side_by_side(both, both, {}, APPROXIMATE).divergences.keys() == {"outputs"}
    equals = model(a=cache, b=cache)
    assert side_by_side(equals, equals, {}, APPROXIMATE).divergences == {}


def test_help_needs_no_torch():
    code = "import sys; from torch_to_nnef.cli.main import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
