"""Scaled dot-product attention as product, softmax, product, which every tract runs; on request as tract's one operator."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_to_nnef.graph.ir import Dim
from torch_to_nnef.op.dtypes import tract_dtype
from torch_to_nnef.op.emitter import Emitter
from torch_to_nnef.op.half import in_half
from torch_to_nnef.op.product import AXES
from torch_to_nnef.op.registry import lowers
from torch_to_nnef.op.statement import Ref

aten = torch.ops.aten

# Below every score, so that softmax gives it 0 beside any of them; -inf would give NaN in a row that is masked whole.
_MASKED = {torch.float32: -3.0e38, torch.float16: -65504.0}


@lowers(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    e: Emitter,
    query: Ref,
    key: Ref,
    value: Ref,
    attn_mask: Ref | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Ref:
    """softmax(query @ key^T * scale + mask) @ value; query (..., L, E), key (..., S, E), value (..., S, Ev).

    As in torch, a row whose keys are all masked by a boolean mask gives zeros.
    """
    if dropout_p:
        raise e.refuse("dropout in attention; put the model in eval mode")
    if enable_gqa:
        key, value = (_repeat_heads(e, side, query) for side in (key, value))
    dtype = torch.float16 if in_half(e) else torch.float32
    query, key, value = (e.lift(side, len(e.out.shape)) for side in (query, key, value))
    rows, features = query.shape[-2:]
    if scale is None:
        if not isinstance(features, int):
            raise e.refuse("the head size is dynamic; give scale=")
        scale = 1 / math.sqrt(features)
    mask = _causal(e, rows, key.shape[-2]) if is_causal else attn_mask
    if e.reify_sdpa and _fits_operator(query, mask):
        return _one_operator(e, query, key, value, mask, float(scale))
    if dtype is torch.float16:  # before the product, which may be beyond f16
        query, scale = e.binary("mul", query, scale, dtype), 1.0
    kind, masks = _masks(e, mask, query.rank, dtype)
    how: dict[str, Any] = {"scale": float(scale), "axis": query.rank - 1}
    query = e.cast(query, dtype)
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return e.cast(_keys_first(e, query, key, value, kind, masks, how), e.out.dtype)
    key, value = (e.cast(side, dtype) for side in (key, value))
    result = e.op(f"t2n_attention{kind}", query, key, value, *masks, out=e.out.shape, **how)
    return e.cast(result, e.out.dtype)


def _keys_first(e: Emitter, query: Ref, key: Ref, value: Ref, kind: str, masks: list[Ref], how: dict[str, Any]) -> Ref:
    """Attention whose products have keys and values first: tract cuts the first operand in panels of rows, which one query leaves empty.

    Those stay in f16, a whole past perhaps, beside queries in f32: tract multiplies f16 by f32, fastest with f16 first.
    """
    key, value = (side if side.dtype is torch.float16 else e.cast(side, query.dtype) for side in (key, value))
    batch = AXES[: query.rank - 2]
    products: dict[str, Any] = {"dtype": query.dtype, "acc": tract_dtype(query.dtype, e.node.where())}
    scores = e.op(
        "tract_core_einsum",
        [key, query],
        out=(*query.shape[:-1], key.shape[-2]),
        expr=f"{batch}yz,{batch}xz->{batch}xy",
        hint="scores",
        **products,
    )
    weights = e.op(f"t2n_attention_weights{kind}", scores, *masks, out=scores.shape, **how)
    expr = f"{batch}yz,{batch}xy->{batch}xz"
    return e.op("tract_core_einsum", [value, weights], out=e.out.shape, expr=expr, **products)


def _fits_operator(query: Ref, mask: Ref | None) -> bool:
    """Whether tract's operator does the same: one that adds a mask skips keys below -65503, even if a row has no others."""
    return query.rank <= 4 and (mask is None or mask.dtype is torch.bool)


def _one_operator(e: Emitter, query: Ref, key: Ref, value: Ref, mask: Ref | None, scale: float) -> Ref:
    """`tract_transformers_sdpa`, which computes in f32, shares key/value heads by itself, and takes masks to add, without infinities."""
    lead, dtype = 4 - query.rank, e.out.dtype if e.out.dtype is torch.float16 else torch.float32
    key, value = (_before_repeat(e, side) for side in (key, value))
    query, key, value = (e.lift(e.cast(side, dtype), 4) for side in (query, key, value))
    batch, heads, rows, columns = *((1,) * lead + tuple(e.out.shape))[:2], query.shape[2], key.shape[2]
    query = e.broadcast_to(query, (batch, heads, *query.shape[2:]))
    key, value = (e.broadcast_to(side, (batch, *side.shape[1:])) for side in (key, value))
    shape = (batch, heads, rows, value.shape[3])
    how: dict[str, Any] = {
        "scale": scale,
        "datum_type": tract_dtype(dtype, e.node.where()),
        "acc_datum_type": "f32",
        "is_causal": False,
    }
    if mask is None:
        y = e.op("tract_transformers_sdpa", query, key, value, out=shape, **how)
    else:
        lowest, zero = (e.constant(torch.full([1] * 4, v, dtype=dtype), "scalar") for v in (_MASKED[dtype], 0.0))
        mask = e.lift(mask, 4)
        mask = e.broadcast_to(mask, (*mask.shape[:2], rows, columns))
        bias = e.op("select", mask, zero, lowest, out=mask.shape, dtype=dtype, hint="bias")
        y = e.op("tract_transformers_sdpa", query, key, value, bias, out=shape, hint="mixed", **how)
        some = e.op("any_reduce", mask, out=(*mask.shape[:3], 1), axes=[3], hint="some")
        y = e.op("select", some, y, zero, out=shape, dtype=dtype)
    return e.cast(e.squeeze(y, list(range(lead))), e.out.dtype)


def _before_repeat(e: Emitter, side: Ref) -> Ref:
    """Keys or values as they are before each head is repeated for the queries that share it."""
    found, maker = side, None
    for operator in ("reshape", "tract_core_broadcast", "unsqueeze"):
        maker = e.maker(found)
        if maker is None or maker.operator != operator:
            return side
        found = maker.args[0]
    repeats = maker is not None and dict(maker.attrs)["axes"] == [2] and side.rank == found.rank == 4
    return found if repeats and side.shape[2:] == found.shape[2:] else side


def _masks(e: Emitter, mask: Ref | None, rank: int, dtype: torch.dtype) -> tuple[str, list[Ref]]:
    """How the fragments for a kind of mask end, and what these take behind the other operands."""
    if mask is None:
        return "", []
    if mask.dtype is not torch.bool:
        return "_biased", [e.lift(e.cast(mask, dtype), rank)]
    constants = [e.constant(torch.full([1] * rank, v, dtype=dtype), "scalar") for v in (_MASKED[dtype], 0.0)]
    return "_masked", [e.lift(mask, rank), *constants]


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention(
    e: Emitter,
    query: Ref,
    key: Ref,
    value: Ref,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Ref | None = None,
    scale: float | None = None,
) -> list[Ref]:
    """The same as torch picks it on a CPU; the sums that a backward pass wants are not given."""
    return [scaled_dot_product_attention(e, query, key, value, attn_mask, dropout_p, is_causal, scale=scale)]


def _causal(e: Emitter, rows: Dim, columns: Dim) -> Ref:
    """Lower triangle aligned to the top left, as torch defines is_causal."""
    row, column = (e.arange(0, 1, n, torch.int64) for n in (rows, columns))
    return e.op("ge", e.unsqueeze(row, [1]), e.unsqueeze(column, [0]), dtype=torch.bool, hint="causal")


def _repeat_heads(e: Emitter, side: Ref, query: Ref) -> Ref:
    """Share each key/value head between consecutive query heads: (B, Hkv, S, E) -> (B, Hq, S, E)."""
    heads, wanted = side.shape[-3], query.shape[-3]
    if not isinstance(heads, int) or not isinstance(wanted, int):
        raise e.refuse("the number of heads is dynamic")
    if heads == wanted:
        return side
    *batch, _, rows, features = side.shape
    spread = e.broadcast_to(e.unsqueeze(side, [side.rank - 2]), (*batch, heads, wanted // heads, rows, features))
    return e.reshape(spread, (*batch, wanted, rows, features))
