"""Log of unusable samples: each is listed once, in a file that all ranks and resumed runs share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from hive_scale.data.tar_scan import SampleError
from hive_scale.shared_files import PATIENCE, Held, locked
from hive_scale.strict_json import LARGEST_LINE, loads


@dataclass(frozen=True)
class Share:
    """The largest share of bad samples that is tolerated in a set of `num_samples`, good and bad ones, in `shards`."""

    most: float
    shards: frozenset[str]
    num_samples: int


class BadSampleLog:
    """Bad samples, kept in `path` (JSON lines of shard, key and reason), or only in memory if `path` is None.

    `budget` is the largest number of bad samples a run tolerates. It applies to all samples in the file, whichever
    rank or earlier run added them. `share` limits those of one set.
    """

    def __init__(self, path: Path | None, budget: int, share: Share | None = None) -> None:
        self.path = path
        self.budget = budget
        self.share = share
        self._known: dict[tuple[str, str], SampleError] = {}

    def add(self, faults: Iterable[SampleError]) -> None:
        """Record those of `faults` that are new. Raises ValueError with a summary if there are too many by now."""
        new = {(fault.shard, fault.key): fault for fault in faults}
        for place in new.keys() & self._known.keys():
            del new[place]  # already logged in an earlier epoch
        if not new:
            return
        if self.path is None:
            self._known |= new
        else:
            with _locked(self.path) as file:
                self._known = {(fault.shard, fault.key): fault for fault in _read(file)}
                fresh = [fault for place, fault in new.items() if place not in self._known]
                file.writelines(json.dumps(asdict(fault), allow_nan=False) + "\n" for fault in fresh)
            self._known |= new
        if len(self._known) > self.budget:
            raise ValueError(self._summary(self._known.values(), f"data.max_bad_samples={self.budget}"))
        if self.share:
            bad = [fault for fault in self._known.values() if fault.shard in self.share.shards]
            if len(bad) > self.share.most * self.share.num_samples:
                limit = f"data.max_bad_share={self.share.most:g} of {self.share.num_samples:,}"
                raise ValueError(self._summary(bad, limit))

    def _summary(self, bad: Collection[SampleError], limit: str) -> str:
        reasons = Counter(fault.reason for fault in bad)
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        first = next(iter(bad))
        return (
            f"bad samples: {len(bad):,}, more than {limit} ({told}; the first is {first.shard}: {first.key}): repair "
            f"the shards{f' listed in {self.path}' if self.path else ''}, or raise the limit"
        )


def read_faults(path: Path) -> list[SampleError]:
    """Return the faults logged in the file at `path`; empty if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(errors="replace") as file:
        return list(_read(file))


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(Held):  # a dead machine's lock, on a file system without locks: at worst two ranks log one sample
            stack.enter_context(locked(path.with_name(f".{path.name}.lock"), PATIENCE))
        yield stack.enter_context(path.open("a+"))


def _read(file: TextIO) -> Iterator[SampleError]:
    file.seek(0)
    for line in file:
        with suppress(ValueError, TypeError):  # a line truncated when a run was killed
            yield SampleError(**loads(line, LARGEST_LINE))
