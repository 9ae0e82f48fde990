"""What a frozen encoder makes of each picture of a set, kept on disk: made once, by as many processes as there are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TO_DO, MADE, BROKEN = 0, 1, 2
INTEGERS = {torch.float32: np.int32, torch.bfloat16: np.int16}  # numpy knows no bfloat16: bits are bits


class KeptFeatures:
    """Features of N pictures, (S, V, C) each: of S depths, V visual tokens of width C.

    Two files, PATH.features and PATH.state; a picture's features are written before its state says so, and a process
    that dies between the two has lost that part alone.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Raises ValueError if the disk has no room for what is still to be made."""
        self.count, self.shape, self.dtype = count, shape, dtype
        self._path = path
        values, state = path.with_suffix(".features"), path.with_suffix(".state")
        path.parent.mkdir(parents=True, exist_ok=True)
        row = int(np.prod(shape)) * dtype.itemsize
        if values.exists() and values.stat().st_size != count * row:
            state.unlink(missing_ok=True)  # cut or copied in part: what it holds is not known
        _make(state, count)
        self._state: NDArray[np.uint8] = np.memmap(state, np.uint8, "r+", shape=(count,))
        needed, free = len(self.missing()) * row, shutil.disk_usage(path.parent).free
        if needed > free:
            raise ValueError(
                f"feature_cache={path.parent}: {needed / 1e9:.1f} GB of features are still to be made, "
                f"{free / 1e9:.1f} GB are free: name another disk, or leave feature_cache empty"
            )
        _make(values, count * row)
        self._values: NDArray[np.integer] = np.memmap(values, INTEGERS[dtype], "r+", shape=(count, *shape))

    def missing(self) -> NDArray[np.integer]:
        """Numbers of the pictures whose features nobody has made yet."""
        return np.flatnonzero(self._state == TO_DO)

    def put(self, numbers: list[int], features: Tensor) -> None:
        """Keep `features`, (len(numbers), S, V, C)."""
        self._values[numbers] = features.to(self.dtype).view(_integer(self.dtype)).cpu().numpy()
        self._state[numbers] = MADE

    def give_up(self, numbers: list[int]) -> None:
        """Those pictures cannot be used."""
        self._state[numbers] = BROKEN

    def get(self, number: int) -> Tensor | None:
        """Features (S, V, C) of a picture; None if there are none."""
        if self._state[number] != MADE:
            return None
        return torch.from_numpy(self._values[number]).view(self.dtype)

    def __reduce__(self) -> tuple[object, ...]:
        return KeptFeatures, (self._path, self.count, self.shape, self.dtype)  # the files are opened again


def _make(file: Path, size: int) -> None:
    """A file of `size` bytes, zeros where nothing has been written; one that is there stays as it is."""
    with file.open("ab") as opened:
        opened.truncate(size)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype == torch.bfloat16 else torch.int32
