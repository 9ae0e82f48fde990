"""A sample on its way from a source to a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hive_scale.prepare.image_sources import Place


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
    notes: tuple[str, ...] = ()  # what was recognised in the files, and the options that choose otherwise


def file_identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]
