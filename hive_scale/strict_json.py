"""JSON as its standard has it, which knows no NaN and no infinity: other readers refuse a file with one such word.

What is read may come from anyone: it has bounds of size and depth, and holds text that can be written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hive_scale.strangers import DEEPEST, MB, read_bytes

LARGEST = 128 * MB  # bytes of a file that is read whole; in memory it may take twenty times as much
LARGEST_LINE = 4 * MB  # bytes of a line, or of a sample's record
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON spells a half of a character, alone or beside the other one
SURROGATE = re.compile("[\ud800-\udfff]")


def dumps(value: Any, **how: Any) -> str:
    """`value` as JSON; a number that is not finite becomes null. `how` is as `json.dumps` takes it."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def loads(content: str | bytes, most: int = LARGEST, **how: Any) -> Any:
    """What the JSON in `content` says; `how` is as `json.loads` takes it.

    Raises:
        ValueError: It is no JSON in UTF-8, larger than `most` bytes, nested more than `DEEPEST` deep, or it spells
            half a character (a lone surrogate), which no file and no tokenizer takes.
    """
    try:
        data = content.encode() if isinstance(content, str) else content
        if len(data) > most:
            raise ValueError(f"{len(data) / 1e6:,.1f} MB of JSON, more than the {most / 1e6:,.1f} MB that are read")
        value = json.loads(data.decode("utf-8-sig"), **how)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate)") from None
    check_depth(value)
    if HALF.search(data) and not _is_text(value):
        raise ValueError("half a character (a lone surrogate)")
    return value


def check_depth(value: Any, deepest: int = DEEPEST) -> None:
    """Raises ValueError if lists and objects lie more than `deepest` deep in `value`: what handles them recurses."""
    if isinstance(value, dict | list):
        if not deepest:
            raise ValueError(f"nested more than {DEEPEST} deep")
        for one in value.values() if isinstance(value, dict) else value:
            check_depth(one, deepest - 1)


def read(path: Path, most: int = LARGEST) -> Any:
    """What the JSON file `path` says. Raises ValueError as `loads` does, with the path, and OSError."""
    content = read_bytes(path, most)
    try:
        return loads(content, most)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


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
    parsed = [parse_line(text) for text in _lines(path)] if path.is_file() else []
    cut = [number for number, line in enumerate(parsed, 1) if line is None]
    return [line for line in parsed if line is not None], cut


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """The object in `text`; None if it is cut off, or no object that `loads` reads."""
    try:
        line = loads(text, LARGEST_LINE)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends; of one that is too long, its beginning."""
    with path.open("rb") as file:
        while line := file.readline(LARGEST_LINE + 1):
            rest = line
            while len(rest) > LARGEST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(LARGEST_LINE + 1)
            yield line.rstrip(b"\r\n")


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


def _is_text(value: Any) -> bool:
    """Whether every string in `value`, keys too, can be written as UTF-8."""
    if isinstance(value, dict):
        return all(_is_text(key) and _is_text(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(_is_text, value))
    return not isinstance(value, str) or not SURROGATE.search(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
