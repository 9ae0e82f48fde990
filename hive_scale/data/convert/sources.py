"""The layouts that public sets come in, streamed as `Item`s: no more than a shard's are in memory at once."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from hive_scale.data.convert.pictures import InFile, InParquet, Pictures, Place
from hive_scale.data.turns import turns_of

PIECE = 2**20  # characters of JSON read at a time
CAPTIONS = ("caption", "text", "txt")  # columns that hold one, in the order in which they are looked for
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Item:
    """One sample before its picture is read. Without `place` it cannot be used, for `reason`."""

    place: Place | None
    caption: str
    record: Mapping[str, Any]
    group: str  # items of one group, such as those about one picture, stay on one side of the split
    done: int  # how far into the source this is
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """`length` is what `Item.done` runs up to; `identity` tells one source from another."""

    items: Callable[[], Iterator[Item]]
    length: int
    identity: dict[str, Any] = field(default_factory=dict)


def table(path: Path, images: Path, image: str = "image", caption: str = "") -> Source:
    """Records of a JSON array, JSON lines, CSV or TSV, each naming a picture in `images`, a folder or a zip.

    A record has a conversation (LLaVA's ``conversations``, or ``messages``) or a caption in column `caption`.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: give the JSON, JSONL, CSV or TSV file that names the pictures")
    pictures = Pictures(images)

    def items() -> Iterator[Item]:
        with path.open("rb") as file:
            for record in _rows(file, path) if path.suffix in (".csv", ".tsv") else json_records(file, path):
                name = record.get(image)
                if isinstance(name, list) and len(name) == 1:
                    [name] = name
                place = pictures.find(name) if isinstance(name, str) and name else None
                missing = f"there is no {name} in {images}" if name else "no picture: text alone"
                yield _item(place, missing, record, caption, str(name), file.tell())

    return Source(items, path.stat().st_size, {"table": _identity(path), "columns": [image, caption]})


def parquet(files: Sequence[Path], image: str = "image", caption: str = "") -> Source:
    """Rows of parquet files with a picture in column `image` and a conversation, a caption or a label."""
    from pyarrow.parquet import ParquetFile

    opened = {}
    for path in files:
        try:
            opened[path] = ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None
        if image not in opened[path].schema_arrow.names:
            names = ", ".join(opened[path].schema_arrow.names)
            raise ValueError(f"{path} has no column '{image}': name the pictures' with --image ({names})")

    def items() -> Iterator[Item]:
        done = 0
        for path, file in opened.items():
            others = [name for name in file.schema_arrow.names if name != image]
            classes = _class_names(file.schema_arrow.metadata)
            for group in range(file.num_row_groups):
                for row, record in enumerate(file.read_row_group(group, others).to_pylist()):
                    done += 1
                    for column, names in classes.items():
                        if record[column] is not None:
                            record["class"] = names[record[column]]
                    place = InParquet(path, image, group, row)
                    yield _item(place, "", record, caption, str(record.get("id") or done), done)

    rows = sum(file.metadata.num_rows for file in opened.values())
    return Source(items, rows, {"parquet": [_identity(path) for path in files], "columns": [image, caption]})


def classes(folder: Path) -> Source:
    """A folder of class folders, as torchvision's ImageFolder has it: the class is label and caption."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise ValueError(f"{folder} holds no class folders: give the folder above them, such as imagenet/train")

    def items() -> Iterator[Item]:
        done = 0
        for label, name in enumerate(names):
            for path in sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in ENDINGS):
                done += 1
                record = {"label": label, "class": name, "image": str(path.relative_to(folder))}
                yield Item(InFile(path), name.replace("_", " "), record, str(path), done)

    count = sum(path.suffix.lower() in ENDINGS for name in names for path in (folder / name).rglob("*"))
    return Source(items, count, {"classes": [str(folder.resolve()), count]})


def json_records(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array, or of JSON lines, one by one: such files reach gigabytes."""
    text, scan = TextIOWrapper(file, encoding="utf-8-sig"), json.JSONDecoder().raw_decode
    buffer, at, size, passed = "", 0, PIECE, 0
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,[]":
            at += 1
        try:
            record, end = scan(buffer, at)
        except json.JSONDecodeError as error:
            more = text.read(size)
            if not more:
                if at < len(buffer):
                    raise ValueError(f"{path} is not JSON at character {passed + error.pos}: {error.msg}") from None
                text.detach()
                return
            passed, buffer, at = passed + at, buffer[at:] + more, 0
            size *= 2  # a record longer than what is read must not be scanned too often
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{path} is not a list of records: character {passed + at} begins no {{...}}")
        at, size = end, PIECE
        yield record


def _rows(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
    yield from csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ",")
    text.detach()


def _item(place: Place | None, missing: str, record: dict[str, Any], caption: str, group: str, done: int) -> Item:
    try:
        text = _caption(record, caption)
    except ValueError as error:
        return Item(None, "", record, group, done, str(error))
    return Item(place, text, record, group, done, missing)


def _caption(record: Mapping[str, Any], column: str) -> str:
    """What the picture is paired with in pre-training: of a conversation the first answer."""
    if column:
        if column not in record:
            raise ValueError(f"no column '{column}'")
        text = record[column]
    elif record.get("conversations") or record.get("messages"):
        text = next(turn["content"] for turn in turns_of(record) if turn["role"] == "assistant")
    else:
        names = (*CAPTIONS, "class")
        text = next((record[name] for name in names if isinstance(record.get(name), str)), "")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("neither a conversation nor a caption")
    return text.strip()


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of the classes by column, which the hub's files carry in their schema."""
    hub = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    features = hub.get("info", {}).get("features", {})
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]
