"""`t2n quantize-shards --ray`: two workers, one of which dies on the way."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama
from typer.testing import CliRunner

from torch_to_nnef.cli.main import app
from torch_to_nnef.exceptions import T2NErrorImpossibleQuantization, T2NErrorRuntime
from torch_to_nnef.llm_tract import shard_work
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.shards import quantize_shards
from torch_to_nnef.llm_tract.shards_ray import on_ray

FILES = 4


def options(checkpoint, out):
    return LlmOptions(local_dir=checkpoint, export_dirpath=out, compression_method="q40")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and what one process makes of it."""
    folder = tmp_path_factory.mktemp("ray")
    checkpoint = tiny_llama(folder / "model", max_shard_size="100KB")
    assert quantize_shards(options(checkpoint, folder / "packed"), files=FILES).complete
    return checkpoint, folder / "packed"


@pytest.fixture(scope="module")
def cluster():
    """Of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'torch-to-nnef-native[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def begin(packed, out):
    out.mkdir()
    shutil.copy(packed / "quantize-shards.json", out)
    return out


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(T2NErrorRuntime, match=r"torch-to-nnef-native\[ray\]"):
        on_ray()
    done = CliRunner().invoke(app, ["quantize-shards", str(tmp_path), str(tmp_path / "out"), "--ray"])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray
def test_two_workers_write_what_one_writes(made, cluster, tmp_path):
    checkpoint, packed = made
    out, seen = begin(packed, tmp_path / "out"), []
    done = quantize_shards(options(checkpoint, out), files=FILES, run=on_ray(), progress=lambda *s: seen.append(s))
    assert done.complete
    assert content(out) == content(packed)
    assert len(seen) == done.files
    assert seen[-1][0] == seen[-1][1] == done.bytes_before
    assert cluster.is_initialized(), "a cluster of the caller stays his"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_lost_worker_is_replaced(made, cluster, tmp_path, monkeypatch):
    checkpoint, packed = made
    out, packs = begin(packed, tmp_path / "out"), tmp_path / "packs"
    make = shard_work.quantize_output

    def dying(work, number, *arguments):
        """The first worker of each file dies after its second weight."""
        alone, count = shard_work._packed, 0

        def counted(work, entry, *rest):
            nonlocal count
            made = alone(work, entry, *rest)
            with packs.open("a") as file:
                file.write(f"{entry.name}\n")
            count += 1
            if count == 3 and not (first := Path(f"{packs}.{number}")).exists():
                first.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        shard_work._packed = counted
        try:
            return make(work, number, *arguments)
        finally:
            shard_work._packed = alone

    monkeypatch.setattr("torch_to_nnef.llm_tract.shards_ray.quantize_output", dying)
    assert quantize_shards(options(checkpoint, out), files=FILES, run=on_ray(retries=2)).complete
    assert content(out) == content(packed)
    lost = len(list(tmp_path.glob("packs.*")))
    assert lost >= 2
    names = packs.read_text().split()
    assert len(names) == len(set(names)) + lost, "only what a lost worker had not finished was packed again"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_workers_that_are_lost_again_and_again_are_an_error(made, cluster, tmp_path, monkeypatch):
    checkpoint, packed = made
    out = begin(packed, tmp_path / "out")

    def dying(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("torch_to_nnef.llm_tract.shards_ray.quantize_output", dying)
    with pytest.raises(T2NErrorRuntime, match="WorkerCrashedError"):
        quantize_shards(options(checkpoint, out), files=FILES, run=on_ray(retries=1))
    monkeypatch.undo()
    assert quantize_shards(options(checkpoint, out), files=FILES, run=on_ray()).complete
    assert content(out) == content(packed)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_error_of_a_weight_is_what_it_is_here(made, cluster, tmp_path, monkeypatch):
    checkpoint, packed = made

    def refuse(*arguments):
        raise T2NErrorImpossibleQuantization("`w` holds NaN")

    monkeypatch.setattr("torch_to_nnef.llm_tract.shards_ray.quantize_output", refuse)
    with pytest.raises(T2NErrorImpossibleQuantization, match="`w` holds NaN"):
        quantize_shards(options(checkpoint, begin(packed, tmp_path / "out")), files=FILES, run=on_ray())
