"""Text files that are replaced whole or not at all."""

import os
import secrets
from pathlib import Path

from torch_to_nnef.exceptions import T2NErrorRuntime


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a sibling, sync it, and rename it over `path`.

    Raises `T2NErrorRuntime` when the system refuses.
    """
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # os.open, unlike tempfile, leaves the mode to the umask.
        with os.fdopen(os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    except OSError as error:
        raise T2NErrorRuntime(f"cannot write {str(path)!r}: {error}") from error
    finally:
        sibling.unlink(missing_ok=True)
