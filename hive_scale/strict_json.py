"""Standard JSON, without NaN and Infinity: a file with one of these is refused by other readers.

Input may be untrusted: its size and depth are bounded, and its text can be encoded as UTF-8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hive_scale.strangers import DEEPEST, MB, read_bytes

LARGEST = 128 * MB  # most bytes of a file that is read whole; in memory it may take twenty times as much
LARGEST_LINE = 4 * MB  # most bytes of a line, or of a sample's record
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escaped surrogate, lone or one of a pair
SURROGATE = re.compile("[\ud800-\udfff]")


def dumps(value: Any, **how: Any) -> str:
    """Serialise `value` as JSON, with null for numbers that are not finite. `how` is passed to `json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def loads(content: str | bytes, most: int = LARGEST, **how: Any) -> Any:
    """Parse the JSON in `content`. `how` is passed to `json.loads`.

    Raises:
        ValueError: It is not JSON in UTF-8, has more than `most` bytes, is nested more than `DEEPEST` deep, or holds
            a lone surrogate, which no file and no tokenizer accepts.
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
    """Raises ValueError if `value` is nested more than `deepest` deep, since code that handles it recurses."""
    if isinstance(value, dict | list):
        if not deepest:
            raise ValueError(f"nested more than {DEEPEST} deep")
        for one in value.values() if isinstance(value, dict) else value:
            check_depth(one, deepest - 1)


def read(path: Path, most: int = LARGEST) -> Any:
    """Parse the JSON file `path`. Raises ValueError as `loads` does, with the path in the message, and OSError."""
    content = read_bytes(path, most)
    try:
        return loads(content, most)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def append_line(path: Path, value: Any) -> None:
    """Append `value` to the JSON-lines file `path`, starting a new line if the last one was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        begun = file.tell() > 0 and not _ends_a_line(file)
        file.write(("\n" * begun + dumps(value) + "\n").encode())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a JSON-lines file: its objects, and the numbers (from 1) of lines that are none. Empty if there is no file.

    A line may be cut off by a kill or a full disk.
    """
    parsed = [parse_line(text) for text in _lines(path)] if path.is_file() else []
    cut = [number for number, line in enumerate(parsed, 1) if line is None]
    return [line for line in parsed if line is not None], cut


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """Parse one line; None if it is cut off, or not a JSON object that `loads` accepts."""
    try:
        line = loads(text, LARGEST_LINE)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without line ends; a line longer than `LARGEST_LINE` is truncated."""
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
    """True if every string in `value`, including keys, can be encoded as UTF-8."""
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
