"""Index of a set of tar shards: built by one scan over their headers, kept in one file.

The index holds each sample's key, the byte ranges of its image, caption and record, the image's size and the caption's
length. Any sample can thus be read by one seek, batches can be balanced before anything is read, and unusable samples
are listed as faults before a run meets them. The index also holds a digest of each shard, which identifies the data
that a run began with.
"""

from __future__ import annotations

import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hive_scale import credentials
from hive_scale.data.shard_cache import ShardCache, is_remote
from hive_scale.data.shards import SAMPLE_DIR
from hive_scale.data.tar_scan import SampleError, ShardTable, Stamp, scan_shard
from hive_scale.shared_files import cache_dir, locked, own_lock, replacing
from hive_scale.strict_json import loads

VERSION = 5  # raised when the scan's result or the file's layout changes
LONG_WORK = 256 * 2**20  # bytes of tars above which the scan uses several processes and shows a progress bar

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Index:
    """A set of N samples. The arrays are memory-mapped from the file, and shared between processes."""

    path: Path  # of the index file
    shards: tuple[str, ...]
    faults: tuple[SampleError, ...]  # parts of the tars that are not usable samples, with the reason
    stamps: tuple[Stamp, ...]  # size, time and digest of each shard
    layout: str  # digest of the arrays; older versions identified a set by it alone
    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.caption_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the samples, independent of their location: a resumed run detects that its data set changed."""
        return xxhash.xxh3_128_hexdigest(" ".join([self.layout, *(stamp.digest for stamp in self.stamps)]).encode())

    @property
    def shard_sizes(self) -> Ints:
        """Number of samples in each shard: int64 (num_shards,)."""
        return self.arrays["shard_sizes"]

    @property
    def caption_bytes(self) -> NDArray[np.int32]:
        """Length of each caption in UTF-8 bytes: int32 (N,)."""
        return self.arrays["caption_bytes"]

    @property
    def image_sizes(self) -> NDArray[np.int32]:
        """(width, height) in pixels of each image when upright: int32 (N, 2)."""
        return self.arrays["picture_sizes"]

    @property
    def members(self) -> Ints:
        """(start, length) in bytes of image, caption and record within their shard: int64 (N, 3, 2)."""
        return self.arrays["members"]

    @cached_property
    def _shard_ends(self) -> list[int]:
        return list(accumulate(self.shard_sizes.tolist()))

    def shard_of(self, sample: int) -> int:
        """Return the number of the shard that contains sample number `sample`."""
        return bisect_right(self._shard_ends, sample)

    def shard(self, sample: int) -> str:
        """Return the path or URL of the shard that contains sample number `sample`."""
        return self.shards[self.shard_of(sample)]

    def key(self, sample: int) -> str:
        """Return the key of sample number `sample`: its name in the shard."""
        start = int(self.arrays["key_ends"][sample - 1]) if sample else 0
        return self.arrays["keys"][start : int(self.arrays["key_ends"][sample])].tobytes().decode()

    @cached_property
    def key_hashes(self) -> NDArray[np.uint64]:
        """A hash of each sample's key, evenly spread over 64 bits: uint64 (N,). It depends on nothing but the key."""
        keys, ends = self.arrays["keys"].tobytes(), self.arrays["key_ends"].tolist()
        spans = zip([0, *ends], ends, strict=False)
        hashes = (xxhash.xxh3_64_intdigest(keys[start:end]) for start, end in spans)
        return np.fromiter(hashes, np.uint64, len(ends))

    def __reduce__(self) -> tuple[Any, ...]:
        # a process that is not forked reopens the file, instead of receiving the arrays
        return _load, (self.path, self.shards)


def open_index(shards: Sequence[str], cache: ShardCache) -> Index:
    """Load the index of `shards`. Scan shards that are not indexed yet, or whose size or time has changed since.

    The file lies beside the first shard, or in the user's cache directory if that folder cannot be written. An index
    beside the shards serves everybody who can read them. If several processes of this user request the same index, one
    scans and the others wait. Raises ValueError if no sample is usable, or if the index cannot be stored anywhere.
    """
    places = _places(shards)
    index = _find(places, shards)
    if index is None or not _is_fresh(index):
        with _turn(places):
            index = _find(places, shards)
            if index is None or not _is_fresh(index):
                index = _keep(places, shards, _scan(shards, index, cache))
    if not len(index):
        reason = f": {index.faults[0].describe()}" if index.faults else ""
        raise ValueError(f"no usable sample in {shards[0]} and {len(shards) - 1} more shards{reason}")
    return index


def _places(shards: Sequence[str]) -> list[Path]:
    """Candidate paths of the index, in order of preference."""
    places = [credentials.identity(shard) for shard in shards]
    if is_remote(places[0]):
        names, beside = places, None
    else:
        beside = Path(places[0]).resolve().parent
        # relative names, so that a set keeps its index when it is moved
        names = [one if is_remote(one) else os.path.relpath(os.path.abspath(one), beside) for one in places]
    name = f"{Path(shards[0]).stem}-{_short(json.dumps(names, allow_nan=False))}.index"
    own = cache_dir() / "indices" / f"{_short(str(beside or ''))}-{name}"
    return [own] if beside in (None, SAMPLE_DIR) else [beside / name, own]


def _find(places: Sequence[Path], shards: Sequence[str]) -> Index | None:
    """Return the first fresh index among the intact ones of this version; failing that, the first intact one."""
    found = [index for index in (_load_sound(path, shards) for path in places) if index]
    return next(filter(_is_fresh, found), found[0] if found else None)


@contextmanager
def _turn(places: Sequence[Path]) -> Iterator[None]:
    """Wait for other processes of this user that scan the same set. Without lock support, both scan."""
    with ExitStack() as stack:
        for path in places:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(own_lock(path)))
                break
        yield


def _is_fresh(index: Index) -> bool:
    return all(map(_looks_the_same, index.shards, index.stamps))


def _looks_the_same(shard: str, stamp: Stamp) -> bool:
    return is_remote(shard) or stamp.fits(os.stat(credentials.place(shard)))


def _scan(shards: Sequence[str], old: Index | None, cache: ShardCache) -> list[ShardTable]:
    """Return the tables of `shards`; unchanged shards are copied from the `old` index instead of scanned."""
    stamps = old.stamps if old else ()
    tables = {i: _table(old, i) for i, stamp in enumerate(stamps) if old and _looks_the_same(shards[i], stamp)}
    left = [i for i in range(len(shards)) if i not in tables]
    scan, to_do = partial(scan_shard, cache=cache), [shards[i] for i in left]
    if not any(map(is_remote, to_do)) and sum(map(os.path.getsize, map(credentials.place, to_do))) < LONG_WORK:
        tables |= zip(left, map(scan, to_do), strict=True)
    else:
        # fork, so that a script without a __main__ guard can open a set
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            scanned = track(pool.map(scan, to_do), f"indexing {len(to_do)} shards", total=len(to_do))
            tables |= zip(left, scanned, strict=True)
    return [tables[i] for i in range(len(shards))]


def _table(index: Index, i: int) -> ShardTable:
    """Rebuild the scan result of shard number i from `index`."""
    end = int(index.shard_sizes[: i + 1].sum())
    rows = range(end - int(index.shard_sizes[i]), end)
    return ShardTable(
        stamp=index.stamps[i],
        keys=[index.key(row) for row in rows],
        members=index.members[rows.start : end],
        image_sizes=index.image_sizes[rows.start : end],
        caption_bytes=index.caption_bytes[rows.start : end],
        faults=[fault for fault in index.faults if fault.shard == index.shards[i]],
    )


def _short(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _keep(places: Sequence[Path], shards: Sequence[str], tables: Sequence[ShardTable]) -> Index:
    """Write the index to the first of `places` that can be written."""
    reason = ""
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, tables)
        except (OSError, SafetensorError) as error:  # another user's folder, or a full disk
            reason = str(error)
        else:
            return _load(path, tuple(shards))
    raise ValueError(f"no place for the index of {shards[0]} ({reason}): set XDG_CACHE_HOME to a folder of yours")


def _write(path: Path, tables: Sequence[ShardTable]) -> None:
    """Write one safetensors file, with the shards' stamps, the faults and a checksum in its header."""
    arrays = {
        "shard_sizes": np.array([len(table) for table in tables], np.int64),
        "members": np.concatenate([table.members for table in tables]),
        "picture_sizes": np.concatenate([table.image_sizes for table in tables]),
        "caption_bytes": np.concatenate([table.caption_bytes for table in tables]),
        "keys": np.frombuffer(b"".join(key.encode() for table in tables for key in table.keys), np.uint8),
        "key_ends": np.cumsum([len(key.encode()) for table in tables for key in table.keys], dtype=np.int64),
    }
    metadata = {
        "version": VERSION,
        "stamps": [astuple(table.stamp) for table in tables],
        # shards by number instead of path, since a set may be moved
        "faults": [(i, fault.key, fault.reason) for i, table in enumerate(tables) for fault in table.faults],
        "checksum": _checksum(arrays),
    }
    metadata["seal"] = _seal(metadata)
    with replacing(path) as part:
        save_file(arrays, part, {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()})


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _seal(metadata: Mapping[str, Any]) -> str:
    fields = [metadata[name] for name in ("version", "stamps", "faults", "checksum")]
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, allow_nan=False).encode())


def _load_sound(path: Path, shards: Sequence[str]) -> Index | None:
    """Load the index at `path` if it exists, is intact and of this version; else None."""
    try:
        if path.is_file() and _header(path)[0].get("version") == VERSION:
            return _load(path, tuple(shards))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError):
        pass  # another format, damaged or unreadable: the caller scans again
    return None


def _load(path: Path, shards: tuple[str, ...]) -> Index:
    metadata, tensors, start = _header(path)
    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    dtypes = {"I64": np.int64, "I32": np.int32, "U8": np.uint8}
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in tensors.items():
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if start + end > len(buffer):
            raise ValueError(f"index {path} is cut short: delete it")
        flat = np.frombuffer(memoryview(buffer)[start:][begin:end], dtypes[entry["dtype"]])
        arrays[name] = flat.reshape(shape)
    if _checksum(arrays) != metadata["checksum"] or _seal(metadata) != metadata["seal"]:
        raise ValueError(f"index {path} is damaged: delete it")
    if not _is_consistent(arrays, metadata["stamps"]):
        raise ValueError(f"index {path} is damaged: delete it")
    stamps = tuple(Stamp(*stamp) for stamp in metadata["stamps"])
    if not len(stamps) == len(shards) == len(arrays["shard_sizes"]):
        raise ValueError(f"index {path} is of other shards: delete it")
    faults = tuple(SampleError(shards[i], key, reason) for i, key, reason in metadata["faults"])
    return Index(path, shards, faults, stamps, metadata["checksum"], arrays)


def _is_consistent(arrays: dict[str, NDArray[Any]], stamps: Sequence[Sequence[int]]) -> bool:
    """True if `arrays` describe samples that lie inside shards with these `stamps`.

    The checksum detects damage only: anyone with write access to the folder can compute a valid one.
    """
    sizes, members, ends = arrays["shard_sizes"], arrays["members"], arrays["key_ends"]
    count, bounds = len(arrays["caption_bytes"]), np.array([size or 2**62 for size, *_ in stamps])  # size 0: unknown
    shapes = {"shard_sizes": (len(stamps),), "members": (count, 3, 2), "picture_sizes": (count, 2)}
    shapes |= {"caption_bytes": (count,), "key_ends": (count,), "keys": (int(ends[-1]) if len(ends) else 0,)}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        return False
    if (sizes < 0).any() or sum(sizes.tolist()) != count or (np.diff(ends, prepend=0) < 0).any():
        return False
    room = np.repeat(bounds, sizes)[:, None] - members[..., 0]  # bytes from each member's start to the shard's end
    inside = (members >= 0).all() and (members[..., 1] <= room).all()
    return bool(inside and (arrays["picture_sizes"] > 0).all() and (arrays["caption_bytes"] > 0).all())


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return (our metadata, safetensors' table of arrays, byte offset of the arrays)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:  # otherwise a damaged length could request any amount of memory
            raise ValueError(f"index {path} is cut short: delete it")
        table = loads(file.read(length))
    metadata = {key: loads(value) for key, value in table.pop("__metadata__").items()}
    return metadata, table, 8 + length
