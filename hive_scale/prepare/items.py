"""A sample on its way from a source to a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hive_scale.prepare.image_sources import Place


LFS_POINTER = b"version https://git-lfs"
IMAGE = "an image: give the file that names the images, or their folder"
KINDS = (  # first bytes, the kind, what a user is told who gives such a file where another kind is wanted
    (b"PAR1", "parquet", "parquet: use prepare_data.py parquet"),
    (LFS_POINTER, "pointer", "only git-lfs's pointer to the file: git lfs pull, or fetch it again"),
    (b"\x1f\x8b", "gzip", "compressed: unpack it with gunzip"),
    (b"PK\x03\x04", "zip", "a zip or an Excel file: unpack it, or save it as CSV"),
    (b"\xff\xd8\xff", "JPEG", IMAGE),
    (b"\x89PNG", "PNG", IMAGE),
)


@dataclass(frozen=True)
class Item:
    """One sample before its image is read. If `place` is None it cannot be used, for `reason`."""

    place: Place | None
    caption: str
    record: Mapping[str, Any]
    group: str  # items of one group, such as all about one image, stay on one side of the split
    done: int  # position in the source, in the unit of Source.length
    reason: str = ""
    where: str = ""  # the file and the row, record or key, as messages name it
    further: int = 0  # captions of the image besides `caption`: they are in the record


@dataclass(frozen=True)
class Unreadable:
    """A row or record that cannot be read, with the reason."""

    reason: str


Record = dict[str, Any] | Unreadable
Located = tuple[str, Record]  # the file and row, as messages name them, and what is there


@dataclass(frozen=True)
class Source:
    """Stream of items. `length` is the final value of `Item.done`; `identity` distinguishes sources."""

    items: Callable[[], Iterator[Item]]
    length: int
    identity: dict[str, Any] = field(default_factory=dict)
    name: str = "the source"  # as messages call it
    notes: tuple[str, ...] = ()  # what was recognised in the files, and the options that choose otherwise


def file_identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def check_file(path: Path, wanted: str) -> None:
    """Raise ValueError, with the remedy, if `path` is a file of another kind than `wanted`, by its first bytes.

    `wanted` is text, or the kind that may be given.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(512)
    for magic, kind, told in KINDS:
        if start.startswith(magic) and kind != wanted:
            raise ValueError(f"{path} is {told}")
    if start[257:262] == b"ustar" and wanted != "tar":
        raise ValueError(f"{path} is a tar: use prepare_data.py pairs {path}")
