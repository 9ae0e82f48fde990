"""Text files of any encoding: UTF-8, UTF-16 and Windows' cp1252 are told apart by their bytes; others are named."""

from __future__ import annotations

import codecs
import re
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

PIECE = 2**20  # bytes read at a time
BOMS = (  # in this order, since UTF-32's begins with UTF-16's
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # bytes that are no character of cp1252
HIGH = re.compile(rb"[\x80-\xff]")
NEIGHBOURS = re.compile(rb"(?<=[\x80-\xff])[\x80-\xff]")
WORD = re.compile(rb"[^\s,;|\"]{0,20}[\x80-\xff][^\s,;|\"]{0,20}")


def open_text(file: BinaryIO, encoding: str) -> TextIOWrapper:
    """Read `file` as text. Bytes that are no text become lone surrogates, which lose their record and not the file."""
    codecs.register_error("hive_scale_surrogates", _as_surrogates)  # Python's own knows no UTF-16
    return TextIOWrapper(file, encoding=encoding, errors="hive_scale_surrogates", newline="")


def decode(content: bytes, encoding: str) -> str:
    """Decode a short text: by its byte order mark, else by `encoding`, else as UTF-8. Raises ValueError."""
    name = next((name for mark, name in BOMS if content.startswith(mark)), encoding or "utf-8")
    try:
        return content.decode(name)
    except UnicodeDecodeError as error:
        at = content[max(0, error.start - 10) : error.start + 10]
        raise ValueError(f"no {name} at byte {error.start} ({at!r}): --encoding NAME, such as cp1252") from None


def check_encoding(name: str) -> str:
    """Return `name` if Python knows this encoding of text. Raises ValueError."""
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(f"--encoding {name}: no such encoding; common are utf-8, cp1252, utf-16, shift_jis") from None
    return name


def encoding_of(path: Path) -> tuple[str, str]:
    """Return (the encoding of the text file `path`, a note for the user if it is not UTF-8).

    Without a byte order mark, zeros at every other byte of the beginning tell UTF-16. A file whose other bytes than
    ASCII are mostly not UTF-8 is read as cp1252, if all of them are characters there and few stand side by side, as
    in Western words; this takes a pass over the file.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    name = next((name for mark, name in BOMS if start.startswith(mark)), "") or _without_mark(start)
    if name:
        note = "" if name == "utf-8-sig" else f"{path.name} is read as {name}; --encoding names another one"
        return name, note
    word = _western(path)
    if not word:
        return "utf-8", ""
    return "cp1252", f"{path.name} is no UTF-8: read as cp1252, such as '{word}'; --encoding names another one"


def _without_mark(start: bytes) -> str:
    """Name UTF-16 by its zeros: half of the bytes of ASCII text, and every second one. "" if it is none."""
    even, odd = start[::2].count(0), start[1::2].count(0)
    pairs = len(start) // 2
    if pairs < 8 or max(even, odd) < pairs // 2 or min(even, odd) > pairs // 10:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"


def _western(path: Path) -> str:
    """Return a word of the file that is no ASCII, if it is text in cp1252; else ""."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    sound = broken = high = neighbours = 0
    word = b""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            text = decoder.decode(piece)
            if text.isascii():
                continue
            lost = len(re.findall("[\udc80-\udcff]", text))
            broken += lost
            sound += len(re.findall("[^\x00-\x7f]", text)) - lost
            if sound > 100 * broken:
                return ""  # UTF-8, as most files: the rest need not be read
            if UNDEFINED.search(piece):
                return ""
            high += len(HIGH.findall(piece))
            neighbours += len(NEIGHBOURS.findall(piece))
            found = WORD.search(piece)
            word = word or (found[0] if found else b"")
    return word.decode("cp1252") if broken > sound and 3 * neighbours <= high else ""


def _as_surrogates(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end
