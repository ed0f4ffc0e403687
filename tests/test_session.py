"""Sessions: runs that carry state, on archives written by hand."""

import copy
import threading

import numpy as np
import pytest
import torch

from test_tract_model import graph, write
from torch_to_nnef import TractModel
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorMisuse

CARRIED = {"past": "all", "count": "next"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Tokens x [1, S, 2] behind a past [1, P, 2]; a count of fixed shape; y is the sum over both."""
    body = (
        "x = external<scalar>(shape = [1, S, 2]);\npast = external<scalar>(shape = [1, P, 2]);\n"
        "count = external<scalar>(shape = [1]);\nall = concat([past, x], axis = 1);\n"
        "next = count + 1.0;\ny = sum_reduce(all, axes = [1]);"
    )
    text = graph(body, "x, past, count", "y, all, next", symbols="SP")
    text = text.replace("extension tract_symbol S", "extension tract_assert S + P <= 6;\nextension tract_symbol S")
    return TractModel.load(write(tmp_path_factory.mktemp("session") / "m.tar", text))


def ones(n):
    return np.ones((1, n, 2), np.float32)


def test_outputs_are_inputs_of_the_next_run(model):
    session = model.session(CARRIED)
    assert [fact.name for fact in session.inputs] == ["x"]
    assert [fact.name for fact in session.outputs] == ["y"]
    assert {name: value.shape for name, value in session.state().items()} == {"past": (1, 0, 2), "count": (1,)}
    total = 0
    for n in (3, 1, 2):
        total += n
        outputs = session.run(ones(n)) if n > 1 else session.run(x=torch.ones(1, n, 2))
        assert list(outputs) == ["y"]
        np.testing.assert_array_equal(outputs["y"], [[[total, total]]])
    np.testing.assert_array_equal(session.state()["past"], ones(6))
    np.testing.assert_array_equal(session.state()["count"], [3])
    session.reset()
    np.testing.assert_array_equal(session.run(ones(1))["y"], [[[1, 1]]])


def test_sessions_of_a_model_are_apart(model):
    one, other = model.session(CARRIED), model.session(CARRIED)
    one.run(ones(4))
    np.testing.assert_array_equal(other.run(ones(1))["y"], [[[1, 1]]])
    plain = model.run(x=ones(1), past=ones(0), count=np.zeros(1, np.float32))
    assert list(plain) == ["y", "all", "next"]


def test_a_run_that_fails_carries_nothing(model):
    session = model.session(CARRIED)
    session.run(ones(4))
    with pytest.raises(T2NErrorInvalidArgument, match="the archive holds only where"):
        session.run(ones(3))
    with pytest.raises(T2NErrorInvalidArgument, match="not an input: past"):
        session.run(ones(1), past=ones(1))
    with pytest.raises(T2NErrorInvalidArgument, match="missing: x"):
        session.run()
    np.testing.assert_array_equal(session.run(ones(1))["y"], [[[5, 5]]])


def test_a_state_is_a_copy_and_can_be_loaded(model):
    session = model.session(CARRIED)
    session.run(ones(2))
    saved = session.state()
    session.run(ones(2))
    saved["past"] *= 2
    session.load_state(saved)
    np.testing.assert_array_equal(session.run(ones(1))["y"], [[[5, 5]]])
    np.testing.assert_array_equal(session.state()["count"], [2])


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"past": ones(1)}, "the state lacks"),
        ({"past": ones(1), "count": np.zeros(1, np.float32), "x": ones(1)}, '\'?"x" is not carried'),
        ({"past": ones(1).astype(np.float64), "count": np.zeros(1, np.float32)}, "convert it to f32"),
        ({"past": ones(1)[..., :1], "count": np.zeros(1, np.float32)}, "axis 2 must be 2"),
        ({"past": [[[0.0, 0.0]]], "count": np.zeros(1, np.float32)}, "numpy array"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(model, state, why):
    session = model.session(CARRIED)
    session.run(ones(2))
    with pytest.raises(T2NErrorInvalidArgument, match=why):
        session.load_state(state)
    np.testing.assert_array_equal(session.run(ones(1))["y"], [[[3, 3]]])


@pytest.mark.parametrize(
    "carried", [{"none": "all"}, {"past": "none"}, {"count": "all"}, {"past": "all", "count": "past"}]
)
def test_what_is_carried_exists_and_fits(model, carried):
    with pytest.raises(T2NErrorInvalidArgument, match=r"\bis no (in|out)put|cannot be carried"):
        model.session(carried)


def test_a_session_is_not_copied(model):
    with pytest.raises(T2NErrorMisuse, match="state"):
        copy.deepcopy(model.session(CARRIED))


def test_two_threads_do_not_run_one_session(tmp_path):
    n = 600
    body = f"x = external<scalar>(shape = [{n}, {n}]);\nh0 = external<scalar>(shape = [{n}, {n}]);\n" + "".join(
        f"h{i + 1} = matmul(h{i}, x);\n" for i in range(8)
    )
    session = TractModel.load(write(tmp_path / "m.tar", graph(body, "x, h0", "h8"))).session({"h0": "h8"})
    assert session.outputs == ()
    x, misuses = np.zeros((n, n), np.float32), []

    def run():
        try:
            session.run(x)
        except T2NErrorMisuse as error:
            misuses.append(str(error))

    def several():
        for _ in range(5):
            run()

    threads = [threading.Thread(target=several) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(misuses) == {"the session is in use by another thread; make one for each"}
