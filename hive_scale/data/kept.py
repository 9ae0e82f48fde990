"""What a frozen encoder makes of each picture of a set, kept on disk: made once, by as many processes as there are."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hive_scale.distributed import World

Numbers = list[int] | NDArray[np.integer]  # of pictures
TO_DO, MADE, BROKEN = 0, 1, 2
INTEGERS = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}  # by size: numpy knows no bfloat16; bits are bits


class KeptFeatures:
    """Features of N pictures, (S, V, C) each: of S depths, V visual tokens of width C.

    Two files, PATH.features and PATH.state; a picture's features are written before its state says so, and a process
    that dies between the two has lost that part alone.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.count, self.shape, self.dtype = count, shape, dtype
        self._path = path
        values, state = path.with_suffix(".features"), path.with_suffix(".state")
        size = size_of(count, shape, dtype)
        if not values.exists() or values.stat().st_size != size:
            forget(path)  # deleted, cut or copied in part: what it holds is not known
        make(values, size)
        make(state, count)
        self._state: NDArray[np.uint8] = np.memmap(state, np.uint8, "r+", shape=(count,))
        self._values: NDArray[np.integer] = np.memmap(values, INTEGERS[dtype.itemsize][0], "r+", shape=(count, *shape))

    def missing(self) -> NDArray[np.integer]:
        """Numbers of the pictures whose features nobody has made yet."""
        return np.flatnonzero(self._state == TO_DO)

    def put(self, numbers: Numbers, features: Tensor) -> None:
        """Keep `features`, (len(numbers), S, V, C)."""
        self._values[numbers] = features.to(self.dtype).view(INTEGERS[self.dtype.itemsize][1]).cpu().numpy()
        self._state[numbers] = MADE

    def give_up(self, numbers: Numbers) -> None:
        """Those pictures cannot be used."""
        self._state[numbers] = BROKEN

    def get(self, number: int) -> Tensor | None:
        """Features (S, V, C) of a picture; None if there are none."""
        if self._state[number] != MADE:
            return None
        return torch.from_numpy(self._values[number]).view(self.dtype)

    def rows(self, numbers: Numbers) -> Tensor:
        """Features (len(numbers), S, V, C) of pictures that have been made."""
        return torch.from_numpy(self._values[numbers]).view(self.dtype)

    def __reduce__(self) -> tuple[object, ...]:
        return KeptFeatures, (self._path, self.count, self.shape, self.dtype)  # the files are opened again


def size_of(count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes of the features of `count` pictures."""
    return count * prod(shape) * dtype.itemsize


def room_in(folder: Path) -> int:
    """Bytes that features may take in `folder`, which need not be there yet: free, or features' already."""
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(disk).free + sum(file.stat().st_blocks * 512 for file in folder.glob("*.features"))


def forget(path: Path) -> None:
    """None of the features under `path` are taken to be there any more."""
    path.with_suffix(".state").unlink(missing_ok=True)


def make(file: Path, size: int) -> None:
    """A file of `size` bytes, zeros where nothing has been written; one that is there stays as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as opened:
        opened.truncate(size)


def open_kept(
    world: World, path: Path, wanted: NDArray[np.integer], count: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[KeptFeatures, NDArray[np.integer]]:
    """The features under `path`, and which of the `wanted` are missing, the same for all ranks. A collective.

    Raises ValueError if the disk has no room for those.
    """
    if world.is_main:
        KeptFeatures(path, count, shape, dtype)
    world.barrier()
    kept = KeptFeatures(path, count, shape, dtype)
    missing = np.intersect1d(kept.missing(), wanted)
    needed, free = size_of(len(missing), shape, dtype), shutil.disk_usage(path.parent).free
    world.barrier()  # all have looked before one begins to change it
    if needed > free:
        raise ValueError(
            f"{path.parent}: {needed / 1e9:.1f} GB of features are still to be made, {free / 1e9:.1f} GB are free: "
            "name another disk for them, or keep none"
        )
    return kept, missing
