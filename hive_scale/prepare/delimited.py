"""Rows of text: CSV with any delimiter, TSV, and Flickr's lists of captions."""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from hive_scale.prepare.items import Located, Unreadable
from hive_scale.prepare.json_stream import LONGEST_RECORD

LONGEST_ROW = 2**20  # characters of a row, within which a quotation mark must be closed
DELIMITERS = "\t,;|"
QUOTED = ",;"  # the delimiters of files that surely quote; with the others a quotation mark may be a character
FLICKR = re.compile(r"([^\t]+)#(\d+)\t(.*)")  # 1000268201_693b08cb0e.jpg#0<tab>A child in a pink dress

IMAGE = re.compile(r"\.(jpe?g|png|webp|gif)$", re.IGNORECASE)


def is_caption_list(text: TextIOWrapper, path: Path) -> bool:
    """True if the first line is one of Flickr8k's and Flickr30k's: ``NAME#NUMBER<tab>CAPTION``, without a header."""
    return bool(FLICKR.match(text.readline(LONGEST_ROW)))


def caption_list(text: TextIOWrapper, path: Path) -> Iterator[Located]:
    """Yield {image, caption} of each line of Flickr's list; a line of another form yields an `Unreadable`."""
    for number, line in enumerate(iter(partial(text.readline, LONGEST_RECORD), ""), 1):
        where, line = f"{path.name}, line {number}", line.rstrip("\r\n")
        if found := FLICKR.fullmatch(line):
            yield where, {"image": found[1], "caption": found[3]}
        elif line.strip():
            yield where, Unreadable(f"not NAME#NUMBER, a tab and a caption, but '{line[:60]}'")


def rows(text: TextIOWrapper, path: Path) -> Iterator[Located]:
    """Yield the rows below a header as {column: text}; a row with a wrong number of fields yields an `Unreadable`.

    The header decides which delimiter separates its columns. Raises ValueError if its quotation marks do not match.
    """
    csv.field_size_limit(LONGEST_ROW)
    lines = _Lines(iter(partial(text.readline, LONGEST_RECORD), ""))
    header: list[str] = []
    delimiter = ""
    for first in lines:
        number = lines.number
        if not first.strip("\r\n"):
            continue
        delimiter = delimiter or _delimiter(first, path)
        fields = _fields(first, lines, delimiter, len(header))
        if fields and header:
            yield f"{path.name}, line {number}", dict(zip(header, fields, strict=True))
        elif header:
            yield f"{path.name}, line {number}", Unreadable(_misfit(first, delimiter, header))
        elif not fields:
            raise ValueError(f"{path}: a quotation mark of the header has no partner: mend its first line")
        header = header or _header(fields or [], path)


def _header(fields: Sequence[str], path: Path) -> list[str]:
    """Return the columns' names. Raises ValueError if two are the same, or if they are a sample."""
    names = [name.strip() for name in fields]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path} has column '{twice[0]}' twice: rename one in its first line")
    if any(IMAGE.search(name) for name in names):
        raise ValueError(f"{path} has no header, but begins with '{names[0]}': add a first line, such as image,caption")
    return names


def _delimiter(header: str, path: Path) -> str:
    """Return the delimiter that gives the header most columns; a comma, or a TSV's tab, if none does."""
    best, most = "\t" if path.suffix == ".tsv" else ",", 1
    for one in (best, *DELIMITERS):
        try:
            count = len(next(csv.reader([header], delimiter=one), []))
        except csv.Error:  # a field that is too long
            continue
        if count > most:
            best, most = one, count
    return best


def _misfit(line: str, delimiter: str, header: Sequence[str]) -> str:
    name = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}[delimiter]
    columns = f"not {len(header)} fields as in the header ({', '.join(header[:6])}), or a quotation mark without its "
    return f"{columns}partner, but '{line.strip()[:60]}': put fields with a {name} in quotation marks"


class _Lines(Iterator[str]):
    """Iterator over lines that accepts lines back, to be read again; `number` is that of the last line, from 1."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self.number = 0

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)


def _fields(first: str, lines: _Lines, delimiter: str, width: int) -> list[str] | None:
    """Return the fields of the row that begins with line `first`; None if they are not `width` (0: any number).

    A quotation mark may extend a field over several lines. In a TSV it may also be an ordinary character, as in CC3M
    and CC12M. A TSV line with `width` fields of its own is therefore a row, if the quoted parse does not fit, or if
    the lines the quotation mark would swallow are complete rows.
    """
    swallowed: list[str] = []

    def pull() -> Iterator[str]:
        yield first
        size = len(first)
        while size <= LONGEST_ROW and (line := next(lines, None)) is not None:
            swallowed.append(line)
            yield line
            size += len(line)

    try:
        fields = next(csv.reader(pull(), delimiter=delimiter, strict=True))
    except csv.Error:
        fields = []
    fits = len(fields) == (width or len(fields))
    plain = first.rstrip("\r\n").split(delimiter)
    are_rows = swallowed and all(line.count(delimiter) == width - 1 for line in swallowed if line.strip("\r\n"))
    if delimiter not in QUOTED and len(plain) == width and (not fits or are_rows):
        fields = plain
    elif fits:
        return fields
    lines.give_back(swallowed)
    return fields if fields is plain else None
