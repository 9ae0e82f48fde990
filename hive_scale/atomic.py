"""A small text file that is whole or as it was before: a full disk, or a kill, leaves no half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Put `text` into `path`, down to the disk, for one process at a time; never through a link that lies there.

    Raises OSError, and then changes nothing.
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
