"""A small text file that is whole or as it was before: a full disk, or a kill, leaves no half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Put `text` into `path`, down to the disk, for one process at a time. Raises OSError, and then changes nothing."""
    unnamed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unnamed.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unnamed.replace(path)
    except BaseException:
        unnamed.unlink(missing_ok=True)
        raise
