"""Which tars make up a set, and the bytes of one member of one of them."""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from hive_scale.data.cache import ShardCache, is_remote

SAMPLE_DIR = Path(__file__).resolve().parent / "sample"  # the tars that ship with the package


def expand(patterns: Sequence[str]) -> list[str]:
    """The shards that `patterns` name, in order: paths, ``{0000..0099}`` ranges, globs, URLs, ``sample:train``.

    Raises ValueError that names a missing shard and its pattern, and for ``pipe:`` URLs, which run commands.
    """
    paths = [path for pattern in patterns for path in _expand_one(pattern)]
    if not paths:
        raise ValueError("no shards given: name tars in data.train and data.heldout, such as 'set/{0000..0099}.tar'")
    twice = {path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else set()
    if twice:
        raise ValueError(f"shard {min(twice)} is named twice: each shard belongs in the list once")
    return paths


def _expand_one(pattern: str) -> list[str]:
    if pattern.startswith("sample:"):
        name = pattern.removeprefix("sample:")
        found = sorted(str(path) for path in SAMPLE_DIR.glob(f"{name}-*.tar"))
        if not found:
            raise ValueError(f"no packaged set '{pattern}': use sample:train or sample:heldout")
        return found
    if pattern.startswith("pipe:"):
        raise ValueError(f"shard '{pattern}' would run a command: name a path or a URL")
    if is_remote(pattern):
        return list(braceexpand(pattern))
    paths: list[str] = []
    for path in braceexpand(pattern):
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        for one in found:
            if not os.path.isfile(one):
                raise ValueError(f"shard {one} of '{pattern}' is missing: correct the pattern, or make the shard again")
        paths += found
    if not paths:
        raise ValueError(f"no shard matches '{pattern}': correct the pattern, or make the shards with prepare_data.py")
    return paths


class ShardReader:
    """Reads byte ranges of tars, keeping at most `max_open` of them open.

    Ranges are read in place (pread), so that copies of a reader in forked workers do not disturb each other.
    """

    def __init__(self, shards: Sequence[str], cache: ShardCache, max_open: int = 64) -> None:
        self.shards = shards
        self.cache = cache
        self.max_open = max_open
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the latest used last

    def read(self, shard: int, start: int, length: int) -> bytes:
        """`length` bytes from `start` of shard number `shard`.

        Raises ValueError if the file ends before, OSError if it cannot be opened at all: the first is a broken
        sample, the second a broken machine.
        """
        data = os.pread(self._descriptor(shard), length, start)
        if len(data) < length:
            raise ValueError(f"the shard ends at byte {start + len(data)}, before the sample does")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= self.max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self.cache.open(self.shards[shard])
        self._open.move_to_end(shard)
        return self._open[shard]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.shards, self.cache, self.max_open)  # descriptors mean nothing in another process
