"""Threads, forks and child processes, and what a call leaves behind in torch, the log, warnings and random numbers."""

import contextlib
import gc
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_to_nnef import (
    TractModel,
    TractNNEF,
    export_model_to_nnef,
    export_tensors_to_nnef,
    isolated,
    quantize_and_verify,
    sensitivity,
)
from torch_to_nnef.exceptions import T2NError


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 32)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.dropout(self.lstm(x)[0])) * math.sqrt(x.shape[1])


class Refused(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x.unsqueeze(-1) @ x.unsqueeze(-2))


def recurrent(model=Recurrent):
    torch.manual_seed(0)
    return model()


X = torch.linspace(-1, 1, 24).reshape(1, 3, 8)


def exported(path, model):
    export_model_to_nnef(model, X, path, TractNNEF.latest(), log_level=logging.ERROR)
    return path.read_bytes()


def test_threads_export_side_by_side(tmp_path):
    shared = recurrent().train()
    expected = exported(tmp_path / "alone.nnef.tar", shared)
    models = [shared, shared, recurrent(), shared]
    with ThreadPoolExecutor(len(models)) as pool:
        paths = [tmp_path / f"{i}.nnef.tar" for i in range(len(models))]
        assert set(pool.map(exported, paths, models)) == {expected}
    assert all(module.training for module in shared.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_other_threads_see_torch_as_it_is(tmp_path):
    """While one exports, another makes recurrent layers, runs them, and scripts functions."""
    model, done, wrong = recurrent().eval(), threading.Event(), []
    weights = model.state_dict()
    with torch.no_grad():
        expected = model(X)
    scripted = torch.jit.script(plus_one)

    def work():
        while not done.is_set():
            with torch.no_grad():
                fresh = Recurrent().eval()
                fresh.load_state_dict(weights)  # random numbers are for all threads the same stream
                fresh.lstm.flatten_parameters()
                same = torch.allclose(fresh(X), expected, atol=1e-6) and torch.equal(scripted(X), X + 1)
            if not same or type(math.sqrt(4)) is not float:
                wrong.append(fresh)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        exported(tmp_path / "m.nnef.tar", Recurrent())
        done.set()
        running.result()
    assert not wrong


def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def state():
    """What is global in a process and none of our business."""
    holders = (torch, torch._VF, torch.Tensor, nn.Module, nn.RNNBase, torch.jit.ScriptFunction, math)
    return {
        "functions": {
            f"{h.__name__}.{n}": id(v) for h in holders for n, v in vars(h).items() if not n.startswith("__")
        },
        "setattr": id(nn.Module.__setattr__),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        ),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "log": {
            name: (logger.level, list(logger.handlers), logger.propagate, logger.disabled)
            for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]
            if isinstance(logger, logging.Logger)
        },
        "warnings": (list(warnings.filters), id(warnings.showwarning)),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "numpy": np.geterr(),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
    }


class Interrupted(Recurrent):
    """Ctrl-C comes while torch captures the model."""

    def forward(self, x):
        signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def isolated_run(path):
    exported(path, recurrent_of_call())
    return isolated.verify(path)


CALLS = {
    "export": lambda path: exported(path, recurrent_of_call()),
    "q40": lambda path: quantize_and_verify(recurrent_of_call(), X, path),
    "refused": lambda path: exported(path, Refused()),
    "interrupted": lambda path: exported(path, recurrent_of_call(Interrupted)),
    "run": lambda path: (exported(path, recurrent_of_call()), TractModel.load(path, threads=2).run(X.numpy())),
    "isolated": isolated_run,
    "tensors": lambda path: export_tensors_to_nnef({"w": X}, path.parent),
    "sensitivity": lambda path: sensitivity(recurrent_of_call(), [X]),
    "gptq": lambda path: quantize_and_verify(recurrent_of_call(), X, path, method="q40_gptq", calibration=[X]),
    "int8": lambda path: quantize_and_verify(recurrent_of_call(), X, path, method="int8", calibration=[X]),
}
FAIL = {"refused": T2NError, "interrupted": KeyboardInterrupt}
SECURITY = Path(__file__).parent.parent / "SECURITY.md"


def test_the_promise_tells_how_many_calls_there_are():
    assert f"{len(CALLS)} calls, {len(FAIL)} of which fail" in SECURITY.read_text()


def recurrent_of_call(model=Recurrent):
    with torch.random.fork_rng():
        return recurrent(model)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_global_is_changed(tmp_path, name):
    CALLS["export"](tmp_path / "first.nnef.tar")  # imports, and what torch sets up once
    before = state()
    with pytest.raises(FAIL[name]) if name in FAIL else contextlib.nullcontext():
        CALLS[name](tmp_path / "m.nnef.tar")
    after = state()
    assert {key: after[key] for key in before if after[key] != before[key]} == {}


@pytest.mark.timeout(900)
def test_the_package_works_after_a_fork_and_in_pools(tmp_path):
    script = Path(__file__).with_name("use_after_fork.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=800)
