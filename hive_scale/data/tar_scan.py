"""One tar's samples, by its headers, and the digest of all its bytes: nothing is decoded.

The walk goes on behind damage, at the next header whose checksum is right, and accounts for every byte: what leads to
no sample is a fault of the shard.
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
IMAGE_HEADER = 4096  # bytes in which an image usually tells its size
BLOCK = tarfile.BLOCKSIZE
MAGIC, MAGIC_AT = b"ustar", 257  # in a header, of every format since 1988
PIECE = 2**20  # bytes that are looked through at a time
LONGEST_END = 2**20 + 2 * BLOCK  # zeros behind the last member that a tar may have: its records are padded with them
LARGEST_HEADER = MB  # bytes that may come before a member: its name and attributes
LARGEST_CAPTION = MB

Range = tuple[int, int]  # (start, length) in bytes
NO_FILE: Range = (-1, 0)  # of a member without content of its own, such as a link


@dataclass(frozen=True)
class SampleError:
    """Something in a shard that is no usable sample. An empty key means the shard itself."""

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
    """By which a shard is known: size in bytes, time of its last change in ns, and the xxh3-128 of its bytes.

    Size and time tell whether it must be read again, the digest alone whether it is another. A remote shard has no time
    of its own.
    """

    size: int
    changed: int
    digest: str

    def fits(self, found: os.stat_result) -> bool:
        """Whether a local shard looks as it did when it was read."""
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
    """Every sample of the tar `shard`; of one that is cut short or damaged, those before and behind the damage.

    All its bytes are read once, for their digest; what is looked at behind that comes from memory.

    A sample is a run of members with one key (the path up to the first dot of the file name): an image
    (jpg, png, webp), a caption (txt) and perhaps a record (json), in any order.
    """
    faults: list[SampleError] = []
    gaps: list[Range] = []
    rows: list[tuple[str, list[Range], Range, int]] = []
    seen: set[str] = set()
    with os.fdopen(cache.open(shard), "rb") as file:
        found = os.fstat(file.fileno())  # before it is read: what changes it meanwhile is seen by the time
        changed = 0 if is_remote(shard) else found.st_mtime_ns
        stamp = Stamp(found.st_size, changed, digest_of(file.fileno()))
        for key, members in _groups(_files(file, gaps)):
            tick()
            try:
                if key in seen:
                    raise ValueError("duplicate key: the first one is used")
                seen.add(key)
                rows.append((key, *_examine(file.fileno(), members)))
            except ValueError as error:
                faults.append(SampleError(shard, key, str(error)))
        reasons = [_damage(file, gaps), _missing(shard, len(seen))]
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


def _groups(files: Iterator[tuple[str, Range]]) -> Iterator[tuple[str, dict[str, Range]]]:
    """Runs of members that share a key, as {extension: byte range}."""
    current, members = "", dict[str, Range]()
    for name, where in files:
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


def _files(file: IO[bytes], gaps: list[Range]) -> Iterator[tuple[str, Range]]:
    """(name, byte range) of each member, directories without a name; bytes that belong to none are added to `gaps`.

    The last gap reaches to the end of the file: zeros alone, where all is well.
    """
    total = os.fstat(file.fileno()).st_size
    understood = at = 0  # where the last member ended, and where the next header is looked for
    while (start := _next_header(file, at, total)) is not None:
        at = start + BLOCK
        for name, where, end in _run(file, start, total):
            if start > understood:
                gaps.append((understood, start - understood))
            start = understood = at = end
            yield name, where
    gaps.append((understood, total - understood))


def _run(file: IO[bytes], start: int, total: int) -> Iterator[tuple[str, Range, int]]:
    """(name, byte range, end) of members from the header at `start` on, up to the first that is not sound."""
    file.seek(start)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:", encoding="utf-8") as tar:
            for member in tar:
                vars(tar)["members"] = []  # tarfile keeps every header it has met, for searches that never come
                is_file = member.isreg() and not member.issparse()
                if not start < tar.offset or (is_file and not 0 <= member.size <= total - member.offset_data):
                    return
                start = tar.offset
                headers.left = LARGEST_HEADER
                # bytes that are no UTF-8, and what would steer a terminal, are spelled out: names are printed, and
                # written to files
                name = printable(member.name.encode(errors="surrogateescape").decode(errors="backslashreplace"))
                yield "" if member.isdir() else name, (member.offset_data, member.size) if is_file else NO_FILE, start
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError):
        return  # tarfile believes much of what an extended header says


class _Headers:
    """What tarfile reads of a tar whose members nobody asks it for: headers, which it would take of any size."""

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
    """Where the first sound header at or behind byte `at` begins.

    Looked for in every block, and at every place with a header's magic: in a file that has lost or gained some bytes
    no block is where it was, and the oldest tars have no magic.
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


def _damage(file: IO[bytes], gaps: list[Range]) -> str:
    """What is wrong with a tar whose bytes in `gaps` belong to no member; nothing if that is its end mark alone."""
    *between, (end, rest) = gaps
    if not between and not end:
        return "no member is in it: it is empty, compressed (unpack it then), or no tar"
    holes = [gap for gap in between if _is_zero(file, gap)]  # may be the end mark of a tar before another
    lost = [gap for gap in gaps if gap not in holes and not _is_zero(file, gap)]
    wrong = [
        _told(lost, "bytes that belong to no member"),
        _told(holes, "zeros between members (a hole, or several tars end to end)"),
        f"no end mark at byte {end + rest:,}" if rest < BLOCK and gaps[-1] not in lost else "",
        # as a download that has taken its room beforehand leaves them
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


def _missing(shard: str, found: int) -> str:
    """What img2dataset's statistics beside the tar count and the tar does not hold; nothing where there are none."""
    if is_remote(shard):
        return ""
    try:
        told = read(Path(f"{credentials.place(shard).removesuffix('.tar')}_stats.json"))
        promised = int(told["successes"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return ""
    return f"{found:,} samples, where its _stats.json counts {promised:,}" if found < promised else ""


def _examine(descriptor: int, members: dict[str, Range]) -> tuple[list[Range], Range, int]:
    """(byte ranges of image, caption and record; image size; caption length). Raises ValueError."""
    image = next((members[extension] for extension in IMAGES if extension in members), None)
    if links := [extension for extension, where in members.items() if where == NO_FILE]:
        raise ValueError(f"its .{links[0]} is a link or another special file: make the tar with the files themselves")
    found = "only " + " and ".join(f".{extension}" for extension in members)
    if image is None:
        raise ValueError(f"no image (.jpg, .png or .webp) beside its caption: {found}")
    if CAPTION not in members:
        raise ValueError(f"no caption (.txt) beside its image: {found}")
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
    """(width, height) of the upright image, from its first bytes if they tell: long metadata may come before."""
    for piece in (min(IMAGE_HEADER, length), length):
        try:
            with Image.open(BytesIO(os.pread(descriptor, piece, start)), formats=FORMATS) as image:
                return upright_size(image)
        except Exception as error:  # PIL's decoders raise what they like on broken input
            reason = f"the image cannot be opened ({type(error).__name__})"
    raise ValueError(reason)
