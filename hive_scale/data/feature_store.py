"""Store of a frozen encoder's features on disk. Each image is encoded once; all ranks share the work.

One file, PATH.features, holds one record per image:

    features    (S, V, C), in the compute precision
    label       int64, the caller's label of the image
    status      int64, MADE or BROKEN; any other value: not processed yet
    digest      xxh3-128 of the file's name, layout, the image's number, and the fields above

The digest lies in the record itself, so no separate list can claim features that are lost, and a record that was
truncated, zeroed, corrupted or copied from another set fails its check. Records are written and read by `pwrite` and
`pread`, so a full or missing disk raises OSError instead of a signal. Each group of NEIGHBOURS records starts on a
page of its own, and a single process writes it.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from errno import EACCES, ENOSPC, EPERM, EROFS
from itertools import repeat
from math import prod
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from hive_scale.distributed import World

FORMAT = 2  # part of every feature cache's key, so that features of another format are not read
Numbers = list[int] | NDArray[np.integer]  # image numbers
Shape = tuple[int, int, int]
MADE, BROKEN = 1, 2
NEIGHBOURS, PAGE = 32, 4096
STATE = struct.Struct("<qq")  # layout of label and status
DIGEST = 16  # bytes of an xxh3-128
logger = logging.getLogger(__name__)


class DiskError(ValueError):
    """The disk has no room for the features or cannot be used; raised on every rank."""


class FeatureStore:
    """Features of N images, each (S, V, C): S depths, V visual tokens of width C.

    `encode`, if set, computes them from images uint8 (B, 3, H, W); `make` calls it.
    """

    encode: Callable[[Tensor], Tensor] | None = None

    def __init__(self, path: Path, count: int, shape: Shape, dtype: torch.dtype) -> None:
        """Open or create the file. Raises OSError if that is not possible."""
        self.count, self.shape, self.dtype = count, shape, dtype
        self.file = path.with_suffix(".features")
        self._size = prod(shape) * dtype.itemsize
        self._name = f"{self.file.name} {count} {shape} {dtype}"
        self._told = False
        self._open()

    def missing(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Return a mask, (len(numbers),): True for images that are neither MADE nor BROKEN yet."""
        numbers = np.asarray(numbers)
        missing = np.ones(len(numbers), bool)
        written = np.flatnonzero(self._place(numbers) < os.fstat(self._descriptor).st_size)  # none in a new file
        missing[written] = [self._status(number) not in (MADE, BROKEN) for number in numbers[written].tolist()]
        return missing

    def put(self, numbers: Numbers, features: Tensor, labels: Iterable[int] = repeat(0)) -> None:
        """Store `features`, (len(numbers), S, V, C), and labels of the images. Raises OSError."""
        rows = features.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).reshape(len(numbers), -1).numpy()
        for number, row, label in zip(numbers, rows, labels, strict=False):
            self._write(int(number), row, STATE.pack(label, MADE))

    def give_up(self, numbers: Numbers) -> None:
        """Mark the images as BROKEN, so that they count as processed. Raises OSError."""
        for number in numbers:
            self._write(int(number), b"", STATE.pack(0, BROKEN))

    def get(self, number: int) -> Tensor | None:
        """Return the features (S, V, C) of an image; None if there are none, or if their digest does not match."""
        found = self.read(number)
        return found and found[0]

    def read(self, number: int) -> tuple[Tensor, int] | None:
        """Return (features, label) of an image; None as in `get`."""
        record = np.empty(record_size(self.shape, self.dtype), np.uint8)
        try:
            if os.preadv(self._descriptor, [record.data], self._place(number)) < len(record):
                return None
        except OSError:  # a disk that fails or is gone
            return None
        row, state, digest = np.split(record, [self._size, self._size + STATE.size])
        label, status = STATE.unpack(state.tobytes())
        if status != MADE or digest.tobytes() != self._digest(number, row, state):
            return None
        return torch.from_numpy(row).view(self.dtype).view(self.shape), label

    def make(self, numbers: Numbers, pixels: Tensor) -> Tensor:
        """Encode images uint8 (B, 3, H, W) whose features are missing or damaged; store the result if the disk allows.

        Returns features (len(numbers), S, V, C).
        """
        assert self.encode is not None
        if not self._told:
            logger.warning("%s: features cannot be read, or are damaged: the encoder makes them again", self.file)
            self._told = True
        features = self.encode(pixels)
        with suppress(OSError):
            self.put(numbers, features)
        return features

    def sync(self) -> None:
        """Flush all records to disk. Raises OSError."""
        os.fsync(self._descriptor)

    def reopen(self) -> None:
        """Reopen the file, so that records synced by other machines become visible on NFS. Raises OSError."""
        self._close()
        self._open()

    def _open(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_NOFOLLOW | os.O_NONBLOCK  # a link would be written through, a pipe waited for
        try:
            self._descriptor, self._is_ours = os.open(self.file, how | os.O_RDWR | os.O_CREAT, 0o666), True
        except OSError as error:
            if error.errno not in (EACCES, EPERM, EROFS):
                raise
            # another user's: good enough where nothing is missing
            self._descriptor, self._is_ours = os.open(self.file, how | os.O_RDONLY), False
        self._close = finalize(self, os.close, self._descriptor)

    def _write(self, number: int, row: Any, state: bytes) -> None:
        if not self._is_ours:
            raise PermissionError(EACCES, os.strerror(EACCES), str(self.file))
        parts = [row, state, self._digest(number, row, state)]
        place = self._place(number) + (0 if len(row) else self._size)
        if os.pwritev(self._descriptor, parts, place) < sum(map(len, parts)):
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def _status(self, number: int) -> int:
        try:
            state = os.pread(self._descriptor, STATE.size, self._place(number) + self._size)
        except OSError:
            return 0
        return int(STATE.unpack(state)[1]) if len(state) == STATE.size else 0

    def _place(self, number: Any) -> Any:
        """Byte offsets at which the records of images begin: an integer, or an array for an array of numbers."""
        group, place = divmod(number, NEIGHBOURS)
        return group * size_of(NEIGHBOURS, self.shape, self.dtype) + place * record_size(self.shape, self.dtype)

    def _digest(self, number: int, row: Any, state: Any) -> bytes:
        digest = xxhash.xxh3_128(f"{self._name} {number}".encode())
        digest.update(row)
        digest.update(state)
        return digest.digest()


def record_size(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one image's record."""
    return prod(shape) * dtype.itemsize + STATE.size + DIGEST


def size_of(count: int, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes on disk for the features of `count` images, rounded up to whole groups of neighbours."""
    pages = -(-NEIGHBOURS * record_size(shape, dtype) // PAGE)
    return -(-count // NEIGHBOURS) * pages * PAGE


def free_bytes(folder: Path) -> int:
    """Bytes available for features in `folder`, which need not exist yet: free space plus that of features already
    there.
    """
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(disk).free + sum(file.stat().st_blocks * 512 for file in folder.glob("*.features"))


def parts(wanted: NDArray[np.integer], missing: NDArray[np.integer], size: int) -> list[NDArray[np.integer]]:
    """Split `wanted`, ascending image numbers, into parts of at most `size`; drop parts in which nothing is `missing`.

    A part consists of whole groups of neighbours, is processed by one process, and is always encoded whole. Features
    that are computed again after an interruption thus come from the same encoder batches, and are identical bit for
    bit.
    """
    assert size % NEIGHBOURS == 0
    whole = np.split(wanted, np.flatnonzero(np.diff(wanted // size)) + 1)
    needed = np.unique(missing // size)
    return [part for part in whole if len(part) and part[0] // size in needed]


def open_feature_store(
    world: World, path: Path, wanted: NDArray[np.integer], count: int, shape: Shape, dtype: torch.dtype
) -> tuple[FeatureStore, NDArray[np.integer]]:
    """Open the features under `path` and find which of the `wanted` are missing, the same for all ranks. A collective.

    Raises DiskError on all ranks if the disk cannot be used, or has no room for the missing features.
    """
    kept, reason = None, "another rank cannot use it"
    try:
        kept = FeatureStore(path, count, shape, dtype)
    except OSError as error:
        reason = str(error)
    if world.sum(kept is None)[0] or kept is None:
        raise DiskError(f"{path.parent}: {reason}: name another disk for features, or keep none")
    flags = torch.zeros(len(wanted), dtype=torch.uint8)
    mine = slice(world.rank * len(wanted) // world.size, (world.rank + 1) * len(wanted) // world.size)
    flags[mine] = torch.from_numpy(kept.missing(wanted[mine]).astype(np.uint8))
    world.add_up([flags])
    missing = np.sort(wanted[flags.numpy() > 0])
    needed, free = size_of(len(missing), shape, dtype), shutil.disk_usage(path.parent).free
    if world.sum(world.is_main and needed > free)[0]:
        raise DiskError(
            f"{path.parent}: {needed / 1e9:.1f} GB of features are still to be made, {free / 1e9:.1f} GB are free: "
            "name another disk for them, or keep none"
        )
    return kept, missing


def settle(world: World, kept: FeatureStore, failed: OSError | None) -> None:
    """Flush the records of all ranks to disk and make them visible to every rank. A collective.

    No rank reopens the file before all have synced: NFS caches a file's length and pages until it is opened again.

    Raises DiskError on all ranks if one reports a write error in `failed`, or meets one here.
    """
    for step in (kept.sync, kept.reopen):
        try:
            step()
        except OSError as error:
            failed = failed or error
        agree(world, failed)


def agree(world: World, error: OSError | None) -> None:
    """Raise DiskError on all ranks if any rank passes a write `error`. A collective."""
    if world.sum(error is not None)[0]:
        raise DiskError(f"features cannot be kept: {error or 'another rank could not write its own'}")
