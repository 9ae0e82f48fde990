"""What strangers wrote or left: bounded where it is read, spelled out where it is shown, never written through.

File names, members of tars, captions, JSON and YAML come from anyone. `strict_json` has what only JSON needs.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

import yaml

MB = 2**20
LARGEST_YAML = MB  # bytes of a config or profile: the longest that a run has written are of some ten thousand
# as omegaconf reads it: libyaml's, which overflows the stack on what is nested too deeply, or else PyYAML's own
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NODES = 100_000  # of a YAML file once its aliases are written out
DEEPEST = 64  # lists and objects within each other, in JSON and YAML
# What moves a terminal's cursor, colours it, breaks a line or turns the writing's direction; and half characters,
# which cannot be written. Joiners inside of words and emoji stay.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]"
)


def printable(text: object, lines: bool = False) -> str:
    r"""`text` for a terminal or a log, in one line: what would steer either is spelled out, as ``\x1b`` or ``\n``.

    Args:
        text: What is shown, by its `str`.
        lines: Whether `text` may have several lines and tabs, as our own tables have.
    """
    if lines:
        return "\n".join("\t".join(map(printable, line.split("\t"))) for line in str(text).split("\n"))
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ValueError: The file has more, or is none: a pipe or a device, perhaps behind a link, has no end.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # before it is opened, for which a pipe would wait
        raise ValueError(f"{path} is no file, but a folder, a pipe or a device: put the file itself there")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if (size := max(size, len(content))) > most:
        raise ValueError(f"{path} has {size / 1e6:,.1f} MB, more than the {most / 1e6:,.1f} MB that are read of it")
    return content


def read_yaml_text(path: Path) -> str:
    """The YAML text in the file `path`. Raises ValueError as `check_yaml` does, and for what is no UTF-8."""
    try:
        text = read_bytes(path, LARGEST_YAML).decode("utf-8-sig")
        check_yaml(text)
    except ValueError as error:  # UnicodeDecodeError, too
        raise ValueError(f"{path}: not YAML: {_in_a_line(error)}") from None
    return text


def check_yaml(text: str) -> None:
    """See that `text` is YAML whose content has bounds: a few aliases of aliases make gigabytes of a few lines.

    Raises ValueError, in one line, for what is no YAML, deeper than `DEEPEST`, larger than `MOST_NODES` once aliases
    are written out, or an alias of what it is itself in.
    """
    sizes: dict[str, int] = {}  # nodes below each anchor
    begun: list[tuple[str | None, int]] = [(None, 0)]  # of each collection not yet closed: its anchor, nodes so far
    try:
        for event in yaml.parse(text, LOADER):
            size = 0
            if isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, 1))
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, size = begun.pop()
                sizes |= {anchor: size} if anchor else {}
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    raise ValueError(f"*{event.anchor} stands for what is not there, or not complete yet")
                size = sizes[event.anchor]
            elif isinstance(event, yaml.ScalarEvent):
                size = 1
                sizes |= {event.anchor: size} if event.anchor else {}
            outer, nodes = begun[-1]
            begun[-1] = outer, nodes + size
            if len(begun) > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            if nodes + size > MOST_NODES:
                raise ValueError(f"more than {MOST_NODES:,} values, aliases written out")
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_in_a_line(error)) from None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
