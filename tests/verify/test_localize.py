import pytest
import torch

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorTract
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.tensor.quant import quantize_q40
from torch_to_nnef.verify import Candidate, first_divergence

APPROXIMATE = TractCheckTolerance.APPROXIMATE
X = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.5]])
BIAS = torch.tensor([0.5, 1.0, -1.0])
VALUES = {
    "mul": 2 * X,
    "relu": torch.relu(2 * X),
    "permute": torch.relu(2 * X),  # tract holds it transposed
    "unsqueeze": BIAS[None],
    "add": torch.relu(2 * X) + BIAS,
}
CANDIDATES = [
    Candidate("doubled", "scale", "mul"),
    Candidate("positive", "act", "relu"),
    Candidate("turned", "act", "permute"),
    Candidate("shift", "", "unsqueeze"),
    Candidate("y", "", "add"),
]


class Loads:
    """Counts what is asked of tract."""

    def __init__(self):
        self.names = []

    def __call__(self, path, outputs):
        self.names.append(list(outputs))
        return _native.Model.load(path, outputs)


def search(archive, values, candidates=CANDIDATES, **options):
    asked = []

    def torch_values(names):
        asked.append(list(names))
        return {name: values[name] for name in names if name in values}

    return first_divergence(archive, candidates, torch_values, [X, BIAS], APPROXIMATE, **options), asked


def test_nothing_is_found_in_a_right_archive(archive):
    assert search(archive, VALUES)[0] is None


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
@pytest.mark.parametrize("wrong", ["mul", "relu", "unsqueeze", "add"])
def test_the_first_wrong_node_is_found(archive, wrong, chunk_size):
    later = list(VALUES)[list(VALUES).index(wrong) :]
    values = {name: value + (name in later) for name, value in VALUES.items()}
    divergence, _ = search(archive, values, chunk_size=chunk_size)
    assert divergence.candidate.node_name == wrong
    assert divergence.comparison.outside == VALUES[wrong].numel()
    assert f"{divergence.candidate.nnef_name!r} ({wrong!r} of" in str(divergence)


def test_the_module_is_named(archive):
    values = VALUES | {"relu": VALUES["relu"] - 1}
    assert "module 'act'" in str(search(archive, values)[0])
    values = VALUES | {"add": VALUES["add"] - 1}
    assert "the root module" in str(search(archive, values)[0])


def test_values_are_asked_for_in_bounded_chunks_until_the_first_difference(archive):
    loads = Loads()
    _, asked = search(archive, VALUES, chunk_size=2, load=loads)
    assert asked == [["mul", "relu"], ["permute", "unsqueeze"], ["add"], ["add"]]  # the last one alone, at the end
    assert loads.names == [["doubled", "positive"], ["turned", "shift"], ["y"], ["y"]]
    _, asked = search(archive, VALUES | {"mul": VALUES["mul"] + 1}, chunk_size=2)
    assert asked == [["mul", "relu"]]


def test_values_torch_does_not_have_are_skipped(archive):
    loads = Loads()
    values = {name: value + 1 for name, value in VALUES.items() if name in {"relu", "add"}}
    divergence, _ = search(archive, values, load=loads)
    assert divergence.candidate.nnef_name == "positive"
    assert loads.names == [["positive", "y"]]
    assert search(archive, {})[0] is None


def test_names_tract_cannot_output_do_not_hide_the_others(archive):
    unknown = Candidate("vanished", "somewhere", "relu")
    values = VALUES | {"add": VALUES["add"] + 1}
    divergence, _ = search(archive, values, [unknown, *CANDIDATES, unknown])
    assert divergence.candidate.nnef_name == "y"


def test_another_dtype_is_another_layout(archive):
    assert search(archive, {"mul": VALUES["mul"].double() + 1})[0] is None


def test_a_model_that_never_runs_ends_the_search():
    def load(path, outputs):
        raise T2NErrorTract("cannot load")

    assert search("nowhere", VALUES, load=load)[0] is None


def test_a_wrong_rewrite_over_several_nodes_is_found_by_halving(tmp_path):
    """tract 0.23.9 moves the reshape into the einsum, and reads a packed second operand as if it were transposed."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 64, 4, 1, generator=generator), quantize_q40(torch.randn(40, 256, generator=generator))
    path = tmp_path / "wrong.nnef"
    path.mkdir()
    (path / "graph.nnef").write_text(
        """version 1.0;
extension tract_registry tract_core;
graph wrong(x) -> (y)
{
    x = external<scalar>(shape = [2, 64, 4, 1]);
    w = variable<scalar>(label = "w", shape = [40, 256]);
    t = transpose(x, axes = [0, 2, 1, 3]);
    r = reshape(t, shape = [2, 256]);
    e = tract_core_einsum([r, w], expr = "ak,nk->an", acc = "f32");
    y = relu(e);
}
"""
    )
    weight.write_in_file(path, "w")
    values = {"t": x.transpose(1, 2)}
    values["r"] = values["t"].reshape(2, 256)
    values["e"] = values["r"] @ weight.decompress().T
    values["y"] = values["e"].relu()
    candidates = [Candidate(name, "head", name) for name in values]
    found = first_divergence(path, candidates, lambda names: {n: values[n] for n in names}, [x], APPROXIMATE)
    assert found is not None
    assert (found.candidate.nnef_name, found.alone) == ("e", True)
    assert "rewrite" in str(found)
