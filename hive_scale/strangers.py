"""Handle untrusted input: bounded when it is read, escaped when it is printed.

File names, members of tars, captions, JSON and YAML may come from anyone. `strict_json` has what only JSON needs.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

MB = 2**20
LARGEST_YAML = MB  # most bytes of a config or profile; the longest config that a run writes has about 10 kB
# omegaconf's loader is libyaml's if available, which overflows the stack on deep nesting, else PyYAML's own
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NODES = 100_000  # most nodes of a YAML file with its aliases expanded
DEEPEST = 64  # most levels of nested lists and objects, in JSON and YAML
# Characters that move a terminal's cursor, colour it, break a line or change the direction of writing, and lone
# surrogates, which cannot be encoded. Joiners inside of words and emoji are not among them.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]"
)


def printable(text: object, lines: bool = False) -> str:
    r"""Escape `text` for one line of a terminal or a log: control characters become ``\x1b``, ``\n`` and so on.

    Args:
        text: The object to show, by its `str`.
        lines: True if line breaks and tabs may stay, as in our own tables.
    """
    if lines:
        return "\n".join("\t".join(map(printable, line.split("\t"))) for line in str(text).split("\n"))
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        ValueError: The file is larger, or not regular: a pipe or a device, perhaps behind a link, never ends.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # checked before opening, because opening a pipe blocks
        raise ValueError(f"{path} is no file, but a folder, a pipe or a device: put the file itself there")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if (size := max(size, len(content))) > most:
        raise ValueError(f"{path} has {size / 1e6:,.1f} MB, more than the {most / 1e6:,.1f} MB that are read of it")
    return content


def read_yaml_text(path: Path, mend: Callable[[str], str] = str) -> str:
    """Read YAML text from the file `path`; if it is not YAML, but would be after `mend`, return it mended.

    Raises ValueError as `check_yaml` does, or if it is not UTF-8.
    """
    try:
        text = read_bytes(path, LARGEST_YAML).decode("utf-8-sig")
        try:
            check_yaml(text)
        except ValueError as error:
            text = mend(text)
            with suppress(ValueError):
                check_yaml(text)
                return text
            raise error
    except ValueError as error:  # UnicodeDecodeError, too
        raise ValueError(f"{path}: not YAML: {_in_a_line(error)}") from None
    return text


def check_yaml(text: str) -> None:
    """Check that `text` is YAML of bounded size. Nested aliases could make gigabytes from a few lines.

    Raises ValueError with a one-line message if it is not YAML, is nested deeper than `DEEPEST`, has more than
    `MOST_NODES` nodes with aliases expanded, or has an alias to a node that contains it.
    """
    sizes: dict[str, int] = {}  # number of nodes below each anchor
    begun: list[tuple[str | None, int]] = [(None, 0)]  # (anchor, nodes so far) of each open collection
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
