"""Random numbers, refused: an archive holds no generator."""

from __future__ import annotations

import torch

from torch_to_nnef.op.registry import OPS

aten = torch.ops.aten

_PACKETS = (
    aten.bernoulli,
    aten.binomial,
    aten.cauchy,
    aten.exponential,
    aten.geometric,
    aten.log_normal,
    aten.multinomial,
    aten.native_dropout,
    aten.normal,
    aten.normal_functional,
    aten.poisson,
    aten.rand,
    aten.rand_like,
    aten.randint,
    aten.randint_like,
    aten.randn,
    aten.randn_like,
    aten.randperm,
    aten.rrelu_with_noise,
    aten.rrelu_with_noise_functional,
    aten.uniform,
    aten._sample_dirichlet,
    aten._standard_gamma,
)

OPS.refuses(
    [getattr(packet, name) for packet in _PACKETS for name in packet.overloads() if not name.endswith("out")],
    "random numbers: tract has none, and numbers drawn at export would be the same in every run; pass them as an input of the model",
)
