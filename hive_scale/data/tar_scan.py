"""Scan one tar: list its samples from the headers, and digest all its bytes. Nothing is decoded.

The scan resumes after damage, at the next header with a valid checksum, and accounts for every byte: bytes that lead
to no sample are reported as a fault of the shard.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hive_scale import credentials
from hive_scale.data.images import FORMATS, LARGEST_FILE, upright_size
from hive_scale.data.shard_cache import ShardCache, digest_of, is_remote
from hive_scale.phase_timer import tick
from hive_scale.strangers import MB, printable
from hive_scale.strict_json import read

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION, RECORD = "txt", "json"
IMAGE_HEADER = 4096  # first bytes of an image, which usually hold its size
BLOCK = tarfile.BLOCKSIZE
MAGIC, MAGIC_AT = b"ustar", 257  # in the headers of every tar format since 1988
PIECE = 2**20  # bytes read at a time
LONGEST_END = 2**20 + 2 * BLOCK  # most zeros accepted behind the last member: tar pads its last record with them
LARGEST_HEADER = MB  # most bytes of headers before one member: its name and attributes
LARGEST_CAPTION = MB

Range = tuple[int, int]  # (start, length) in bytes
NO_FILE: Range = (-1, 0)  # a member without content of its own, such as a link


@dataclass(frozen=True)
class SampleError:
    """A part of a shard that is not a usable sample. An empty key stands for the shard as a whole."""

    shard: str
    key: str
    reason: str

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.shard, self.key, self.reason)):
            raise TypeError("a fault is told in words")

    def describe(self) -> str:
        return printable(f"{self.shard}: {self.key + ': ' if self.key else ''}{self.reason}")


@dataclass(frozen=True)
class Stamp:
    """Identity of a shard: size in bytes, modification time in ns, and the xxh3-128 of its bytes.

    Size and time decide whether it must be scanned again; the digest alone decides whether its content differs. A
    remote shard has time 0.
    """

    size: int
    changed: int
    digest: str

    def fits(self, found: os.stat_result) -> bool:
        """True if the size and time of a local shard are those at the time of its scan."""
        return (self.size, self.changed) == (found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class ShardTable:
    """The n usable samples of one shard, in its order; shapes as in `index.Index`."""

    stamp: Stamp
    keys: list[str]
    members: NDArray[np.int64]
    image_sizes: NDArray[np.int32]
    caption_bytes: NDArray[np.int32]
    faults: list[SampleError]

    def __len__(self) -> int:
        return len(self.keys)


def scan_shard(shard: str, cache: ShardCache) -> ShardTable:
    """List every sample of the tar `shard`. If it is truncated or damaged, list those before and behind the damage.

    All bytes are read once, for the digest; the walk over the headers then reads from the page cache.

    A sample is a run of members that share a key (the path up to the first dot of the file name): an image (jpg, png,
    webp), a caption (txt) and optionally a record (json), in any order.
    """
    faults: list[SampleError] = []
    gaps: list[Range] = []
    rows: list[tuple[str, list[Range], Range, int]] = []
    seen: set[str] = set()
    with os.fdopen(cache.open(shard), "rb") as file:
        found = os.fstat(file.fileno())  # taken before reading, so that a change meanwhile shows in the time
        changed = 0 if is_remote(shard) else found.st_mtime_ns
        stamp = Stamp(found.st_size, changed, digest_of(file.fileno()))
        for key, members in grouped(tar_files(file, gaps)):
            tick()
            try:
                if key in seen:
                    raise ValueError("duplicate key: the first one is used")
                seen.add(key)
                rows.append((key, *_examine(file.fileno(), members)))
            except ValueError as error:
                faults.append(SampleError(shard, key, str(error)))
        reasons = [damage(file, gaps), missing_samples(shard, len(seen))]
    if reason := "; ".join(filter(None, reasons)):
        faults.append(SampleError(shard, "", reason))
    return ShardTable(
        stamp=stamp,
        keys=[row[0] for row in rows],
        members=np.array([row[1] for row in rows], np.int64).reshape(-1, 3, 2),
        image_sizes=np.array([row[2] for row in rows], np.int32).reshape(-1, 2),
        caption_bytes=np.array([row[3] for row in rows], np.int32),
        faults=faults,
    )


def grouped(files: Iterator[tuple[str, Range]]) -> Iterator[tuple[str, dict[str, Range]]]:
    """Yield runs of members that share a key, as {extension: byte range}."""
    current, members = "", dict[str, Range]()
    for name, where in files:
        directory, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue  # no extension, or a hidden file: ignored, as webdataset does
        key, extension = directory + slash + stem, extension.lower()
        if members and (key != current or extension in members):
            yield current, members
            members = {}
        current = key
        members[extension] = where
    if members:
        yield current, members


def tar_files(file: IO[bytes], gaps: list[Range]) -> Iterator[tuple[str, Range]]:
    """Yield (name, byte range) of each member; a directory's name is empty. Add bytes of no member to `gaps`.

    The last gap extends to the end of the file. In a sound tar it is the only one and holds only zeros.
    """
    total = os.fstat(file.fileno()).st_size
    understood = at = 0  # end of the last member, and start of the search for the next header
    while (start := _next_header(file, at, total)) is not None:
        at = start + BLOCK
        for name, where, end in _run(file, start, total):
            if start > understood:
                gaps.append((understood, start - understood))
            start = understood = at = end
            yield name, where
    gaps.append((understood, total - understood))


def _run(file: IO[bytes], start: int, total: int) -> Iterator[tuple[str, Range, int]]:
    """Yield (name, byte range, end) of members, from the header at `start` up to the first that is not sound."""
    file.seek(start)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:", encoding="utf-8") as tar:
            for member in tar:
                vars(tar)["members"] = []  # drop the list of headers that tarfile keeps, which would only grow
                is_file = member.isreg() and not member.issparse()
                if not start < tar.offset or (is_file and not 0 <= member.size <= total - member.offset_data):
                    return
                start = tar.offset
                headers.left = LARGEST_HEADER
                # names are printed and written to files: escape invalid UTF-8 and terminal control characters
                name = printable(member.name.encode(errors="surrogateescape").decode(errors="backslashreplace"))
                yield "" if member.isdir() else name, (member.offset_data, member.size) if is_file else NO_FILE, start
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError):
        return  # tarfile trusts the values of extended headers, and fails in many ways


class _Headers:
    """File object for tarfile that limits the bytes read per header, which a tar can declare of any size.

    Only headers pass through it, since members are never read with tarfile.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.left = LARGEST_HEADER
        self.tell, self.seek = file.tell, file.seek
        self._read = file.read

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"a header of more than {LARGEST_HEADER} bytes")
        return self._read(size)


def _next_header(file: IO[bytes], at: int, total: int) -> int | None:
    """Return the offset of the first sound header at or behind byte `at`, or None.

    Checks every block, and every place with a header's magic: after lost or inserted bytes, headers are no longer
    aligned to blocks, and the oldest tars have no magic.
    """
    if at + BLOCK > total:
        return None
    first = magic = at
    with mmap.mmap(file.fileno(), total, access=mmap.ACCESS_READ) as content:
        while at <= total - BLOCK:
            try:
                tarfile.TarInfo.frombuf(content[at : at + BLOCK], "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError):
                if magic <= at:
                    found = content.find(MAGIC, at + 1 + MAGIC_AT)
                    magic = total if found < 0 else found - MAGIC_AT
                at = min(magic, at + BLOCK - (at - first) % BLOCK)
            else:
                return at
    return None


def damage(file: IO[bytes], gaps: list[Range]) -> str:
    """Describe the bytes in `gaps`, which belong to no member; empty if they are only the tar's end mark."""
    *between, (end, rest) = gaps
    if not between and not end:
        return "no member is in it: it is empty, compressed (unpack it then), or no tar"
    holes = [gap for gap in between if _is_zero(file, gap)]  # perhaps the end mark of a tar with another appended
    lost = [gap for gap in gaps if gap not in holes and not _is_zero(file, gap)]
    wrong = [
        _told(lost, "bytes that belong to no member"),
        _told(holes, "zeros between members (a hole, or several tars end to end)"),
        f"no end mark at byte {end + rest:,}" if rest < BLOCK and gaps[-1] not in lost else "",
        # left by an interrupted download that preallocated its file
        _told([gaps[-1]], "zeros at the end") if rest > LONGEST_END and gaps[-1] not in lost else "",
    ]
    if not any(wrong):
        return ""
    return f"the tar is cut short or damaged: {', '.join(filter(None, wrong))}; samples before and behind are used"


def _told(gaps: list[Range], what: str) -> str:
    size = sum(length for _, length in gaps)
    return f"{size:,} {what}, the first at byte {gaps[0][0]:,}" if gaps else ""


def _is_zero(file: IO[bytes], gap: Range) -> bool:
    start, end = gap[0], sum(gap)
    return not any(os.pread(file.fileno(), min(PIECE, end - at), at).strip(b"\0") for at in range(start, end, PIECE))


def missing_samples(shard: str, found: int) -> str:
    """Describe how many samples of img2dataset's ``_stats.json`` a tar or folder lacks; empty without such a file."""
    if is_remote(shard):
        return ""
    try:
        told = read(Path(f"{credentials.place(shard).removesuffix('.tar')}_stats.json"))
        promised = int(told["successes"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return ""
    return f"{found:,} samples, where its _stats.json counts {promised:,}" if found < promised else ""


def _examine(descriptor: int, members: dict[str, Range]) -> tuple[list[Range], Range, int]:
    """Return (byte ranges of image, caption and record; image size; caption bytes). Raises ValueError."""
    image = next((members[extension] for extension in IMAGES if extension in members), None)
    if links := [extension for extension, where in members.items() if where == NO_FILE]:
        raise ValueError(f"its .{links[0]} is a link or another special file: make the tar with the files themselves")
    found = "only " + " and ".join(f".{extension}" for extension in members)
    if image is None:
        raise ValueError(f"no image (.jpg, .png or .webp) beside its caption: {found}")
    if CAPTION not in members:
        raise ValueError(f"no caption (.txt) beside its image: {found}; prepare_data.py pairs reads other captions")
    start, length = members[CAPTION]
    if length > LARGEST_CAPTION:
        raise ValueError(f"the caption has {length:,} bytes, more than {LARGEST_CAPTION:,}")
    if image[1] > LARGEST_FILE:
        raise ValueError(f"the image has {image[1]:,} bytes, more than {LARGEST_FILE:,}")
    try:
        caption = os.pread(descriptor, length, start).decode().strip()
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8") from None
    if not caption:
        raise ValueError("the caption is empty")
    size = _image_size(descriptor, *image)
    return [image, members[CAPTION], members.get(RECORD, (0, 0))], size, len(caption.encode())


def _image_size(descriptor: int, start: int, length: int) -> Range:
    """(width, height) of the upright image. Reads the first bytes, and all if long metadata precedes the size."""
    for piece in (min(IMAGE_HEADER, length), length):
        try:
            with Image.open(BytesIO(os.pread(descriptor, piece, start)), formats=FORMATS) as image:
                return upright_size(image)
        except Exception as error:  # PIL's decoders raise any exception on broken input
            reason = f"the image cannot be opened ({type(error).__name__})"
    raise ValueError(reason)
