"""Statistics of the float model: the same in one pass or many, from the model or from a file, and never those of something else."""

import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorRuntime
from torch_to_nnef.quantize import Selection
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.quantize.rows import recording
from torch_to_nnef.tensor.quant import quantize_q40


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(3))
        self.beside = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.never = nn.Linear(32, 32)
        self.ran = 0

    def forward(self, ids):
        self.ran += 1
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.beside[0](x) * self.beside[1](x))


def calibration(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return as_calibration([torch.randint(16, (2, 5), generator=generator) for _ in range(5)])


def found(net, data=None, **options):
    """Name -> statistics that an encoder gets; the rows; the quantized model."""
    known = {}

    def encode(weight, name, statistics):
        known[name] = statistics
        return quantize_q40(weight, name=name)

    with recording() as rows:
        quantize_calibrated_(net, encode, data, method="q40", **{"sequential": False, **options})
    return known, {row.fqn: row for row in rows}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x is None) == (b[name] is None)
        for side in ("learn", "held_out") if x is not None else ():
            for field in ("hessian", "frequency"):
                left, right = getattr(getattr(x, side), field), getattr(getattr(b[name], side), field)
                assert (left is None) == (right is None)
                assert left is None or torch.allclose(left, right, rtol=1e-5, atol=1e-6), name


def test_one_pass_or_many_and_hooks_agree(monkeypatch):
    one, many = Net(), Net()
    inputs = {}
    for name, module in one.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in calibration().learn:
            batch(one)
    expected = {name: torch.cat([x.flatten(0, 1) for x in seen]) for name, seen in inputs.items()}
    inputs.clear()
    known, rows = found(one, calibration())
    for name, x in expected.items():
        hessian = known["embedding.weight" if name == "head" else f"{name}.weight"].learn.hessian[0, 0]
        assert torch.allclose(hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert known["never.weight"] is None
    assert rows["never.weight"].output_snr_db is None
    assert known["embedding.weight"].learn.frequency.mean() == pytest.approx(1)
    assert known["beside.0.weight"] is known["beside.1.weight"]

    monkeypatch.setattr("torch_to_nnef.quantize.float_statistics._MOST", 0)
    again, _ = found(many, calibration())
    assert_same(known, again)
    assert many.ran > one.ran


def test_a_cache_is_written_once_and_read_without_running(tmp_path):
    path = tmp_path / "cache.npz"
    plain, plain_rows = found(Net(), calibration())
    written, _ = found(Net(), calibration(), cache=path)
    before = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["cache.npz"]
    for data in (calibration(), None):
        net = Net()
        read, rows = found(net, data, cache=path, sequential=True)
        assert net.ran == 0
        assert_same(read, plain)
        assert_same(written, plain)
        assert {n: r.output_snr_db for n, r in rows.items()} == {n: r.output_snr_db for n, r in plain_rows.items()}
    assert path.read_bytes() == before
    again = tmp_path / "again.npz"
    found(Net(), calibration(), cache=again)
    assert again.read_bytes() == before
    with np.load(path, allow_pickle=False) as file:
        assert file["1/learn/hessian"].dtype == np.float32


def test_a_part_of_the_weights_can_be_read(tmp_path):
    path = tmp_path / "cache.npz"
    everything, _ = found(Net(), calibration(), cache=path)
    some, _ = found(Net(), cache=path, selection=Selection(include=["beside.1", "blocks.0.*", "never"]))
    assert_same(some, {name: everything[name] for name in some})
    assert len(some) == 4


def changed_weight(net):
    with torch.no_grad():
        net.blocks[1][0].bias[3] += 1e-3


@pytest.mark.parametrize(
    ("change", "data", "words"),
    [
        (changed_weight, None, "was made with another model, or other weights"),
        (lambda net: net.register_buffer("more", torch.ones(1)), None, "another model"),
        (lambda net: None, calibration(1), "was made with other calibration data"),
        (lambda net: None, as_calibration([torch.zeros(1, 2, dtype=torch.int64)]), "other calibration data"),
    ],
)
def test_a_cache_of_something_else_is_refused(change, data, words, tmp_path):
    path = tmp_path / "cache.npz"
    found(Net(), calibration(), cache=path)
    net = Net()
    change(net)
    before = dict(net.named_parameters())
    with pytest.raises(T2NErrorInvalidArgument, match=f"cache.npz' .*{words}.*delete it, or name another file"):
        found(net, data, cache=path)
    assert all(p is before[name] for name, p in net.named_parameters())


def test_weights_that_a_cache_lacks_are_named(tmp_path):
    found(Net(), calibration(), cache=tmp_path / "c.npz", selection=Selection(include="head"))
    with pytest.raises(T2NErrorInvalidArgument, match=r"made for other weights, without `beside.0.weight`"):
        found(Net(), cache=tmp_path / "c.npz", selection=Selection(include=["beside.0", "head"]))


def test_files_that_are_no_cache_are_refused(tmp_path):
    path = tmp_path / "c.npz"
    found(Net(), calibration(), cache=path)
    whole = path.read_bytes()
    for index, content in enumerate([b"", b"text", whole[:-100], whole[: len(whole) // 2]]):
        (tmp_path / f"{index}").write_bytes(content)
    damaged = bytearray(whole)
    damaged[300:310] = b"\xff" * 10
    (tmp_path / "damaged").write_bytes(damaged)
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.savez(
        tmp_path / "format.npz",
        about=np.array('{"format": 2, "model": "", "calibration": "", "stages": [], "unused": []}'),
    )
    np.savez(tmp_path / "list.npz", about=np.array("[1]"))
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "folder").mkdir()
    for name in ("0", "1", "2", "3", "damaged", "other.npz", "format.npz", "list.npz", "array.npy", "folder"):
        with pytest.raises(
            T2NErrorInvalidArgument, match=f"{name}' (is no calibration cache|is not an .npz|is of format)"
        ):
            found(Net(), cache=tmp_path / name)


def test_neither_data_nor_cache_is_refused(tmp_path):
    with pytest.raises(T2NErrorInvalidArgument, match=r"no calibration, and no cache of an earlier one at '.*none'"):
        found(Net(), cache=tmp_path / "none")
    with pytest.raises(T2NErrorInvalidArgument, match="no calibration, and no cache"):
        found(Net())


def test_a_folder_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(T2NErrorRuntime, match="cannot write the calibration cache"):
        found(Net(), calibration(), cache=tmp_path / "none" / "c.npz")


def test_ctrl_c_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found(Net(), calibration(), cache=tmp_path / "c.npz")
    assert not list(tmp_path.iterdir())
