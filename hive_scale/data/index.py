"""What is in a set of tars, found in one walk over their headers and kept in one file.

The index holds each sample's key, the byte range of its picture, caption and record, the picture's size and the
caption's length. So any sample is one seek away, batches can be balanced before anything is read, and samples
that could never be used are listed as faults instead of met in the middle of a run.
"""

from __future__ import annotations

import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.progress import track
from safetensors.numpy import save_file

from hive_scale.data.cache import ShardCache, is_remote, locked
from hive_scale.data.scan import Fault, ShardTable, scan_shard
from hive_scale.data.shards import SAMPLE_DIR
from hive_scale.data.sources.packages import cache_dir
from hive_scale.strict_json import loads

VERSION = 2  # raised when a scan finds other things in the same tars
LONG_WORK = 256 * 2**20  # bytes of tars from which a scan is shared among processes and shows its progress

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Index:
    """A set of N samples. Arrays are read from the file as they are needed, and shared between processes."""

    path: Path  # of the index file
    shards: tuple[str, ...]
    faults: tuple[Fault, ...]  # what is in the tars but not among the samples, and why
    fingerprint: str  # of the samples: resuming on another set is noticed
    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.caption_bytes)

    @property
    def shard_sizes(self) -> Ints:
        """Samples in each shard: int64 (num_shards,)."""
        return self.arrays["shard_sizes"]

    @property
    def caption_bytes(self) -> NDArray[np.int32]:
        """Length of each caption in UTF-8 bytes: int32 (N,)."""
        return self.arrays["caption_bytes"]

    @property
    def picture_sizes(self) -> NDArray[np.int32]:
        """(width, height) of each picture in pixels, as it is seen upright: int32 (N, 2)."""
        return self.arrays["picture_sizes"]

    @property
    def members(self) -> Ints:
        """(start, length) in bytes of picture, caption and record in their shard: int64 (N, 3, 2)."""
        return self.arrays["members"]

    @cached_property
    def _shard_ends(self) -> list[int]:
        return list(accumulate(self.shard_sizes.tolist()))

    def shard_of(self, sample: int) -> int:
        return bisect_right(self._shard_ends, sample)

    def shard(self, sample: int) -> str:
        return self.shards[self.shard_of(sample)]

    def key(self, sample: int) -> str:
        start = int(self.arrays["key_ends"][sample - 1]) if sample else 0
        return self.arrays["keys"][start : int(self.arrays["key_ends"][sample])].tobytes().decode()

    def __reduce__(self) -> tuple[Any, ...]:
        # workers that are not forked open the file again instead of being sent its content
        return _load, (self.path, self.shards)


def open_index(shards: Sequence[str], cache: ShardCache) -> Index:
    """The index of `shards`, scanned if there is none yet or a shard's size or time has changed since.

    It is kept beside the first shard, or in the user's cache directory where that cannot be written.
    Processes that ask for the same index at once wait for the first one's scan. Raises ValueError when no
    sample is usable.
    """
    path = _index_path(shards)
    index = _load_fresh(path, shards)
    if index is None:
        with locked(path.with_suffix(".lock")):
            index = _load_fresh(path, shards)
            if index is None:
                _write(path, shards, _scan(shards, cache))
                index = _load(path, tuple(shards))
    if not len(index):
        reason = f": {index.faults[0].describe()}" if index.faults else ""
        raise ValueError(f"no usable sample in {shards[0]} and {len(shards) - 1} more shards{reason}")
    return index


def _scan(shards: Sequence[str], cache: ShardCache) -> list[ShardTable]:
    scan = partial(scan_shard, cache=cache)
    if not any(map(is_remote, shards)) and sum(map(os.path.getsize, shards)) < LONG_WORK:
        return [scan(shard) for shard in shards]
    # forked, since a script without a __main__ guard must be able to open a set
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        return list(track(pool.map(scan, shards), f"indexing {len(shards)} shards", total=len(shards)))


def _index_path(shards: Sequence[str]) -> Path:
    if is_remote(shards[0]):
        names, beside, place = list(shards), None, ""
    else:
        beside = Path(shards[0]).resolve().parent
        # relative names, so that a set that moves keeps its index
        names = [shard if is_remote(shard) else os.path.relpath(os.path.abspath(shard), beside) for shard in shards]
        place = str(beside)
    name = f"{Path(shards[0]).stem}-{_short(json.dumps(names, allow_nan=False))}.index"
    if beside is not None and beside != SAMPLE_DIR and os.access(beside, os.W_OK):
        return beside / name
    folder = cache_dir() / "indices"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{_short(place)}-{name}"


def _short(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _stamps(shards: Sequence[str]) -> list[list[int]]:
    """[size, time of change] of each shard; a remote one is taken to stay as it is."""
    stats = [None if is_remote(shard) else os.stat(shard) for shard in shards]
    return [[stat.st_size, stat.st_mtime_ns] if stat else [0, 0] for stat in stats]


def _write(path: Path, shards: Sequence[str], tables: Sequence[ShardTable]) -> None:
    """One safetensors file with the shards, their stamps, the faults and a checksum in its header."""
    arrays = {
        "shard_sizes": np.array([len(table) for table in tables], np.int64),
        "members": np.concatenate([table.members for table in tables]),
        "picture_sizes": np.concatenate([table.picture_sizes for table in tables]),
        "caption_bytes": np.concatenate([table.caption_bytes for table in tables]),
        "keys": np.frombuffer(b"".join(key.encode() for table in tables for key in table.keys), np.uint8),
        "key_ends": np.cumsum([len(key.encode()) for table in tables for key in table.keys], dtype=np.int64),
    }
    metadata = {
        "version": VERSION,
        "stamps": _stamps(shards),
        "faults": [asdict(fault) for table in tables for fault in table.faults],
        "checksum": _checksum(arrays),
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(arrays, temporary, {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()})
    temporary.replace(path)


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _load_fresh(path: Path, shards: Sequence[str]) -> Index | None:
    """The index at `path` if it is there, whole, of this version and younger than its shards."""
    try:
        if not path.is_file():  # nor a pipe, which would be waited for
            return None
        metadata = _header(path)[0]
        if metadata.get("version") == VERSION and metadata["stamps"] == _stamps(shards):
            return _load(path, tuple(shards))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError):
        pass  # missing, of another making or damaged: made again
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
    if _checksum(arrays) != metadata["checksum"] or not _is_consistent(arrays, metadata["stamps"]):
        raise ValueError(f"index {path} is damaged: delete it")
    faults = tuple(Fault(**fault) for fault in metadata["faults"])
    return Index(path, shards, faults, metadata["checksum"], arrays)


def _is_consistent(arrays: dict[str, NDArray[Any]], stamps: Sequence[Sequence[int]]) -> bool:
    """Whether `arrays` describe samples inside of shards with these `stamps`.

    A checksum finds damage, but anyone can compute one who may write beside the shards.
    """
    sizes, members, ends = arrays["shard_sizes"], arrays["members"], arrays["key_ends"]
    count, bounds = len(arrays["caption_bytes"]), np.array([size or 2**62 for size, _ in stamps])  # 0: not known
    shapes = {"shard_sizes": (len(stamps),), "members": (count, 3, 2), "picture_sizes": (count, 2)}
    shapes |= {"caption_bytes": (count,), "key_ends": (count,), "keys": (int(ends[-1]) if len(ends) else 0,)}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        return False
    if (sizes < 0).any() or sum(sizes.tolist()) != count or (np.diff(ends, prepend=0) < 0).any():
        return False
    room = np.repeat(bounds, sizes)[:, None] - members[..., 0]  # behind each member's beginning
    inside = (members >= 0).all() and (members[..., 1] <= room).all()
    return bool(inside and (arrays["picture_sizes"] > 0).all() and (arrays["caption_bytes"] > 0).all())


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(our metadata, safetensors' table of arrays, where their bytes start)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:  # else as much memory would be asked for
            raise ValueError(f"index {path} is cut short: delete it")
        table = loads(file.read(length))
    metadata = {key: loads(value) for key, value in table.pop("__metadata__").items()}
    return metadata, table, 8 + length
