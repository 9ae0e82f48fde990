"""Write a small text file by atomic rename: after a full disk or a kill it is complete or as before, never half."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` by atomic rename, synced to disk; a link at `path` is replaced, not followed.

    Only one process at a time may write `path`. Raises OSError, and then leaves `path` unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unnamed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unnamed.unlink(missing_ok=True)
    try:
        with unnamed.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unnamed.replace(path)
    except BaseException:
        with suppress(OSError):
            unnamed.unlink(missing_ok=True)
        raise
