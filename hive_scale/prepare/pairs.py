"""Images with their captions beside them, as files of a folder or members of tars: one sample per key.

This is img2dataset's layout ``files`` (00000/000000000.jpg, .txt, .json), kohya's ``.caption`` files, and tars of an
image and a record without a text.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_scale.data.images import LARGEST_FILE
from hive_scale.data.tar_scan import IMAGES, LARGEST_CAPTION, damage, grouped, missing_samples, tar_files
from hive_scale.prepare.image_sources import InFile, Place
from hive_scale.prepare.items import Item, Source, check_file, file_identity
from hive_scale.prepare.record_text import captions_of
from hive_scale.prepare.text_files import check_encoding, decode
from hive_scale.strangers import read_bytes
from hive_scale.strict_json import LARGEST_LINE, loads

TEXTS = ("txt", "caption", "text")  # endings of captions, in order of preference
RECORD = "json"


@dataclass(frozen=True)
class InTar:
    """A member of a tar, by its byte range."""

    archive: Path
    offset: int
    size: int

    def read(self) -> bytes:
        if self.offset < 0:
            raise ValueError(f"a link in {self.archive.name} stands for it: make the tar with the files themselves")
        if not 0 <= self.size <= LARGEST_FILE:
            raise ValueError(f"the image has {self.size:,} bytes, more than {LARGEST_FILE:,}")
        with self.archive.open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise ValueError(f"{self.archive.name} is cut short")
        return data


def pairs(places: Sequence[Path], caption: str = "", encoding: str = "") -> Source:
    """Read folders, at any depth, and tars, whose files with one key are an image and its caption.

    The caption is a .txt, .caption or .text, or a column of a .json: `caption` names an ending or a column. Files of
    other kinds are ignored. `encoding` is that of the texts if they are not UTF-8. Raises ValueError if a place is
    neither a folder nor a tar, or holds no image.
    """
    if encoding:
        check_encoding(encoding)
    for place in places:
        if not place.exists():
            raise ValueError(f"{place} is not there: give a folder of images and captions, or tars of them")
        check_file(place, "tar")
        if place.is_file() and not tarfile.is_tarfile(place):
            raise ValueError(f"{place} is neither a folder nor a tar: prepare_data.py table reads CSV and JSON files")

    def items() -> Iterator[Item]:
        done = 0
        for place in places:
            reader = _in_folder if place.is_dir() else _in_tar
            for where, key, files, size in reader(place):
                done += size
                yield _item(where, key, files, caption, encoding, done)

    told = [[str(place.resolve())] if place.is_dir() else file_identity(place) for place in places]
    length = sum(_count(place) if place.is_dir() else place.stat().st_size for place in places)
    identity = {"pairs": told, "columns": [caption, *[encoding] * bool(encoding)], "length": length}
    return Source(items, length, identity, ", ".join(map(str, places[:3])))


def has_captions(images: Sequence[Path]) -> bool:
    """True if a caption lies beside every one of some images, so that their folder's name is no class."""
    return bool(images) and all(any(path.with_suffix(f".{one}").is_file() for one in TEXTS) for path in images)


Files = Mapping[str, Place] | str  # ending -> place; a str is the reason why there are none


def _in_folder(root: Path) -> Iterator[tuple[str, str, Files, int]]:
    """Yield (place for messages, key, files by ending, number of files) of each key below `root`."""
    for folder, names in _walk(root):
        shown = folder.relative_to(root.parent)
        found: dict[str, dict[str, Place]] = {}
        sizes: dict[str, int] = {}
        for name in names:
            stem, _, ending = name.rpartition(".")
            sizes[stem] = sizes.get(stem, 0) + 1
            files = found.setdefault(stem, {})
            if files.setdefault(ending.lower(), InFile(folder / name)) != InFile(folder / name):  # a.jpg beside a.JPG
                yield f"{shown / name}", f"{shown / stem}", "its name differs from another file's in its case only", 0
        samples = 0
        for stem, files in found.items():
            samples += any(ending in files for ending in IMAGES)
            yield from _sample(f"{shown / stem}", f"{shown / stem}", files, sizes[stem])
        if short := missing_samples(str(folder), samples):
            yield f"{shown}", f"{shown}", short, 0


def _in_tar(path: Path) -> Iterator[tuple[str, str, Files, int]]:
    """Yield the same of each key of a tar, with bytes in place of files; also what is wrong with the tar."""
    gaps: list[tuple[int, int]] = []
    samples = 0
    with path.open("rb") as file:
        for key, members in grouped(tar_files(file, gaps)):
            files = {ending: InTar(path, *where) for ending, where in members.items()}
            samples += any(ending in files for ending in IMAGES)
            size = sum(512 + size for _, size in members.values())
            yield from _sample(f"{path.name}, {key}", key, files, size)
        for reason in (damage(file, gaps), missing_samples(str(path), samples)):
            if reason:
                yield path.name, path.name, reason, 0


def _item(where: str, key: str, files: Files, column: str, encoding: str, done: int) -> Item:
    if isinstance(files, str):
        return Item(None, "", {}, key, done, files, where)
    image = next((files[ending] for ending in IMAGES if ending in files), None)
    found = " and ".join(f".{ending}" for ending in files)
    record: dict[str, Any] = {}
    try:
        if image is None:
            raise ValueError(f"no image (.jpg, .png or .webp) beside its caption: only {found}")
        record = _record(files)
        texts = {ending: _text(files[ending], ending, encoding) for ending in TEXTS if ending in files}
        if column and column not in (*texts, *record):
            raise ValueError(f"no .{column} and no column '{column}': found {found} (--caption ENDING or COLUMN)")
        if not (texts or record):
            raise ValueError(
                f"no caption beside it: only {found}; .txt, .caption and .json are read; prepare_data.py "
                "table reads a list of captions, and classes a folder per class"
            )
        captions, kept = _captions(texts, record, column)
    except ValueError as error:
        return Item(None, "", record, key, done, str(error), where)
    return Item(image, captions[0], kept, key, done, "", where, len(captions) - 1)


def _captions(texts: Mapping[str, str], record: dict[str, Any], column: str) -> tuple[list[str], dict[str, Any]]:
    """Return (captions, the record to write): of the files with captions, or else of the record."""
    if not texts or (column and column not in texts):
        return captions_of(record, column)
    first = column or next(iter(texts))
    captions = list(dict.fromkeys([texts[first], *texts.values()]))
    said, kept = captions_of({"captions": captions})
    own = record if "captions" in record or len(said) < 2 else record | {"captions": kept["captions"]}
    return said, own


def _record(files: Mapping[str, Place]) -> dict[str, Any]:
    """Return the .json of a key, {} if it has none. Raises ValueError if it is no JSON object."""
    if RECORD not in files:
        return {}
    try:
        record = loads(_read(files[RECORD], LARGEST_LINE), LARGEST_LINE)
    except ValueError as error:
        raise ValueError(f"its .json cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"its .json holds no object, but a {type(record).__name__}")
    return record


def _text(place: Place, ending: str, encoding: str) -> str:
    try:
        return decode(_read(place, LARGEST_CAPTION), encoding)
    except ValueError as error:
        raise ValueError(f"its .{ending}: {error}") from None


def _read(place: Place, most: int) -> bytes:
    if isinstance(place, InFile):
        return read_bytes(place.path, most)
    if isinstance(place, InTar) and place.size > most:
        raise ValueError(f"{place.size:,} bytes, more than {most:,}")
    return place.read()


def _sample(where: str, key: str, files: Mapping[str, Place], size: int) -> Iterator[tuple[str, str, Files, int]]:
    """Yield the sample of a key, if an image or a text is there, and a reason for each further image."""
    used, *others = [ending for ending in IMAGES if ending in files] or [""]
    if used or any(ending in files for ending in TEXTS):
        yield where, key, files, size
    for other in others:
        yield where, key, f"a further image, .{other}: only .{used} is used", 0


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, sorted names of its files), sorted; hidden ones, which desktops leave behind, are skipped."""
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that cannot be read


def _count(root: Path) -> int:
    return sum(len(names) for _, names in _walk(root))
