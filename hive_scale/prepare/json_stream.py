"""JSON of gigabytes, record by record: lists, lines, and COCO's captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from hive_scale.prepare.items import Located, Record, Unreadable
from hive_scale.strict_json import check_depth

PIECE = 2**20  # characters read at a time
LONGEST_RECORD = 64 * PIECE  # characters of a record
LINES = (".jsonl", ".ndjson")


def is_list(text: TextIOWrapper, path: Path) -> bool:
    """True if the file is a JSON list."""
    return path.suffix not in (*LINES, ".csv", ".tsv") and _Scanner(text, path).next() == "["


def is_lines(text: TextIOWrapper, path: Path) -> bool:
    """True if the file is JSON lines, by its name or its first character."""
    return path.suffix in (".json", *LINES) or (
        path.suffix not in (".csv", ".tsv") and _Scanner(text, path).next() == "{"
    )


def is_coco(text: TextIOWrapper, path: Path) -> bool:
    """True if the file is one object with a list of images or of annotations, as COCO's are."""
    scanner = _Scanner(text, path)
    if path.suffix in (*LINES, ".csv", ".tsv") or scanner.next() != "{":
        return False
    with suppress(ValueError):
        for key in scanner.members():
            if key in ("images", "annotations") and scanner.next() == "[":
                first = next(scanner.array(), None)
                return isinstance(first, dict) and ("file_name" in first or "image_id" in first)
            scanner.value()
    return False


def list_records(text: TextIOWrapper, path: Path) -> Iterator[Located]:
    """Yield the objects of a JSON list one by one; other elements yield an `Unreadable`.

    Raises ValueError if the list does not end or holds invalid JSON: the start of the next record is then unknown.
    """
    scanner = _Scanner(text, path)
    scanner.next()
    for number, value in enumerate(scanner.array(), 1):
        yield f"{path.name}, record {number}", _object(value)
    scanner.end()


def line_records(text: TextIOWrapper, path: Path) -> Iterator[Located]:
    """Yield the objects of JSON lines; other lines yield an `Unreadable`."""
    number = 0
    while line := text.readline(LONGEST_RECORD):
        number += 1
        if len(line) == LONGEST_RECORD:
            raise ValueError(f"{path}: a line has more than {LONGEST_RECORD:,} characters: is it JSON?")
        if line.strip() == "{":
            raise ValueError(
                f"{path} holds an object of several lines at line {number}: a list of records, a line per record, or "
                "COCO's images and annotations are read"
            )
        if line.strip():
            yield f"{path.name}, line {number}", _line(line)


def coco_records(text: TextIOWrapper, path: Path) -> Iterator[Located]:
    """Yield a record for each image of COCO's captions, with all its ``captions``.

    The captions of an image lie anywhere in the file, so that all of them are in memory at once. Annotations without a
    caption or an image, and images without a caption or with another's id, yield an `Unreadable`. Raises ValueError as
    `list_records`.
    """
    images: dict[Any, dict[str, Any]] = {}
    captions: dict[Any, list[str]] = {}
    scanner = _Scanner(text, path)
    scanner.next()
    for key in scanner.members():
        if key not in ("images", "annotations") or scanner.next() != "[":
            scanner.value()
            continue
        for number, one in enumerate(scanner.array(), 1):
            where, one = f"{path.name}, {key}[{number - 1}]", _object(one)
            about = one.get("id" if key == "images" else "image_id") if isinstance(one, dict) else None
            if isinstance(one, Unreadable):
                yield where, one
            elif not isinstance(about, int | str):
                yield where, Unreadable(f"no id of an image, but {', '.join(list(one)[:6])}")
            elif key == "images" and about in images:
                yield where, Unreadable(f"its id, {about}, is an earlier image's, too")
            elif key == "images":
                images[about] = one
            elif isinstance(caption := one.get("caption"), str):
                captions.setdefault(about, []).append(caption)
            else:
                found = ", ".join(list(one)[:6])
                yield where, Unreadable(f"no caption, but {found}: give COCO's captions_*.json")
    scanner.end()
    for about, said in captions.items():
        if about not in images:
            yield f"{path.name}, image {about}", Unreadable(f"not in images, but {len(said)} captions are about it")
    for about, image in images.items():
        where = f"{path.name}, image {about}"
        told = captions.get(about)
        yield where, image | {"captions": told} if told else Unreadable("no annotation is a caption of it")


def _line(line: str) -> Record:
    try:
        return _object(json.loads(line))
    except json.JSONDecodeError as error:
        return Unreadable(f"its line is not JSON: {error.msg}")
    except (ValueError, RecursionError):
        return Unreadable("its line is not JSON that can be read: a number too long, or nested too deeply")


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        return Unreadable(f"no {{...}}, but a {type(value).__name__}")
    try:
        check_depth(value)
    except ValueError as error:
        return Unreadable(str(error))
    return value


class _Scanner:
    """Parses JSON values one after another from a text that is never held in memory as a whole."""

    def __init__(self, text: TextIOWrapper, path: Path) -> None:
        self._text, self._path = text, path
        self._buffer, self._at, self._passed = "", 0, 0

    def array(self) -> Iterator[Any]:
        """Yield the elements of the array that begins here."""
        self._at += 1
        while self.next() not in ("]", ""):
            yield self.value()
            self._comma("]")
        if not self.next():
            raise self._wrong("its list does not end: the file was cut short")
        self._at += 1

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that begins here. The caller reads each value before the next key."""
        self._at += 1
        while self.next() not in ("}", ""):
            key = self.value()
            if not isinstance(key, str) or self.next() != ":":
                raise self._wrong("a key in quotation marks and ':' are missing")
            self._at += 1
            yield key
            self._comma("}")
        if not self.next():
            raise self._wrong("its object does not end: the file was cut short")
        self._at += 1

    def end(self) -> None:
        """Raise ValueError if anything follows."""
        if self.next():
            raise self._wrong("more follows behind the end of its list")

    def next(self) -> str:
        """Peek at the next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more(PIECE):
                return ""

    def value(self) -> Any:
        """Return the value that begins here. Raises ValueError if it is not JSON."""
        self.next()
        size = PIECE
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:  # also raised if the record's end is not in the buffer yet
                wrong = self._wrong(error.msg, error.pos)
                if len(self._buffer) - self._at > LONGEST_RECORD or not self._more(size):
                    raise wrong from None
            except (ValueError, RecursionError):
                raise self._wrong("a number is too long, or a record nested too deeply") from None
            else:
                # a number may continue beyond the buffer
                if end < len(self._buffer) or not self._more(size):
                    self._at = min(end, len(self._buffer))
                    return value
            size *= 2  # doubling keeps rescans of a long record few

    def _comma(self, end: str) -> None:
        if self.next() == ",":
            self._at += 1
        elif self.next() not in (end, ""):
            raise self._wrong(f"',' or '{end}' is missing")

    def _more(self, size: int) -> bool:
        piece = self._text.read(size)
        self._passed += self._at
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece)

    def _wrong(self, message: str, at: int | None = None) -> ValueError:
        place = self._passed + (self._at if at is None else at)
        return ValueError(f"{self._path} is not JSON at character {place}: {message}")
