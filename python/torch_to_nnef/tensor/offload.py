"""`OffloadedTensor`: a tensor whose values stay on disk until something computes with them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from typing_extensions import Self

from torch_to_nnef.exceptions import T2NErrorMisuse
from torch_to_nnef.tensor.extents import Extents, Scratch, cut, own_memory, raw_memory, read_into, safetensors_extents
from torch_to_nnef.torch_internals import pytree, without_torch_function

_aten = torch.ops.aten
# Elements that are read and cast at a time.
_PIECE = 1 << 20


class OffloadedTensor(torch.Tensor):
    """A tensor that can't be written to, whose values lie in files.

    Shape, dtype and strides (contiguous) are known; nothing is read for `detach`, `clone`, `to` another dtype, `view`, and for cutting
    or joining along the first dimension. Any other torch function reads the values, computes, and returns plain tensors; they are not
    kept. A copy refers to the same files; a pickle holds the values, and is a plain tensor when read. Writing into it raises
    `T2NErrorMisuse`.

    Args:
        extents: Bytes of the values, in row-major order.
        shape: Logical shape.
        dtypes: As stored, and what that is cast to, one after the other; the last is the dtype this tensor shows.

    """

    extents: Extents
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def __new__(
        cls: type[Self],
        extents: Extents,
        shape: Sequence[int],
        dtypes: Sequence[torch.dtype],
        requires_grad: bool = False,
    ) -> Self:
        """Refer to `extents`; nothing is read."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtypes[-1], device=torch.device("cpu"), requires_grad=requires_grad
        )
        tensor.extents, tensor.dtypes = extents, tuple(dtypes)
        return tensor

    def load(self) -> torch.Tensor:
        """The values as a plain tensor; read in pieces where they are cast, so that they are never there twice."""
        values = own_memory(self.shape, self.dtype)
        if len(self.dtypes) == 1:
            read_into(self.extents, values)
            return values
        flat = values.view(-1)
        for start, piece in OffloadedTensor(self.extents, self.shape, self.dtypes[:-1]).pieces(_PIECE):
            _copy(flat[start : start + len(piece)], piece)
        return values

    def pieces(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """`(start, values)`: the flat tensor, `size` elements at a time; each piece is overwritten by the next."""
        buffers = [own_memory((min(size, self.numel()),), dtype) for dtype in self.dtypes]
        width = self.dtypes[0].itemsize
        for start in range(0, self.numel(), size):
            stop = min(start + size, self.numel())
            first, *rest = (buffer[: stop - start] for buffer in buffers)
            read_into(cut(self.extents, start * width, stop * width), first)
            for cast_to in rest:
                first = _copy(cast_to, first)
            yield start, first

    def _derive(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> OffloadedTensor:
        dtypes = self.dtypes if dtype in (None, self.dtype) else (*self.dtypes, dtype)
        return OffloadedTensor(self.extents, self.shape if shape is None else shape, dtypes)

    def _part(self, start: int, stop: int, shape: Sequence[int]) -> OffloadedTensor:
        """Elements `[start, stop)` in row-major order."""
        size = self.dtypes[0].itemsize
        return OffloadedTensor(cut(self.extents, start * size, stop * size), shape, self.dtypes)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        files = ", ".join(dict.fromkeys(extent.file.name for extent in self.extents))
        return f"OffloadedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, in {files})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedTensor:
        if id(self) not in memo:
            copied = OffloadedTensor(self.extents, self.shape, self.dtypes, self.requires_grad)
            copied.__dict__.update(vars(self))
            memo[id(self)] = copied
        return cast("OffloadedTensor", memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.load().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # These never reach __torch_dispatch__.
        if func is torch.Tensor.share_memory_:
            return args[0]  # every process can read the file
        if func is torch.Tensor.apply_:
            raise _read_only(func)
        if func in _NEED_MEMORY:
            return func(*pytree.tree_map_only(OffloadedTensor, OffloadedTensor.load, args), **(kwargs or {}))
        with without_torch_function():
            if func == _SET_DATA and isinstance(args[0], OffloadedTensor):
                if not isinstance(args[1], OffloadedTensor):
                    raise _read_only("data")
                vars(args[0]).update(extents=args[1].extents, dtypes=args[1].dtypes)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates a static default
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAZY and (result := _LAZY[func](*args, **kwargs)) is not None:
            return result
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                if pytree.tree_any(lambda leaf: isinstance(leaf, OffloadedTensor), written):
                    raise _read_only(func)
        args, kwargs = pytree.tree_map_only(OffloadedTensor, OffloadedTensor.load, (args, kwargs))
        return func(*args, **kwargs)


def _copy(into: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`into.copy_(values)`, 1-D, in blocks too small for torch to share among threads: those wait for each other by spinning."""
    for part, block in zip(into.split(_BLOCK), values.split(_BLOCK), strict=True):  # type: ignore[no-untyped-call]
        # The way over f32 rounds once too, and has vector instructions.
        part.copy_(block.float() if block.dtype is torch.bfloat16 else block)
    return into


_BLOCK = 1 << 14
_NEED_MEMORY = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _read_only(func: object) -> T2NErrorMisuse:
    return T2NErrorMisuse(
        f"{func}: an OffloadedTensor cannot be written to, its values are those of a file. Take `load()`, change that, and put it in "
        "the module in its place"
    )


def loaded(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, read from disk if it lies there."""
    return tensor.load() if isinstance(tensor, OffloadedTensor) else tensor


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, without the cast from half precision to f32 if it lies on disk: the same values in less memory."""
    if isinstance(tensor, OffloadedTensor) and tensor.dtypes[1:] == (torch.float32,) and tensor.dtypes[0] in _HALVES:
        return OffloadedTensor(tensor.extents, tensor.shape, tensor.dtypes[:1])
    return tensor


_HALVES = (torch.bfloat16, torch.float16)


# -- what is done without reading: each gives None where it is not


def _shape(x: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape without values, on which torch checks what is asked for."""
    return torch.empty(x.shape, device="meta")


def _same(x: OffloadedTensor, **_: Any) -> OffloadedTensor:
    return x._derive()


def _to_copy(
    x: OffloadedTensor, dtype: torch.dtype | None = None, device: torch.device | None = None, **layout: Any
) -> OffloadedTensor | None:
    here = device is None or torch.device(device).type == "cpu"
    return x._derive(dtype=dtype) if here and layout.get("memory_format") in (None, *_CONTIGUOUS) else None


_CONTIGUOUS = (torch.preserve_format, torch.contiguous_format)


def _view(x: OffloadedTensor, size: Sequence[int]) -> OffloadedTensor:
    return x._derive(_shape(x).view(size).shape)


def _is_first(x: torch.Tensor, dim: int) -> bool:
    return x.dim() > 0 and dim in (0, -x.dim())


def _slice(
    x: OffloadedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> OffloadedTensor | None:
    if not _is_first(x, dim) or step != 1:
        return None
    first, last, _ = slice(start, end).indices(x.shape[0])
    row, count = prod(x.shape[1:]), max(0, last - first)
    return x._part(first * row, (first + count) * row, (count, *x.shape[1:]))


def _select(x: OffloadedTensor, dim: int, index: int) -> OffloadedTensor | None:
    if not _is_first(x, dim):
        return None
    shape = _shape(x).select(dim, index).shape
    row, at = prod(shape), index % x.shape[0]
    return x._part(at * row, (at + 1) * row, shape)


def _split(x: OffloadedTensor, size: int | Sequence[int], dim: int = 0) -> list[OffloadedTensor] | None:
    if not _is_first(x, dim):
        return None
    ends = list(accumulate((len(part) for part in _shape(x).split(size)), initial=0))  # type: ignore[no-untyped-call]
    return [cast("OffloadedTensor", _slice(x, 0, start, end)) for start, end in pairwise(ends)]


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> OffloadedTensor | None:
    """Rows of each in turn: along a dimension behind the first, byte ranges alternate."""
    first = tensors[0]
    alike = [t for t in tensors if isinstance(t, OffloadedTensor) and t.dtypes == getattr(first, "dtypes", None)]
    if len(alike) != len(tensors):
        return None
    shape = torch.cat([_shape(t) for t in alike], dim).shape
    outer = prod(shape[: dim % len(shape)])
    runs = [(t, t.numel() // outer if outer else 0) for t in alike]
    parts = (t._part(i * n, (i + 1) * n, (n,)).extents for i in range(outer) for t, n in runs)
    return OffloadedTensor(tuple(extent for part in parts for extent in part), shape, alike[0].dtypes)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> OffloadedTensor | None:
    if not all(isinstance(t, OffloadedTensor) for t in tensors):
        return None
    dim %= torch.stack([_shape(t) for t in tensors], dim).dim()
    alike = cast("Sequence[OffloadedTensor]", tensors)
    return _cat([t._derive((*t.shape[:dim], 1, *t.shape[dim:])) for t in alike], dim)


_LAZY: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten._to_copy.default: _to_copy,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
}


# -- from files, and to a scratch file


def offloaded_safetensors(path: str | Path) -> dict[str, OffloadedTensor]:
    """Every tensor of a safetensors file, left there.

    Raises:
        T2NErrorNotFoundFile: It cannot be opened.
        T2NErrorInconsistentTensor: It is not of that format, or shorter than it says.

    """
    found = safetensors_extents(Path(path))
    return {name: OffloadedTensor((extent,), shape, (dtype,)) for name, extent, dtype, shape in found}


_folder: ContextVar[Path | None] = ContextVar("torch_to_nnef_scratch_folder", default=None)
# One file a process and folder, as long as a tensor lies in it.
_scratches: WeakValueDictionary[tuple[int, Path], Scratch] = WeakValueDictionary()


@contextmanager
def scratch_in(folder: Path) -> Iterator[None]:
    """Within the block, `offload` writes to a nameless file in `folder` instead of the system's temporary folder."""
    token = _folder.set(folder.resolve())
    try:
        yield
    finally:
        _folder.reset(token)


def offload(tensor: torch.Tensor) -> OffloadedTensor:
    """`tensor` (CPU), moved to disk: its values lie in a scratch file, which goes when nothing refers to it.

    Raises:
        T2NErrorRuntime: The disk is full, or cannot be written to.

    """
    if isinstance(tensor, OffloadedTensor):
        return tensor
    folder = _folder.get() or Path(tempfile.gettempdir()).resolve()
    key = os.getpid(), folder
    scratch = _scratches.get(key) or Scratch(folder)
    _scratches[key] = scratch
    extent = scratch.append(raw_memory(tensor.detach().contiguous()))
    return OffloadedTensor((extent,), tensor.shape, (tensor.dtype,))
