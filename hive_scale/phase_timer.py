"""What this process is doing right now, how long it has been at each kind of thing, and whether it gets anywhere."""

from __future__ import annotations

import time
from mmap import mmap

# what is done outside steps, where libraries are silent for long: loading, handing over, showing
OUTSIDE = {"start", "features", "fetch", "handoff"}
FETCH = "fetch"  # a library fetches from a hub, which has time limits of its own and tells nobody how far it is

# in memory that processes forked from this one share: their work is this one's
_moves = memoryview(mmap(-1, 8)).cast("Q")


def tick() -> None:
    """Say that work of unknown length has got on by a piece: bytes written, read or fetched, a batch seen."""
    _moves[0] = (_moves[0] + 1) % 2**63


def ticks() -> int:
    """A number that changes with each `tick` of this process, or of one forked from it."""
    return _moves[0]


def begin() -> None:
    """Count anew, apart from the process that this one was forked from."""
    global _moves
    _moves = memoryview(mmap(-1, 8)).cast("Q")


class PhaseTimer:
    """Written by whoever does the work, read by the hang watch and by the account of time.

    Phases of steps are: data, forward, backward, reduce (with waiting for the other ranks), update, evaluate, save;
    the others are in OUTSIDE.
    """

    def __init__(self) -> None:
        self.step = 0  # the optimizer step it works on, 1-based
        self.keys: tuple[str, ...] = ()  # of the samples read last
        self.born = time.monotonic()
        self.reset()

    @property
    def age(self) -> float:
        """Seconds since this process joined the others."""
        return time.monotonic() - self.born

    def reset(self) -> None:
        """Begin another account of time."""
        self.phase, self.since = "start", time.monotonic()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """From now on this process does what `phase` says."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def so_far(self) -> dict[str, float]:
        """Seconds by phase since the account began, the present one included."""
        now = time.monotonic() - self.since
        return self.seconds | {self.phase: self.seconds.get(self.phase, 0.0) + now}
