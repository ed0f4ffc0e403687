"""Files of a checkpoint: in the hub's cache or fetched into it, and which of a folder's files hold the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch_to_nnef.exceptions import T2NErrorNotFoundFile
from torch_to_nnef.log import LOGGER
from torch_to_nnef.tensor.checkpoint import INDEX, SINGLE, weight_map

# Everything but weights: config, generation config, index of the shards, tokenizer, chat template.
DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# In order of preference: the index of the shards, the file if there are none.
_WEIGHTS = (
    (INDEX, SINGLE),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


def fetch(slug: str, patterns: Sequence[str]) -> Path:
    """The snapshot of `slug` with the files that match; what the cache has is not fetched again, and suffices offline.

    Raises `T2NErrorNotFoundFile` if the cache lacks them and the hub cannot be reached, or does not know or show `slug`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # `*` matches across folders, and those hold the same weights for other programs.
        elsewhere = [] if any("/" in pattern for pattern in patterns) else ["*/*"]
        return Path(snapshot_download(slug, allow_patterns=list(patterns), ignore_patterns=elsewhere))
    except HFValidationError as error:
        raise T2NErrorNotFoundFile(
            f"{slug!r} is no name of a model: write owner/name, or pass a folder by -d"
        ) from error
    except LocalEntryNotFoundError as error:
        if (partial := getattr(error, "snapshot_path", None)) is not None:
            return Path(partial)  # whether a file that is needed lacks is seen where it is needed
        raise T2NErrorNotFoundFile(
            f"{slug} is not in the cache of the hub, and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set): "
            "fetch it on a machine that can, or pass a folder by -d"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise T2NErrorNotFoundFile(f"the hub gives no {slug}: {reason}") from error


def fetch_weights(slug: str, folder: Path) -> None:
    """Fetch into the snapshot `folder` of `slug` the files `weight_files` looks for."""
    for index, single in _WEIGHTS:
        names = _shards(folder / index) if (folder / index).exists() else [single]
        if not all((folder / name).exists() for name in names):
            fetch(slug, names)
        if all((folder / name).exists() for name in names):
            return


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights: safetensors if there are any, else pickles; none in a folder without weights.

    Raises `T2NErrorNotFoundFile` for shards that lack.
    """
    for index, single in _WEIGHTS:
        if (folder / index).exists():
            return _present(folder, _shards(folder / index))
        if (folder / single).exists():
            return [folder / single]
    return []


def gguf_files(folder: Path) -> list[str]:
    """Names of the GGUF files in `folder`."""
    return sorted(path.name for path in folder.glob("*.gguf"))


def _shards(index: Path) -> list[str]:
    return sorted(set(weight_map(index).values()))


def _present(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = [folder / name for name in names]
    if lacking := [path.name for path in paths if not path.exists()]:
        raise T2NErrorNotFoundFile(f"{folder.name}: {len(lacking)} of {len(paths)} shards lack: {', '.join(lacking)}")
    LOGGER.debug("%d weight files in %s", len(paths), folder)
    return paths
