"""Where a checkpoint lies and what it is: hub, folder, GGUF, PEFT adapter; and the way from there to a model of transformers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_to_nnef.exceptions import (
    T2NError,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorNotImplemented,
    T2NErrorRuntime,
)
from torch_to_nnef.llm_tract import hub
from torch_to_nnef.llm_tract.streaming import load_offloaded, read_into_memory, take_mark
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tensor.checkpoint import few

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from torch_to_nnef.llm_tract.options import LlmOptions

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_COUNTS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_labels"}
_MOST = 1 << 16
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A causal language model on disk, of which nothing but the config was read.

    name: slug, or name of the folder or GGUF file. folder: config, weights and tokenizer. config: of the (base) model.
    gguf: the file in `folder` that holds all of them. slug: where in the hub weights come from that `folder` may lack.
    adapter: folder of a PEFT adapter that `load` merges in. packed: method by which `t2n quantize-shards` packed it.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    gguf: str | None = None
    slug: str | None = None
    adapter: Path | None = None
    trust_remote_code: bool = False
    packed: str | None = None

    @classmethod
    def find(cls, options: LlmOptions) -> Checkpoint:
        """What the options name; fetches no weights.

        Raises `T2NErrorNotFoundFile` (nothing there, not in the hub's cache and no hub), `T2NErrorInvalidArgument` (several GGUF
        files; an adapter that nobody asked to merge, or the other way round), `T2NErrorNotImplemented` (weights that are quantized
        already), `T2NErrorRuntime` (a config that transformers cannot read).
        """
        place, adapter = _place(options.source, is_slug=options.model_slug is not None), None
        name = place.name
        if options.merge_peft is True:
            adapter = _adapter_folder(place)
            place = _place(*_base_of(adapter))
        elif options.merge_peft:
            adapter = _adapter_folder(_place(options.merge_peft, is_slug=not Path(options.merge_peft).is_dir()))
            name = f"{name} + {adapter.name}"
        if (place.folder / hub.ADAPTER_CONFIG).exists():  # transformers would load it unasked
            instead = "merge that one first" if options.merge_peft else "pass -mp to merge it into its base model"
            raise T2NErrorInvalidArgument(f"{place.name} is a PEFT adapter: {instead}")
        config, packed = _config(place, options.trust_remote_code)
        if packed and adapter is not None:
            raise T2NErrorInvalidArgument(f"{place.name} is packed: merge the adapter before it is quantized")
        return cls(
            name=name,
            folder=place.folder,
            config=config,
            packed=packed,
            gguf=place.gguf,
            slug=place.slug,
            adapter=adapter,
            trust_remote_code=options.trust_remote_code,
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's tokenizer if it brings one, else the model's. Raises `T2NErrorRuntime` if there is none."""
        from transformers import AutoTokenizer

        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").exists()
        folder, gguf = (self.adapter, None) if own else (self.folder, self.gguf)
        with _told(f"load the tokenizer of {self.name}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, **_source(gguf, self.trust_remote_code)
            )
        # Where its files lack, transformers may make one of a class by the config, with special tokens alone.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise T2NErrorRuntime(f"{self.name} has no tokenizer: its vocabulary is empty")
        return tokenizer

    @cached_property
    def files(self) -> list[Path]:
        """Files with the weights, fetched if need be. Raises `T2NErrorNotFoundFile` where they lack."""
        if self.gguf is not None:
            return [self.folder / self.gguf]
        if self.slug is not None:
            hub.fetch_weights(self.slug, self.folder)
        files = hub.weight_files(self.folder)
        if not files:
            raise T2NErrorNotFoundFile(
                f"{self.name} has no weights: neither model.safetensors nor its shards, nor pytorch_model.bin"
            )
        return files

    @property
    def nbytes(self) -> int:
        """Bytes of the weights' files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in, by the config or by their files; f32 for GGUF, which is dequantized.

        Raises `T2NErrorNotImplemented` for other types than f32, f16, bf16.
        """
        declared = None if self.gguf is not None else (getattr(self.config, "dtype", None) or _stored_dtype(self.files))
        dtype = torch.float32 if declared is None else declared
        if dtype not in DTYPES.values():
            raise T2NErrorNotImplemented(
                f"{self.name} is stored in {dtype}: name a type to convert it to, -dt f32, f16 or bf16"
            )
        return dtype

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, by the generation config if there is one."""
        path = self.folder / "generation_config.json"
        with _told(f"read {path.name}"):
            declared = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
        ids = getattr(self.config, "eos_token_id", None) if declared is None else declared
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    def bytes_in_memory(self, dtype: torch.dtype) -> int:
        """Bytes of the model's parameters in `dtype`, counted on a model without storage; shared ones once."""
        from transformers import AutoModelForCausalLM

        with _told(f"build {self.name}"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        count: int = sum(parameter.numel() for parameter in model.parameters())
        return count * dtype.itemsize

    def load(
        self, dtype: torch.dtype | None = None, device_map: str = "cpu", attention: str | None = None
    ) -> PreTrainedModel:
        """The model in eval mode, without gradients, the adapter merged; in `dtype`, by default its own.

        device_map: see `LlmOptions`. attention: an attention implementation of transformers; None: what the model prefers.

        Raises `T2NErrorRuntime` for files that transformers cannot read or that lack weights, `T2NErrorNotImplemented` for weights that
        cannot stay on disk, and what `files` and `dtype` raise.
        """
        dtype = self.dtype if dtype is None else dtype
        how: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": attention,
            "trust_remote_code": self.trust_remote_code,
        }
        offloads = self._offloads(device_map, dtype)
        if offloads or self.packed:
            with _told(f"load {self.name}"):
                model: PreTrainedModel = load_offloaded(self.folder, self.config, **how)
            if not offloads:
                model = read_into_memory(model)
        else:
            device_map = "cpu" if device_map == "t2n_auto" else device_map
            model = self._load_in_memory(device_map=device_map, **how)
        if self.adapter is not None:
            model = _merged(model, self.adapter)
        return model.requires_grad_(False).eval()

    def _offloads(self, device_map: str, dtype: torch.dtype) -> bool:
        """Whether weights stay on disk; only safetensors can, and an adapter is merged in memory."""
        resident = "the adapter is merged in memory" if self.adapter is not None else None
        if any(path.suffix != ".safetensors" for path in self.files):
            resident = f"{self.files[0].suffix} files are read as a whole; save the model as safetensors"
        if device_map == "t2n_offload_disk":
            if resident is not None:
                raise T2NErrorNotImplemented(f"the weights of {self.name} cannot stay on disk: {resident}")
            return True
        if device_map != "t2n_auto" or resident is not None:
            return False
        needed, free = self.nbytes if self.packed else self.bytes_in_memory(dtype), _free_memory()
        LOGGER.info("weights take %.2f GB, %.2f GB of memory are free", needed / 1e9, free / 1e9)
        return needed > free / 2

    def _load_in_memory(self, **how: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        how |= {"config": self.config, "weights_only": True}
        how |= {"gguf_file": self.gguf} if self.gguf else {"use_safetensors": self.files[0].suffix == ".safetensors"}
        # What does not fit is left random then, and told below: transformers itself stops at none, or without a name.
        how |= {"ignore_mismatched_sizes": True, "output_loading_info": True, "local_files_only": True}
        with _told(f"load {self.name}"):
            model, info = AutoModelForCausalLM.from_pretrained(self.folder, **how)
        if lacking := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
            raise T2NErrorRuntime(
                f"{self.name} lacks {len(lacking)} weights of its model, or has them in other shapes: {few(lacking)}"
            )
        if unused := sorted(info["unexpected_keys"]):
            LOGGER.warning("%d tensors of %s are not part of the model: %s", len(unused), self.name, few(unused))
        return model


@dataclass(frozen=True)
class _Place:
    """A folder, with the slug it is the snapshot of, and the GGUF file in it that is meant."""

    name: str
    folder: Path
    slug: str | None = None
    gguf: str | None = None


def _place(source: str, is_slug: bool) -> _Place:
    return _in_hub(source) if is_slug else _in_folder(Path(source))


def _in_hub(source: str) -> _Place:
    """`owner/name`, or `owner/name/file.gguf`."""
    owner, _, rest = source.partition("/")
    name, _, gguf = rest.partition("/")
    if not gguf:
        return _Place(source, hub.fetch(source, hub.DESCRIPTION), source)
    folder = hub.fetch(f"{owner}/{name}", [gguf])
    if not gguf.endswith(".gguf") or not (folder / gguf).exists():
        raise T2NErrorNotFoundFile(f"{owner}/{name} has no GGUF file {gguf!r}")
    return _Place(source, folder, gguf=gguf)


def _in_folder(path: Path) -> _Place:
    """A folder in the form of transformers, a `.gguf` file, or a folder with one and nothing else to load."""
    if path.is_file() and path.suffix == ".gguf":
        return _Place(path.stem, path.parent, gguf=path.name)
    if not path.is_dir():
        raise T2NErrorNotFoundFile(f"{path} is neither a folder nor a .gguf file")
    name, ggufs = path.resolve().name, hub.gguf_files(path)
    if hub.weight_files(path) or not ggufs:
        return _Place(name, path)
    if len(ggufs) > 1:
        raise T2NErrorInvalidArgument(f"{path} has {len(ggufs)} GGUF files; name one of them: {', '.join(ggufs)}")
    return _Place(name, path, gguf=ggufs[0])


def _adapter_folder(place: _Place) -> Path:
    if not (place.folder / hub.ADAPTER_CONFIG).exists():
        raise T2NErrorInvalidArgument(f"{place.name} is no PEFT adapter: it has no {hub.ADAPTER_CONFIG}")
    if place.slug is not None:
        hub.fetch(place.slug, hub.ADAPTER_WEIGHTS)
    if not any((place.folder / name).exists() for name in hub.ADAPTER_WEIGHTS):
        raise T2NErrorNotFoundFile(f"the adapter {place.name} has no weights: {' or '.join(hub.ADAPTER_WEIGHTS)}")
    return place.folder


def _base_of(adapter: Path) -> tuple[str, bool]:
    """The base model an adapter names, and whether that is a slug; a folder may be relative to the adapter's."""
    with _told(f"read {hub.ADAPTER_CONFIG}"):
        base = json.loads((adapter / hub.ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
        known = isinstance(base, str) and base != ""
        folder = next((path for path in (Path(base), adapter / base) if path.is_dir()), None) if known else None
    if not known:
        raise T2NErrorInvalidArgument(
            f"the adapter {adapter.name} does not name its base model: pass the base by -s or -d, and the adapter by -mp"
        )
    return (base, True) if folder is None else (str(folder), False)


def _config(place: _Place, trust_remote_code: bool) -> tuple[PreTrainedConfig, str | None]:
    """The config, and the method by which we packed its weights."""
    from transformers import AutoConfig

    if place.gguf is None and not (place.folder / "config.json").exists():
        hint = "; of a repository with GGUF files name one: owner/name/file.gguf" if place.slug else ""
        if (place.folder / "quantize-shards.json").exists():
            hint = "; t2n quantize-shards has not finished it: run it again"
        raise T2NErrorNotFoundFile(f"{place.name} has no config.json and is no GGUF file{hint}")
    with _told(f"read the config of {place.name}"):
        if place.gguf is None:
            json.loads((place.folder / "config.json").read_bytes(), object_pairs_hook=_countable)
        config = AutoConfig.from_pretrained(place.folder, **_source(place.gguf, trust_remote_code))
    packed = take_mark(config)
    if (quantized := getattr(config, "quantization_config", None)) is not None and place.gguf is None:
        how = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise T2NErrorNotImplemented(
            f"the weights of {place.name} are quantized already ({how}): name the checkpoint in float"
        )
    return config, packed


def _countable(pairs: list[tuple[str, Any]]) -> None:
    """Raise `T2NErrorInvalidArgument` for an object of a config that would have transformers make objects without end."""
    if wrong := [
        f"{name} = {n:g}" for name, n in pairs if name in _COUNTS and isinstance(n, int | float) and n > _MOST
    ]:
        raise T2NErrorInvalidArgument(f"config.json: {', '.join(wrong)}, more than {_MOST}")


def _source(gguf: str | None, trust_remote_code: bool) -> dict[str, Any]:
    # Never None: transformers would ask on the terminal.
    return {"trust_remote_code": trust_remote_code} | ({} if gguf is None else {"gguf_file": gguf})


def _free_memory() -> int:
    """Bytes that are free on this machine, at most what its container may have."""
    import psutil

    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    free: int = psutil.virtual_memory().available
    return free if limit == "max" else min(free, int(limit))


def _stored_dtype(files: list[Path]) -> torch.dtype | None:
    """Of the largest tensor of the first file; None for pickles, which would have to be loaded."""
    from safetensors import safe_open

    if files[0].suffix != ".safetensors":
        return None
    with _told(f"read {files[0].name}"), safe_open(files[0], "pt") as tensors:
        largest = max(tensors.keys(), key=lambda name: math.prod(tensors.get_slice(name).get_shape()))
        dtype: torch.dtype = tensors.get_tensor(largest).dtype
        return dtype


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    with _told(f"merge the adapter {adapter.name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that will change
        adapted = PeftModel.from_pretrained(model, adapter)
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise T2NErrorNotImplemented(f"a {adapted.peft_type.value} adapter cannot be merged into weights")
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        return merged


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """What libraries raise, as an error of ours in one line."""
    try:
        yield
    except T2NError:
        raise
    except Exception as failure:
        raise T2NErrorRuntime(
            f"cannot {doing}: {type(failure).__name__}: {' '.join(str(failure).split())}"
        ) from failure
