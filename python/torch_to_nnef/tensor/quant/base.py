"""`QTensor`: a tensor held as packed integer codes.

A `QTensor` is a wrapper subclass: it has the shape, dtype and device of the weight it stands for and no float storage.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
    T2NErrorNotImplemented,
    expect,
)
from torch_to_nnef.tensor.chunks import flat_chunks
from torch_to_nnef.tensor.offload import loaded, offload
from torch_to_nnef.tensor.quant.scheme import QScalePerGroupF16, QScheme
from torch_to_nnef.torch_internals import pytree, without_torch_function

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from torch_to_nnef.inference_target import InferenceTarget
    from torch_to_nnef.tensor.quant.compressors import U8Compressor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
__all__ = ["FLOAT_DTYPES", "QScalePerGroupF16", "QScheme", "QTensor", "stored_nbytes"]
# What `decompress_slice` may be asked for, at least: groups of any format we have.
_PIECE = 32
_aten = torch.ops.aten


class QTensor(torch.Tensor):
    """A weight held as packed codes. Behaves as a plain tensor without gradient that can't be written to.

    Shape, dtype, strides and device are known without touching the codes. Any torch function runs on the dequantized
    value and returns plain tensors; `detach`, `clone`, `to` a float dtype or a device stay packed. Writing into it
    raises `T2NErrorMisuse`, and so does `requires_grad_(True)`; the one way to fill it is `copy_` from a `QTensor` of
    the same layout, which is how `load_state_dict` loads. Views (`q[0]`, `q.t()`) are dequantized copies.

    Args:
        fp_tensor: Weight to quantize, any float dtype.
        qscheme: Meaning of the codes.
        dequant_to_dtype: Float dtype this tensor shows and computes in.
        u8_compressors: Lossless codecs applied in order to the codes; none keeps one byte a code.

    Raises:
        T2NErrorImpossibleQuantization: A shape or value `qscheme` cannot hold.

    """

    storage_name: ClassVar[str] = "u8"
    u8_blob: torch.Tensor
    qscheme: QScheme  # type: ignore[assignment]  # hides a method of torch's own quantized tensors
    u8_compressors: tuple[U8Compressor, ...]
    nnef_name: str | None

    @staticmethod
    def __new__(
        cls: type[Self],
        fp_tensor: torch.Tensor,
        qscheme: QScheme,
        dequant_to_dtype: torch.dtype = torch.float32,
        u8_compressors: Sequence[U8Compressor] | None = None,
    ) -> Self:
        """Quantize `fp_tensor` and pack its codes."""
        expect("fp_tensor", fp_tensor, torch.Tensor, "a tensor")
        expect("qscheme", qscheme, QScheme, "a QScheme")
        compressors = cls.default_compressors() if u8_compressors is None else tuple(u8_compressors)
        blob = cls.encode(fp_tensor, qscheme, compressors)
        return cls.from_packed(blob, fp_tensor.shape, qscheme, dequant_to_dtype, compressors)

    @classmethod
    def from_packed(
        cls,
        u8_blob: torch.Tensor,
        shape: Sequence[int],
        qscheme: QScheme,
        dequant_to_dtype: torch.dtype = torch.float32,
        u8_compressors: Sequence[U8Compressor] = (),
        nnef_name: str | None = None,
    ) -> Self:
        """Wrap codes that are packed already; nothing is copied.

        Raises:
            T2NErrorInconsistentTensor: `u8_blob` is not 1-D uint8, or does not fit `shape` and `qscheme`.

        """
        state = {
            "u8_blob": u8_blob,
            "qscheme": qscheme,
            "u8_compressors": tuple(u8_compressors),
            "nnef_name": nnef_name,
        }
        return cast("Self", _build(cls, tuple(shape), dequant_to_dtype, state))

    # -- what a subclass may refine

    @classmethod
    def default_compressors(cls) -> tuple[U8Compressor, ...]:
        """Codecs used when the constructor is given none."""
        return ()

    @classmethod
    def encode(cls, fp_tensor: torch.Tensor, qscheme: QScheme, compressors: Sequence[U8Compressor]) -> torch.Tensor:
        """Blob (1-D uint8) of `fp_tensor`: quantize, then compress in order."""
        blob = qscheme.quantize_as_u8(fp_tensor.detach())
        for compressor in compressors:
            blob = compressor.compress(blob)
        return blob.reshape(-1)

    def check_layout(self) -> None:
        """Raise `T2NErrorInconsistentTensor` if blob, scheme and shape cannot belong together."""
        if self.u8_blob.dtype != torch.uint8 or self.u8_blob.dim() != 1:
            raise T2NErrorInconsistentTensor(
                f"u8_blob must be 1-D uint8: got {self.u8_blob.dtype} of shape {tuple(self.u8_blob.shape)}"
            )

    def decompress(self) -> torch.Tensor:
        """Float values: plain tensor in `dequant_to_dtype` and the logical shape."""
        return self.qscheme.dequantize(self.decompress_to_u8(), self.dequant_to_dtype)

    def decompress_slice(self, start: int, stop: int) -> torch.Tensor:
        """`decompress().flatten()[start:stop]`; formats that can, read only that part."""
        return self.decompress().reshape(-1)[start:stop]

    def squared_error(self, exact: torch.Tensor) -> tuple[float, float]:
        """`(sum of exact^2, sum of (self - exact)^2)` in f64; `exact` is a float tensor of this shape, walked in pieces."""
        signal = noise = 0.0
        for start, piece in flat_chunks(exact, _PIECE if exact.numel() % _PIECE == 0 else 1):
            # f32 holds each difference; squares of tiny weights and their sums need f64.
            values = piece.to(torch.promote_types(piece.dtype, torch.float32))
            difference = self.decompress_slice(start, start + len(piece)).to(values.dtype) - values
            signal += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            noise += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        return signal, noise

    def write_in_file(self, dirpath: str | Path, label: str, inference_target: InferenceTarget | None = None) -> Path:
        """Write `dirpath/label.dat`; returns its path. A subclass that an engine can read implements this."""
        raise T2NErrorNotImplemented(
            f"{type(self).__name__} {self.nnef_name or label!r} has no file format: use QTensorTractScaleOnly (Q40), "
            "or subclass QTensor and write `label.dat` in `write_in_file`"
        )

    # -- the tensor itself

    @property
    def dequant_to_dtype(self) -> torch.dtype:
        """Float dtype this tensor shows and computes in."""
        return self.dtype

    def decompress_to_u8(self) -> torch.Tensor:
        """Codes (uint8) in the logical shape."""
        blob = self.u8_blob
        for compressor in reversed(self.u8_compressors):
            blob = compressor.decompress(blob)
        return blob.reshape(self.shape)

    def to_device(self, device: torch.device | str) -> Self:
        """A new QTensor on `device`; this one is untouched."""
        return self._derive(
            u8_blob=self.u8_blob.to(device),
            qscheme=self.qscheme.to_device(device),
            u8_compressors=tuple(c.to_device(device) for c in self.u8_compressors),
        )

    def offload(self) -> Self:
        """The same codes on disk, in a scratch file (see `torch_to_nnef.tensor.offload`); read when they are used."""
        return self._derive(u8_blob=offload(self.u8_blob), qscheme=self.qscheme.map_tensors(offload))

    def to_memory(self) -> Self:
        """The inverse of `offload`."""
        return self._derive(u8_blob=loaded(self.u8_blob), qscheme=self.qscheme.map_tensors(loaded))

    @property
    def packed_nbytes(self) -> int:
        """Bytes held: blob and the tensors of the scheme."""
        return sum(t.numel() * t.element_size() for t in self._payload())

    def is_identical(self, other: QTensor) -> bool:
        """Whether both hold the same bytes under the same scheme, codecs and shape; `dequant_to_dtype` may differ."""
        return self._layout() == other._layout() and all(
            torch.equal(a, b) for a, b in zip(self._payload(), other._payload(), strict=True)
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name = f", nnef_name={self.nnef_name!r}" if self.nnef_name else ""
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, nbytes={self.packed_nbytes}{name})"
        )

    def __getattr__(self, name: str) -> Any:
        # The scheme's tensors by name: `torch.compile` reads the parts listed by `__tensor_flatten__` as attributes.
        scheme = self.__dict__.get("qscheme")
        if scheme is not None and name in scheme.tensor_names:
            return getattr(scheme, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _payload(self) -> list[torch.Tensor]:
        return [self.u8_blob, *(getattr(self.qscheme, name) for name in self.qscheme.tensor_names)]

    def _layout(self) -> tuple[Any, ...]:
        scheme = {k: v for k, v in vars(self.qscheme).items() if k not in self.qscheme.tensor_names}
        return type(self), tuple(self.shape), type(self.qscheme), scheme, self.u8_compressors

    def _derive(self, dtype: torch.dtype | None = None, **changes: Any) -> Self:
        state = {k: v for k, v in vars(self).items() if k != "_is_param"}
        return cast("Self", _build(type(self), tuple(self.shape), dtype or self.dtype, {**state, **changes}))

    def _clone(self, dtype: torch.dtype | None = None) -> Self:
        return self._derive(dtype, u8_blob=self.u8_blob.clone(), qscheme=self.qscheme.map_tensors(torch.clone))

    def _fill(self, source: object) -> Self:
        """`self.copy_(source)`: accepted from a QTensor of the same layout only."""
        if not isinstance(source, QTensor):
            raise T2NErrorMisuse(
                f"cannot copy a float tensor into {self!r}: its values are packed codes. Quantize the float weight "
                "first, and put the result in the module in place of this one"
            )
        same_size = [t.shape for t in self._payload()] == [t.shape for t in source._payload()]
        if self._layout() != source._layout() or not same_size:
            raise T2NErrorMisuse(
                f"cannot copy {source!r} into {self!r}: they are packed differently. "
                "Use load_state_dict(..., assign=True)"
            )
        for mine, theirs in zip(self._payload(), source._payload(), strict=True):
            mine.copy_(theirs)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            state = {k: copy.deepcopy(v, memo) for k, v in vars(self).items()}
            memo[id(self)] = _build(type(self), tuple(self.shape), self.dtype, state)
        return cast("Self", memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _build, (type(self), tuple(self.shape), self.dtype, dict(vars(self)))

    # -- torch protocols

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        scheme, names = self.qscheme, self.qscheme.tensor_names
        fixed = {k: v for k, v in vars(scheme).items() if k not in names}
        state = {k: v for k, v in vars(self).items() if k not in ("u8_blob", "qscheme", "_is_param")}
        return ["u8_blob", *names], (self.dtype, type(scheme), fixed, state)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: tuple[Any, ...], outer_size: torch.Size, outer_stride: Any
    ) -> Self:
        dtype, scheme_class, fixed, state = context
        tensors = {name: inner[name] for name in scheme_class.tensor_names}
        scheme = scheme_class.rebuild({**fixed, **tensors})
        state = {**state, "u8_blob": inner["u8_blob"], "qscheme": scheme}
        return cast("Self", _build(cls, tuple(outer_size), dtype, state))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # These never reach __torch_dispatch__, or reach it as a write into a temporary.
        if isinstance(args[0] if args else None, QTensor):
            if func in _REPLACES:
                raise _read_only(func)
            if func in _ASKS_GRADIENT and (*args, kwargs.get("requires_grad", True))[1]:
                raise T2NErrorMisuse(f"{args[0]!r} cannot require a gradient: its codes are integers")
            if func is torch.Tensor.share_memory_:
                for tensor in args[0]._payload():
                    tensor.share_memory_()
                return args[0]
            if func in _READS_MEMORY:
                return func(args[0].decompress(), *args[1:], **kwargs)
        with without_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates a static default
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], QTensor):
            if func in (_aten.detach.default, _aten.alias.default):
                return args[0]._derive()
            if func is _aten.clone.default:
                return args[0]._clone()
            if func is _aten.copy_.default:
                return args[0]._fill(args[1])
            if func is _aten._to_copy.default and kwargs.get("dtype", args[0].dtype) in FLOAT_DTYPES:
                moved = args[0]._clone(kwargs.get("dtype"))
                return moved if kwargs.get("device") is None else moved.to_device(kwargs["device"])
        refuse_writes(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(QTensor, lambda q: q.decompress(), (args, kwargs))
        return func(*args, **kwargs)


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_REPLACES = (torch.Tensor.__setitem__, torch.Tensor.set_, _SET_DATA, torch.Tensor.apply_, torch.Tensor.map_)
_READS_MEMORY = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)
_ASKS_GRADIENT = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def _read_only(func: object) -> T2NErrorMisuse:
    return T2NErrorMisuse(
        f"{getattr(func, '__qualname__', func)}: a QTensor cannot be written to, its values are packed codes. "
        "Take `decompress()`, change that, and quantize it again"
    )


def refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `T2NErrorMisuse` if the schema of `func` writes into an argument that is (or holds) a QTensor."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if pytree.tree_any(lambda leaf: isinstance(leaf, QTensor), value):
            raise _read_only(func)


def _build(cls: type[Any], shape: tuple[int, ...], dtype: torch.dtype, state: dict[str, Any]) -> Any:
    """The one constructor; also what pickles name. `state` becomes the attributes."""
    if dtype not in FLOAT_DTYPES:
        raise T2NErrorInvalidArgument(f"dequant_to_dtype must be one of {FLOAT_DTYPES}: got {dtype}")
    tensor = torch.Tensor._make_wrapper_subclass(
        cls, shape, dtype=dtype, device=state["u8_blob"].device, requires_grad=False
    )
    tensor.__dict__.update(state)
    tensor.check_layout()
    return tensor


def stored_nbytes(tensor: torch.Tensor) -> int:
    """Bytes that the values of `tensor` take, packed ones as they are packed."""
    return tensor.packed_nbytes if isinstance(tensor, QTensor) else tensor.numel() * tensor.element_size()
