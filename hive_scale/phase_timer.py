"""Phase timer of a process: its current phase, the seconds spent in each, and a counter of progress."""

from __future__ import annotations

import time
from mmap import mmap

# phases outside of steps, during which libraries may give no sign of progress for long: loading, exporting
OUTSIDE = {"start", "features", "fetch", "handoff"}
FETCH = "fetch"  # a library downloads from a hub: it has time limits of its own and reports no progress

# a counter in memory shared with forked processes, so that their progress counts as this process's
_moves = memoryview(mmap(-1, 8)).cast("Q")


def tick() -> None:
    """Report progress within work of unknown length: bytes written, read or fetched, a batch processed."""
    _moves[0] = (_moves[0] + 1) % 2**63


def ticks() -> int:
    """The progress counter; it changes with each `tick` of this process, or of one forked from it."""
    return _moves[0]


def begin() -> None:
    """Start a new progress counter, separate from the one of the process that this one was forked from."""
    global _moves
    _moves = memoryview(mmap(-1, 8)).cast("Q")


class PhaseTimer:
    """Accounts time by phase. The code that does the work writes it; watchdog and goodput read it.

    Phases of steps are: data, forward, backward, reduce (including the wait for other ranks), update, evaluate, save;
    the others are in OUTSIDE.
    """

    def __init__(self) -> None:
        self.step = 0  # current optimizer step, 1-based
        self.keys: tuple[str, ...] = ()  # keys of the samples read last
        self.born = time.monotonic()
        self.reset()

    @property
    def age(self) -> float:
        """Seconds since this timer was made, when the process joined the others."""
        return time.monotonic() - self.born

    def reset(self) -> None:
        """Restart the account of seconds by phase."""
        self.phase, self.since = "start", time.monotonic()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Switch to `phase`, and add the time since the last switch to the previous phase."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def so_far(self) -> dict[str, float]:
        """Seconds by phase since the last `reset`, including the current phase."""
        now = time.monotonic() - self.since
        return self.seconds | {self.phase: self.seconds.get(self.phase, 0.0) + now}
