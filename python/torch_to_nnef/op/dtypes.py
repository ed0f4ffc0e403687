"""torch dtype -> tract's name, and refusal of those tract cannot hold."""

from __future__ import annotations

import torch

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotImplemented

_TRACT = {
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def tract_dtype(dtype: torch.dtype, where: str) -> str:
    """Name of `dtype` in `.dat` headers and `datum_type` attributes; `where` completes the error."""
    name = _TRACT.get(dtype)
    if name is None:
        hint = "; convert the model first: model.float() or model.half()" if dtype is torch.bfloat16 else ""
        raise T2NErrorNotImplemented(f"tract has no {str(dtype).removeprefix('torch.')} tensors (at {where}){hint}")
    return name


def check_storable(tensor: torch.Tensor, where: str) -> None:
    """Refuse a constant that tract 0.23.9 cannot read from a file, and, as `T2NErrorInvalidArgument`, one without values."""
    if tensor.is_meta:
        raise T2NErrorInvalidArgument(f"`{where}` has no values, it is on the meta device: load the weights first")
    if tensor.dtype is torch.bool and not tensor.numel():
        raise T2NErrorNotImplemented(
            f"a boolean tensor without elements (at {where}) cannot be read by tract; use integers"
        )
