"""Complex values: real ones with a last axis of 2 in the archive."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rows import B, Row, check, flags, ids, x
from torch import nn

from torch_to_nnef import quantize_and_verify
from torch_to_nnef.exceptions import T2NErrorNotImplemented
from torch_to_nnef.export import export_model_to_nnef
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.tract_model import TractModel

BT = {0: "B", 1: "T"}


def z(*shape, seed=0):
    return torch.complex(x(*shape, seed=seed), x(*shape, seed=seed + 1))


def row(name, function, *inputs, axes=B):
    return Row(name, function, inputs, {"args_0": axes})


UNARY = (
    torch.abs, torch.angle, torch.conj, torch.conj_physical, torch.cos, torch.cosh, torch.exp, torch.imag, torch.log, torch.neg,
    torch.real, torch.reciprocal, torch.sgn, torch.sin, torch.sinh, torch.sqrt, torch.square, torch.view_as_real,
)  # fmt: skip
ROWS = [
    *[row(f.__name__, lambda t, f=f: f(t), z(3, 4), axes=BT) for f in UNARY],
    row("angle_of_real", lambda t: t.angle(), x(3, 4)),
    row("angle_of_integers", lambda t: t.angle(), ids(3, 4) - 2),
    row("angle_on_axes", lambda t: t.angle(), torch.tensor([[1, -1, 1j, -1j, 0]])),
    row("abs_of_large_and_small", lambda t: t.abs() / t.real, torch.tensor([[1e30 + 1e30j, 1e-25 + 1e-25j]])),
    row("sgn_of_zero", lambda t: t.sgn(), torch.tensor([[0, 3 + 4j]])),
    row("conj_of_real", lambda t: torch.conj_physical(t).conj(), x(3, 4)),
    row("imag_of_conj", lambda t: t.conj().imag + t.conj().real, z(3, 4)),
    row("view_as_complex", lambda t: torch.view_as_complex(t), x(3, 4, 2)),
    row("complex_broadcast", lambda a, b: torch.complex(a, b), x(3, 4), x(4)),
    row("polar", lambda a, b: torch.polar(a, b), x(3, 4).abs(), x(4)),
    row("casts", lambda t: t.to(torch.complex128).to(torch.complex64), x(3, 4)),
    row("arithmetic", lambda a, b: (a + b * 2 - 1j * a) / (b + 3) + a / b - 2 / a + 1.5 - a.real * b, z(3, 4), z(4, seed=5)),
    row("alpha", lambda a, b: torch.sub(a, b, alpha=2) + torch.add(b, a, alpha=2j), z(3, 4), x(4)),
    row("real_with_number", lambda t: t * 1j + 2j - t, x(3, 4)),
    row("integers_with_number", lambda t: t * 1j, ids(3, 4)),
    row("size_as_factor", lambda t: t * t.shape[1] + t.shape[1], z(3, 4), axes=BT),
    row("powers", lambda t: t**2 + t**3 + t**-1 + t**0.5, z(3, 4)),
    row("equal", lambda t: (t == t, t != 1j, t == t.real), z(3, 4)),
    row("where", lambda t, c: torch.where(c, t, t.real), z(3, 4), flags(4)),
    row("filled", lambda t: (t + torch.zeros_like(t) + torch.ones(4, dtype=torch.complex64), t.new_full((3,), 1 + 2j)), z(3, 4)),
    row("norms", lambda t: (t.norm(dim=-1), torch.linalg.vector_norm(t, 1, -1, keepdim=True)), z(3, 4)),
    row("joined", lambda t: torch.cat([t.transpose(0, 1).reshape(-1)[2:], t.sum(-1).flip(0), t.real[:, 0]]), z(3, 4)),
    row("stacked", lambda t: torch.stack([t.unsqueeze(-1).squeeze(-1), t.roll(1, -1)], -1).unbind(-1), z(3, 4)),
    row("permuted", lambda t: (t.permute(-1, 0, 1), t[0].t(), t.mT), z(3, 4, 2), axes={1: "T"}),
    row("padded", lambda t: (F.pad(t, (1, 2)), t.expand(2, -1, -1), t.repeat(1, 2)), z(3, 4)),
    row("cut", lambda t: (t.split(2, -1), t.index_select(1, torch.tensor([1, 0])), t.select(-1, -1), t[:, ::2]), z(3, 4)),
    row("sums", lambda t: (t.sum(), t.sum(0), t.mean(-1, keepdim=True), t.cumsum(-1), t.sum().sum()), z(3, 4)),
    row("matmul", lambda a, b: (a @ b, a @ a.mH), z(2, 3, 4), z(4, 5, seed=5)),
    row("mm", lambda a, b: torch.mm(a, b), z(3, 4), z(4, 5, seed=5)),
    row("einsum", lambda a, b: torch.einsum("bfc,cd->bfd", a, b), z(3, 4, 2), z(2, 2, seed=5)),
    row("linear", F.linear, z(3, 4), z(5, 4, seed=5), z(5)),
    row("conv1d", lambda a, b, c: F.conv1d(a, b, c, padding=1), z(2, 3, 8), z(4, 3, 3, seed=5), z(4), axes={0: "B", 2: "T"}),
    row("conv2d", F.conv2d, z(2, 3, 8, 5), z(4, 3, 3, 2, seed=5)),
    row("rank_0", lambda t: (t[0].cumsum(0), t[0].flip(0), t[0].abs(), t.squeeze(()), t.sum()), z(3), axes={}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_op_gives_the_same_in_tract(row, tmp_path):
    check(row, tmp_path)


class Rope(nn.Module):
    """Rotary embedding as the first Llama wrote it: a complex buffer."""

    def __init__(self, positions=64, heads=2, size=32):
        super().__init__()
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(positions).float(), frequencies)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.query = nn.Linear(heads * size, heads * size)
        self.heads = heads

    def forward(self, x):
        query = self.query(x).unflatten(-1, (self.heads, -1))
        pairs = torch.view_as_complex(query.float().reshape(*query.shape[:-1], -1, 2))
        rotation = self.freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, pairs.shape[-1])
        return torch.view_as_real(pairs * rotation).flatten(3).type_as(x)


def test_llama_rope_quantizes_and_verifies(tmp_path):
    report = quantize_and_verify(Rope(), x(2, 5, 64), tmp_path / "rope.nnef.tar", dynamic_axes={"x": BT})
    assert all(comparison.ok for comparison in report.archive)


class Rotated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(z(4, 4))

    def forward(self, signal):
        return (signal @ self.weight).conj()


def test_inputs_and_outputs_are_real_with_a_last_axis_of_two(tmp_path):
    model, signal = Rotated(), z(3, 4)
    target = TractNNEF.latest(dynamic_axes={"signal": {0: "B"}})
    path = export_model_to_nnef(model, signal, tmp_path / "m.nnef.tar", target)
    loaded = TractModel.load(path)
    assert [(fact.name, fact.dtype, fact.shape) for fact in loaded.inputs] == [("signal", "float32", ("B", 4, 2))]
    assert [(fact.name, fact.dtype) for fact in loaded.outputs] == [("output", "float32")]
    actual = loaded.run(torch.view_as_real(signal))["output"]
    np.testing.assert_allclose(actual, torch.view_as_real(model(signal).resolve_conj()).detach(), rtol=1e-5, atol=1e-6)


def test_ops_without_a_lowering_say_on_complex_values(tmp_path):
    with pytest.raises(T2NErrorNotImplemented, match=r"aten\.tanh\.default on complex values"):
        check(row("tanh", torch.tanh, z(3, 3), axes={}), tmp_path)
