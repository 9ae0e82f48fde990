"""Expand shard patterns to tars, and read byte ranges from them."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from braceexpand import braceexpand

from hive_scale import credentials
from hive_scale.data.images import LARGEST_FILE
from hive_scale.data.shard_cache import ShardCache, digest_of, is_remote
from hive_scale.data.tar_scan import Stamp
from hive_scale.locate import prepared_by

SPLITS = ("train", "heldout")
MOST_REPEATS = 1_000_000  # of a set in an epoch; counts of samples must fit into 64 bits
SAMPLE_DIR = Path(__file__).resolve().parent / "sample"  # tars that ship with the package


@dataclass(frozen=True)
class ShardSet:
    """The shards of one pattern, by their public names.

    `repeats` is the number of times one epoch of the whole mixture reads this set.
    """

    pattern: str
    shards: list[str]
    repeats: float = 1.0


def expand(patterns: Sequence[str], split: str = "train") -> list[ShardSet]:
    """Expand `patterns`, in order: paths, ``{0000..0099}`` ranges, globs, folders, URLs, ``sample:train``.

    A folder stands for the tars in it that are named after the `split`: for train, ``train-*.tar``. If none is named
    after any split, it stands for all its tars.

    A prefix says how often an epoch reads a set: ``3 x small/*.tar``, ``0.5 x large/*.tar``. Raises ValueError if a
    shard is missing (naming it and its pattern) or named twice, and for ``pipe:`` URLs, which run commands.
    """
    sets = [_expand_one(pattern, split) for pattern in patterns]
    if not sets:
        raise ValueError("no shards given: name tars in data.train, such as 'set/{0000..0099}.tar', or their folder")
    twice = [shard for shard, count in Counter(all_shards(sets)).items() if count > 1]
    if twice:
        raise ValueError(f"shard {twice[0]} is named twice: to read a set twice as often, write '2 x PATTERN'")
    return sets


def all_shards(sets: Sequence[ShardSet]) -> list[str]:
    return [shard for one in sets for shard in one.shards]


def _expand_one(pattern: str, split: str) -> ShardSet:
    shown = credentials.take(pattern)
    repeats, bare = _share(shown)
    if repeats == 0:
        raise ValueError(f"'{bare}' is to be read 0 times: leave it out, or give it a share above 0")
    if repeats > MOST_REPEATS:
        raise ValueError(f"'{bare}' is to be read {repeats:g} times: at most {MOST_REPEATS:,} are possible")
    places = _find(_share(credentials.private(shown))[1], bare, split)
    return ShardSet(bare, [credentials.name(shown, place) for place in places], repeats)


def _share(pattern: str) -> tuple[float, str]:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) x (.+)", pattern)
    return (float(match[1]), match[2]) if match else (1.0, pattern)


def _find(pattern: str, shown: str, split: str) -> list[str]:
    """Return the paths or URLs of the shards that match `pattern`; error messages call it `shown`."""
    if pattern.startswith("sample:"):
        name = pattern.removeprefix("sample:")
        found = sorted(str(path) for path in SAMPLE_DIR.glob(f"{name}-*.tar"))
        if not found:
            raise ValueError(f"no packaged set '{shown}': use sample:train or sample:heldout")
        return found
    if pattern.startswith("pipe:"):
        raise ValueError(f"shard '{shown}' would run a command: name a path or a URL")
    if is_remote(pattern):
        return list(braceexpand(pattern))
    paths: list[str] = []
    for path in map(os.path.expanduser, braceexpand(pattern)):
        matching = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        found = [tar for one in matching for tar in (_tars_in(one, shown, split) if os.path.isdir(one) else [one])]
        if missing := [one for one in found if not os.path.isfile(one)]:
            what = missing[0] if shown == pattern else "a shard"
            asked = " (is $NAME for a variable of the command that began the run? Give that command)" * ("$" in pattern)
            several = ", or give several as a list, '[a.tar,b.tar]'" if "," in shown and "{" not in shown else ""
            remedy = f"make it with {made}" if (made := prepared_by(shown)) else "make the shard again"
            raise ValueError(f"shard {what} of '{shown}' is missing{asked}: correct the pattern{several}, or {remedy}")
        paths += found
    if not paths:
        made = prepared_by(shown) or "prepare_data.py"
        raise ValueError(f"no shard matches '{shown}': correct the pattern, or make the shards with {made}")
    return paths


def _tars_in(folder: str, shown: str, split: str) -> list[str]:
    """Return the tars in `folder` that are of `split`. Raises ValueError if there are none."""
    tars = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    by_split = {name: [tar for tar in tars if os.path.basename(tar).startswith(f"{name}-")] for name in SPLITS}
    found = by_split[split] if any(by_split.values()) else tars
    if not tars:
        raise ValueError(
            f"there are no tars in the folder '{shown}': name one that holds some; images and captions become tars by "
            "prepare_data.py"
        )
    if not found:
        raise ValueError(f"there is no {split}-*.tar in the folder '{shown}': name its tars, or another folder")
    return found


class ShardReader:
    """Reads byte ranges of tars, keeping at most `max_open` of them open.

    Uses pread, so that copies of a reader in forked workers do not disturb each other. `stamps` come from the index: a
    shard with other content is refused, since the indexed ranges do not apply to it.
    """

    def __init__(self, shards: Sequence[str], stamps: Sequence[Stamp], cache: ShardCache, max_open: int = 64) -> None:
        self.shards = shards
        self.stamps = stamps
        self.cache = cache
        self.max_open = max_open
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, most recently used last
        self._lock = Lock()  # keeps one thread from closing a descriptor that another reads

    def read(self, shard: int, start: int, length: int, most: int = LARGEST_FILE) -> bytes:
        """Return `length` bytes from offset `start` of shard number `shard`.

        Raises ValueError if the file ends before, or if `length` exceeds `most`: the sample is broken. Raises OSError
        if the shard cannot be opened or has changed since it was indexed: the machine is at fault, or the set.
        """
        if start < 0 or not 0 <= length <= most:  # tar members can have any size
            raise ValueError(
                f"{length:,} bytes from byte {start:,} on are not the at most {most:,} that are read of one"
            )
        with self._lock:
            data = os.pread(self._descriptor(shard), length, start)
        if len(data) < length:
            raise ValueError(f"the shard ends at byte {start + len(data)}, before the sample does")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= self.max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._opened(self.shards[shard], self.stamps[shard])
        self._open.move_to_end(shard)
        return self._open[shard]

    def _opened(self, shard: str, stamp: Stamp) -> int:
        descriptor = self.cache.open(shard, stamp.digest, stamp.size)
        if not is_remote(shard) and not stamp.fits(os.fstat(descriptor)) and digest_of(descriptor) != stamp.digest:
            os.close(descriptor)
            raise OSError(f"shard {shard} has changed since it was indexed: restore it")
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # without the open descriptors, which mean nothing in another process
        return ShardReader, (self.shards, self.stamps, self.cache, self.max_open)
