"""Location of an encoded image (folder, zip, parquet) as a plain value from which a worker reads the bytes."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from hive_scale.data.images import LARGEST_FILE, check_length, read_image
from hive_scale.data.parquet import check_row_group, parquet_error
from hive_scale.prepare.items import check_file

LOCAL_HEADER = 30  # fixed bytes of a zip member's local header, before its name
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class Place(Protocol):
    """Location of an encoded image."""

    def read(self) -> bytes:
        """Return the image's bytes. Raises ValueError if it cannot be read."""


@dataclass(frozen=True)
class InFile:
    path: Path

    def read(self) -> bytes:
        return read_image(self.path)


@dataclass(frozen=True)
class InZip:
    """A member of a zip by offset, so that workers need not read the archive's directory, perhaps a million names."""

    archive: Path
    name: str
    offset: int
    size: int
    raw_size: int
    checksum: int
    method: int

    def read(self) -> bytes:
        if self.method not in METHODS:
            raise ValueError(f"{self.name} is packed in a way that is not supported: use stored or deflated members")
        if max(self.size, self.raw_size) > LARGEST_FILE:  # compressed zeros expand a thousandfold
            raise ValueError(f"{self.name} has {self.raw_size:,} bytes, more than the {LARGEST_FILE:,} of an image")
        with self.archive.open("rb") as file:
            if not 0 <= self.offset < self.offset + self.size + LOCAL_HEADER <= os.fstat(file.fileno()).st_size:
                raise ValueError(f"{self.name} is said to lie outside of {self.archive.name}, which is damaged")
            header = os.pread(file.fileno(), LOCAL_HEADER, self.offset)
            name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            data = os.pread(file.fileno(), self.size, self.offset + LOCAL_HEADER + name + extra)
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.raw_size)
            except zlib.error:
                data = b""
        if len(data) != self.raw_size or zlib.crc32(data) != self.checksum:
            raise ValueError(f"{self.name} is damaged in {self.archive.name}")
        return data


@dataclass(frozen=True)
class InParquet:
    """A cell of a parquet file: bytes, or the hub's {bytes, path}."""

    file: Path
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        try:
            cell = _column(self.file, self.column, self.group)[self.row].as_py()
        except Exception as error:  # pyarrow raises its own types for damaged files
            raise ValueError(f"the images of row group {self.group} of {parquet_error(self.file, error)}") from None
        if isinstance(cell, list) and len(cell) == 1:
            cell = cell[0]
        if isinstance(cell, list) and len(cell) > 1:
            raise ValueError(f"{len(cell)} images: only one is supported")
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes) or not data:
            raise ValueError("no image: text alone" if not cell else f"no bytes in column '{self.column}'")
        check_length(data)
        return data


@lru_cache(maxsize=1)  # consecutive rows of a shard share a row group
def _column(file: Path, column: str, group: int) -> Any:
    from pyarrow.parquet import ParquetFile

    opened = ParquetFile(file)
    check_row_group(opened, group, column)
    return opened.read_row_group(group, [column]).column(0)


class ImageSource:
    """Images in a folder or zip, looked up by the names in records.

    Raises ValueError if `root` is neither, and for a name that points outside of it, which only a malicious set would
    contain.
    """

    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise ValueError(f"{root} is not there: give the folder or the zip that holds the images")
        if root.is_file() and not zipfile.is_zipfile(root):
            check_file(root, "zip")
            raise ValueError(f"{root} is neither a folder nor a zip: unpack it, or fetch it again")
        self.root = root

    def find(self, name: str) -> Place | None:
        """Return the location of image `name`, or None if it does not exist.

        A name is relative to the root; an absolute one may lie inside of it.
        """
        own = f"{os.path.abspath(self.root)}/"
        name = name.removeprefix(own) if self.root.is_dir() else name
        inside(name, self.root)
        if self.root.is_dir():
            path = self.root / name
            return InFile(path) if os.path.isfile(path) else None  # os.path accepts names that no file can have
        info = self._members.get(name) or self._members.get(self._top + name)
        if info is None:
            return None
        sizes = info.compress_size, info.file_size
        return InZip(self.root, info.filename, info.header_offset, *sizes, info.CRC, info.compress_type)

    def missing(self, name: str) -> str:
        """Return the reason for which there is no image `name`, with the folder that would have it, if one is near."""
        above = os.path.abspath(self.root.parent)
        remedy = f"; give {above} as IMAGES" if os.path.isfile(os.path.join(above, name)) else ""
        return f"there is no {name} in {self.root}{remedy} (--image COLUMN)"

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.root) as archive:
                files = [info for info in archive.infolist() if not info.is_dir()]
                # macOS adds resource forks under this prefix
                members = {info.filename: info for info in files if not info.filename.startswith("__MACOSX/")}
        except Exception as error:  # zipfile raises any exception on a damaged directory
            raise ValueError(f"{self.root} is cut short or damaged ({error}): fetch it again") from None
        for name in members:
            inside(name, self.root)
        return members

    @cached_property
    def _top(self) -> str:
        """The single folder that holds all members, or "": people zip a folder as often as its contents."""
        tops = {name.partition("/")[0] + "/" if "/" in name else "" for name in self._members}
        return tops.pop() if len(tops) == 1 else ""


def inside(name: str, root: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"the image's name '{name}' leaves {root}: not reading this set; if you trust it, give a folder above all "
            "images as IMAGES"
        )
