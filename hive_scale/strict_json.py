"""JSON as its standard has it, which knows no NaN and no infinity: other readers refuse a file with one such word."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dumps(value: Any, **how: Any) -> str:
    """`value` as JSON; a number that is not finite becomes null. `how` is as `json.dumps` takes it."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def append_line(path: Path, value: Any) -> None:
    """Add `value` to the JSON lines at `path`, on a line of its own also where the last was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        begun = file.tell() > 0 and not _ends_a_line(file)
        file.write(("\n" * begun + dumps(value) + "\n").encode())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects in a file of JSON lines, if there is one, and the numbers (from 1) of lines that are none.

    A process that is killed, or a full disk, cuts a line off.
    """
    texts = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    parsed = [parse_line(text) for text in texts]
    cut = [number for number, line in enumerate(parsed, 1) if line is None]
    return [line for line in parsed if line is not None], cut


def parse_line(text: str) -> dict[str, Any] | None:
    """The object in `text`; None if it is cut off."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
