"""Checkpoints of random weights, written a tensor at a time: an 8B-shaped Llama takes 16 GB of disk and little memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

_PIECE = 4 << 20
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama; the default is Llama 3.1 8B."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 128256

    def config(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": str(dtype).removeprefix("torch."),
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight, in the order of the layers."""
        kv = self.hidden // self.heads * self.key_value_heads
        block = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        layers = {f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in block.items()}
        ends = {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}
        return {"model.embed_tokens.weight": (self.vocabulary, self.hidden), **layers, **ends}

    def nbytes(self, itemsize: int = 2) -> int:
        """Of all weights."""
        return itemsize * sum(prod(shape) for shape in self.shapes().values())

    def largest(self) -> int:
        """Elements of the largest weight."""
        return max(prod(shape) for shape in self.shapes().values())


def write_checkpoint(
    folder: Path, model: Llama, shard_bytes: int = 2 << 30, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """config.json, an index and shards of at most `shard_bytes` (or one tensor) in `folder`; norms are 1, the rest N(0, 0.02)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config(dtype)))
    shards = list(_shards(model.shapes(), shard_bytes // dtype.itemsize))
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        _write_shard(folder / name, shapes, dtype, generator)
    index = {"metadata": {"total_size": model.nbytes(dtype.itemsize)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shards(shapes: dict[str, tuple[int, ...]], most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(map(prod, shard.values())) + prod(shape) > most:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator
) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        stop = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Random numbers take longer than all else: one piece serves every weight, from another place in it each time.
    noise = (0.02 * torch.randn(_PIECE + 4096, generator=generator)).to(dtype)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = prod(shape)
            while left:
                start, size = int(torch.randint(4096, (), generator=generator)), min(left, _PIECE)
                piece = noise[start : start + size] if len(shape) > 1 else torch.ones(size, dtype=dtype)
                file.write(memoryview(piece.view(torch.uint8).numpy()))
                left -= size
