"""Checksums of published files: one list per directory, in the format of `sha256sum -c hive_scale.sha256`.

A directory with such a list was written by this package, and is verified when it is read. A directory without one
comes from elsewhere or from an older version, and is read unverified.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import NamedTuple

from hive_scale.atomic import write_text
from hive_scale.phase_timer import tick
from hive_scale.strangers import MB, read_bytes

SUMS = "hive_scale.sha256"
SEALED = ".safetensors"  # suffix of large files, which may hold a checksum of their own
REMEDY = f"get it again from where it came, or, if you changed it yourself, remove {SUMS}"
PIECE = 1 << 24  # bytes read at a time
LARGEST = 64 * MB  # bytes of such a list
_HEADER = "# hive_scale 1, {count} files. Check them with: sha256sum -c " + SUMS
_ENTRY = re.compile(r"# (?P<size>\d+) bytes\n(?P<digest>[0-9a-f]{64})  (?P<name>[^\n]+)\n")
_seen: dict[tuple[Path, bool], list[tuple[int, ...]]] = {}  # verified directories, with the stat of their files


class CorruptFile(ValueError):
    """A file on disk is not what was written; the message says which and how."""


class Entry(NamedTuple):
    """Size and digest recorded for a published file."""

    size: int  # bytes
    digest: str  # SHA-256, in hex


def write_sums(directory: Path) -> None:
    """List every file below `directory` in its `SUMS`. Call it before the directory is published. Raises OSError."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    _write(directory, {path.relative_to(directory).as_posix(): _entry_of(path) for path in files})


@contextmanager
def listing(path: Path) -> Iterator[None]:
    """Context in which `path` is rewritten by atomic rename; afterwards it is listed in its directory's `SUMS`.

    If the process dies inside, the file has no checksum rather than a wrong one. Raises CorruptFile, OSError.
    """
    directory = path.parent
    before = dict(read_sums(directory)) if is_listed(directory) else {}
    if before.pop(path.name, None):
        _write(directory, before)
    yield
    _write(directory, before | {path.name: _entry_of(path)})


def is_listed(directory: Path) -> bool:
    """Whether `directory` bears checksums of ours, be they damaged."""
    return os.path.lexists(directory / SUMS)


def read_sums(directory: Path) -> Mapping[str, Entry]:
    """The entries of a directory's list, by file name. Raises CorruptFile if the list itself is not intact."""
    try:
        header, _, rest = read_bytes(directory / SUMS, LARGEST).decode().partition("\n")
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{directory / SUMS} cannot be read: {error}") from None
    found = {match["name"]: Entry(int(match["size"]), match["digest"]) for match in _ENTRY.finditer(rest)}
    if rest != "".join(map(_line, found, found.values())) or header != _HEADER.format(count=len(found)):
        raise CorruptFile(f"{directory / SUMS} is not what was written")
    if outside := [name for name in found if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise CorruptFile(f"{directory / SUMS} names files outside its directory: {outside[0]!r}")
    return found


def faults(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Faults of a listed directory: files missing or changed. Only files for which `wanted` are read and hashed."""
    try:
        listed = read_sums(directory)
    except CorruptFile as error:
        return [str(error)]
    return [fault for name, entry in listed.items() if (fault := _fault(directory, name, entry, wanted(name)))]


def unexpected(directory: Path) -> list[str]:
    """Files beside the listed ones. Folders without a listed file are not looked at: they belong to others."""
    listed = read_sums(directory)
    folders = {directory, *((directory / name).parent for name in listed)}
    there = {
        path.relative_to(directory).as_posix() for folder in folders for path in folder.glob("*") if path.is_file()
    }
    return sorted(there - listed.keys() - {SUMS})


def check(directory: Path, weights: bool = True, remedy: str = REMEDY) -> None:
    """Verify a directory before it is read, if it has checksums. Raises CorruptFile, with the `remedy`.

    Without `weights`, the large weight files are checked for presence and size only. Each directory is hashed once
    per process, unless one of its files changes.
    """
    if not is_listed(directory):
        return
    key, now = (directory.resolve(), weights), _stats(directory)
    if now and _seen.get(key) == now:
        return
    if found := faults(directory, lambda name: weights or not name.endswith(SEALED)):
        raise CorruptFile(f"{directory}: {'; '.join(found)}: {remedy}")
    _seen[key] = now


def check_file(path: Path, remedy: str = REMEDY) -> None:
    """Verify one file as `check` does a directory. Raises CorruptFile."""
    if fault := _fault_of(path):
        raise CorruptFile(f"{path.parent}: {fault}: {remedy}")


def is_changed(path: Path) -> bool:
    """True if a listed file is not what was written. Raises CorruptFile if the list itself is corrupt."""
    return bool(_fault_of(path))


def _fault_of(path: Path) -> str:
    """The fault of one listed file; "" if it is intact or not listed."""
    entry = read_sums(path.parent).get(path.name) if is_listed(path.parent) else None
    return _fault(path.parent, path.name, entry, True) if entry else ""


def _fault(directory: Path, name: str, entry: Entry, read: bool) -> str:
    path = directory / name
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            return f"{name} is no file"
        if stat.st_size != entry.size:
            return f"{name} has {stat.st_size:,} bytes instead of {entry.size:,}"
        if read and _entry_of(path) != entry:
            return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return ""


def _entry_of(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(PIECE):
            digest.update(piece)
            tick()  # the other ranks may wait
        return Entry(os.fstat(file.fileno()).st_size, digest.hexdigest())


def _stats(directory: Path) -> list[tuple[int, ...]]:
    """Stat values of the list and its files, to detect changes; empty if one of them cannot be read."""
    try:
        found = [(directory / name).stat() for name in (SUMS, *read_sums(directory))]
    except (OSError, CorruptFile):
        return []
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _write(directory: Path, entries: Mapping[str, Entry]) -> None:
    lines = [_HEADER.format(count=len(entries)) + "\n", *map(_line, entries, entries.values())]
    write_text(directory / SUMS, "".join(lines))


def _line(name: str, entry: Entry) -> str:
    return f"# {entry.size} bytes\n{entry.digest}  {name}\n"
