"""One tar's samples, from its headers alone: nothing is decoded."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hive_scale.data.cache import ShardCache

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTION, RECORD = "txt", "json"
FORMATS = ("JPEG", "PNG", "WEBP")  # what is opened; rarer formats have rarer, less tested decoders
PICTURE_HEADER = 4096  # bytes in which a picture usually tells its size

Range = tuple[int, int]  # (start, length) in bytes


@dataclass(frozen=True)
class Fault:
    """Something in a shard that is no usable sample. An empty key means the shard itself."""

    shard: str
    key: str
    reason: str

    def describe(self) -> str:
        return f"{self.shard}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass(frozen=True)
class ShardTable:
    """The n usable samples of one shard, in its order; shapes as in `index.Index`."""

    keys: list[str]
    members: NDArray[np.int64]
    picture_sizes: NDArray[np.int32]
    caption_bytes: NDArray[np.int32]
    faults: list[Fault]

    def __len__(self) -> int:
        return len(self.keys)


def scan_shard(shard: str, cache: ShardCache) -> ShardTable:
    """Every sample of the tar `shard`; a tar that is cut short gives those before the cut.

    A sample is a run of members with one key (the path up to the first dot of the file name): a picture
    (jpg, png, webp), a caption (txt) and perhaps a record (json), in any order.
    """
    faults: list[Fault] = []
    rows: list[tuple[str, list[Range], Range, int]] = []
    seen: set[str] = set()
    with os.fdopen(cache.open(shard), "rb") as file:
        for key, members in _groups(file, shard, faults):
            try:
                if key in seen:
                    raise ValueError("duplicate key: the first one is used")
                seen.add(key)
                rows.append((key, *_examine(file.fileno(), members)))
            except ValueError as error:
                faults.append(Fault(shard, key, str(error)))
    return ShardTable(
        keys=[row[0] for row in rows],
        members=np.array([row[1] for row in rows], np.int64).reshape(-1, 3, 2),
        picture_sizes=np.array([row[2] for row in rows], np.int32).reshape(-1, 2),
        caption_bytes=np.array([row[3] for row in rows], np.int32),
        faults=faults,
    )


def _groups(file: IO[bytes], shard: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Range]]]:
    """Runs of members that share a key, as {extension: byte range}."""
    current, members = "", dict[str, Range]()
    for name, where in _files(file, shard, faults):
        directory, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue  # a note or a hidden file, as webdataset sees it too
        key, extension = directory + slash + stem, extension.lower()
        if members and (key != current or extension in members):
            yield current, members
            members = {}
        current = key
        members[extension] = where
    if members:
        yield current, members


def _files(file: IO[bytes], shard: str, faults: list[Fault]) -> Iterator[tuple[str, Range]]:
    total = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                vars(tar)["members"] = []  # tarfile keeps every header it has met, for searches that never come
                if member.offset_data + member.size > total:
                    raise EOFError(f"{member.name} should end at byte {member.offset_data + member.size} of {total}")
                if member.isreg() and not member.issparse():
                    yield member.name, (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        faults.append(Fault(shard, "", f"the tar is cut short or damaged ({error}): the samples before are used"))


def _examine(descriptor: int, members: dict[str, Range]) -> tuple[list[Range], Range, int]:
    """(byte ranges of picture, caption and record; picture size; caption length). Raises ValueError."""
    picture = next((members[extension] for extension in PICTURES if extension in members), None)
    found = "only " + " and ".join(f".{extension}" for extension in members)
    if picture is None:
        raise ValueError(f"no picture (.jpg, .png or .webp) beside its caption: {found}")
    if CAPTION not in members:
        raise ValueError(f"no caption (.txt) beside its picture: {found}")
    start, length = members[CAPTION]
    try:
        caption = os.pread(descriptor, length, start).decode().strip()
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8") from None
    if not caption:
        raise ValueError("the caption is empty")
    size = _picture_size(descriptor, *picture)
    return [picture, members[CAPTION], members.get(RECORD, (0, 0))], size, len(caption.encode())


def _picture_size(descriptor: int, start: int, length: int) -> Range:
    """(width, height), from the first bytes if they tell; long metadata may stand before the size."""
    for piece in (min(PICTURE_HEADER, length), length):
        try:
            with Image.open(BytesIO(os.pread(descriptor, piece, start)), formats=FORMATS) as picture:
                return picture.size
        except Exception as error:  # PIL's decoders raise what they like on broken input
            reason = f"the picture cannot be opened ({type(error).__name__})"
    raise ValueError(reason)
