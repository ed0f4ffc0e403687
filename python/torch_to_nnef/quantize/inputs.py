"""What weights are multiplied with while a model runs, and what becomes of their products when both are 8-bit codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize.rows import snr_db
from torch_to_nnef.quantize.watch import Watch

if TYPE_CHECKING:
    from torch_to_nnef.quantize.observers import Observer
    from torch_to_nnef.quantize.targets import Target
    from torch_to_nnef.tensor.quant.int8 import QTensorInt8

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Products(Watch):  # type: ignore[no-untyped-call]
    """A `Watch` that sees products whole: `seen(target, weight, x, product)` says that `product(x, weight)` was computed.

    weight: the target, or a view of it. A convolution has its own input, of which nothing is unfolded.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        seen: Callable[[Target, torch.Tensor, torch.Tensor, Product], None],
        looked_up: Callable[[Target, torch.Tensor], None],
    ) -> None:
        super().__init__(targets, lambda *_: None, looked_up)
        self._seen = seen

    def matrix(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        """As `Watch.matrix`."""
        target = self._target(weight)
        if target is not None and weight.dim() > 1 and weight.shape[-1] == x.shape[-1]:
            self._seen(target, weight, x, lambda x, w: x @ w.mT)

    def convolution(
        self, weight: torch.Tensor, x: torch.Tensor, geometry: Sequence[Sequence[int]], groups: int
    ) -> None:
        """As `Watch.convolution`."""
        if (target := self._target(weight)) is not None:
            stride, padding, dilation = geometry
            rest = stride, padding, dilation, False, [0] * len(stride), groups
            self._seen(target, weight, x, lambda x, w: torch.convolution(x, w, None, *rest))


class Observed:
    """Observers of what each of `targets` is multiplied with (by the id of its tensor); those that are looked up."""

    def __init__(self, targets: Sequence[Target], observer: Callable[[], Observer]) -> None:
        self.observers: dict[int, Observer] = {}
        self.looked_up: set[int] = set()
        self._make = observer
        self._targets = targets

    def watch(self) -> Products:
        """To enter while the model runs. Raises `T2NErrorInvalidArgument` for inputs that are not finite."""
        return Products(self._targets, self._see, lambda target, _: self.looked_up.add(id(target.tensor)))

    def _see(self, target: Target, weight: torch.Tensor, x: torch.Tensor, product: Product) -> None:
        if id(target.tensor) not in self.observers:
            self.observers[id(target.tensor)] = self._make()
        try:
            self.observers[id(target.tensor)].see(x)
        except T2NErrorInvalidArgument as error:
            raise T2NErrorInvalidArgument(f"calibration: inputs of `{target.places[0].fqn}`: {error}") from error


class OutputErrors:
    """Energies of what weights compute in float, and of the difference from what their 8-bit codes compute of the same inputs."""

    def __init__(self, targets: Sequence[Target], packed: Mapping[int, QTensorInt8]) -> None:
        self._targets = [target for target in targets if id(target.tensor) in packed]
        self._packed = packed
        self._energies = {id(target.tensor): [0.0, 0.0] for target in self._targets}

    def watch(self) -> Products:
        """To enter while the float model runs."""
        return Products(self._targets, self._product, self._lookup)

    def output_snr_db(self, target: Target) -> float | None:
        """Signal-to-noise ratio of the outputs, dB; None if there were none."""
        signal, noise = self._energies.get(id(target.tensor), (0.0, 0.0))
        return snr_db(signal, noise) if signal else None

    def _product(self, target: Target, weight: torch.Tensor, x: torch.Tensor, product: Product) -> None:
        codes = self._packed[id(target.tensor)]
        # The same view of the same layout.
        offset = weight.storage_offset() - target.tensor.storage_offset()
        whole = torch.empty_strided(target.tensor.shape, target.tensor.stride(), dtype=weight.dtype, device=x.device)
        values = whole.copy_(codes.decompress()).as_strided(weight.shape, weight.stride(), offset)
        self._add(
            target, product(x, weight), product(codes.input_qparams.fake(x) if codes.input_qparams else x, values)
        )

    def _lookup(self, target: Target, indices: torch.Tensor) -> None:
        rows = indices.flatten()
        self._add(target, target.tensor[rows], self._packed[id(target.tensor)].decompress()[rows])

    def _add(self, target: Target, exact: torch.Tensor, approximate: torch.Tensor) -> None:
        energies = self._energies[id(target.tensor)]
        for index, values in enumerate((exact, exact - approximate)):
            energies[index] += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
