"""Batch norms behind convolutions, taken up by the weights: what is left of the norm is a shift of each channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from torch_to_nnef.tensor.offload import loaded


@dataclass(frozen=True)
class Norm:
    """A convolution that only a batch norm reads, by the names of their tensors; None for those that there are not."""

    filter: str
    bias: str | None
    weight: str | None
    mean: str
    variance: str
    eps: float


@contextmanager
def folded(model: nn.Module, norms: Sequence[Norm]) -> Iterator[None]:
    """Multiply filters and biases by what `norms` multiply with; on any error within, `model` is as it was.

    gamma (w x + b - mean) / sqrt(variance + eps) = w' x + b' - mean', with each times gamma / sqrt(variance + eps); the norm keeps its
    modules and the shapes of its tensors, and has variance 1 - eps and weight 1. One scale for the whole filter is then one for the sums.
    """
    held = [(holder, dict(holder)) for module in model.modules() for holder in (module._parameters, module._buffers)]
    try:
        with torch.no_grad():
            for norm in norms:
                _fold(model, norm)
        yield
    except BaseException:
        for holder, before in held:
            holder.clear()
            holder.update(before)  # type: ignore[arg-type]  # each gets its own back
        raise


def _fold(model: nn.Module, norm: Norm) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def read(name: str) -> torch.Tensor:
        return loaded(tensors[name]).detach().to(torch.float64)

    filters, mean, variance = read(norm.filter), read(norm.mean), read(norm.variance)
    slope = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else read(norm.weight))
    _put(model, norm.filter, filters * slope.reshape(-1, *[1] * (filters.dim() - 1)))
    if norm.bias is not None:
        _put(model, norm.bias, read(norm.bias) * slope)
    _put(model, norm.mean, mean * slope)
    _put(model, norm.variance, torch.full_like(variance, 1 - norm.eps))
    if norm.weight is not None:
        _put(model, norm.weight, torch.ones_like(slope))


def _put(model: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        before = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(values.to(before.dtype), requires_grad=before.requires_grad)  # type: ignore[union-attr]
    else:
        module._buffers[leaf] = values.to(module._buffers[leaf].dtype)  # type: ignore[union-attr]
