"""When to save: often enough for the failures to be expected, and in time before the allocation ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from math import inf, sqrt

DAY = 86400.0
FIRST = 60.0  # seconds of training before the first save, which tells what a save costs
SPARSE = 10  # times as long as a write is the least interval, which leaves the disk to others
MARGIN = 10.0  # seconds kept free before the allocation ends


def best_interval(save_seconds: float, expected_failures_per_day: float) -> float:
    """Seconds between saves that lose the least time to saving and to repeating lost work.

    Daly, A higher order estimate of the optimum checkpoint interval (2006), eq. 37; its first term is Young's (1974).
    """
    if expected_failures_per_day <= 0:
        return inf
    between = DAY / expected_failures_per_day
    if save_seconds >= 2 * between:
        return between
    part = save_seconds / (2 * between)
    return sqrt(2 * save_seconds * between) * (1 + sqrt(part) / 3 + part / 9) - save_seconds


def seconds_left(environment: Mapping[str, str]) -> float:
    """Until Slurm ends this job; infinite where no end is known, or it has passed and is another job's."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    left = float(end) - time.time() if end.isdigit() else inf
    return left if left > 0 else inf


class CheckpointInterval:
    """One rank's clock decides for all. It starts when the stage is resumed, and heeds no change of the wall's."""

    def __init__(
        self,
        interval: int,
        expected_failures_per_day: float,
        grace: float,
        left: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Save every `interval` steps, or, if that is 0, as the measured cost of a save and the failures demand.

        `grace` is how many seconds a stop may take; `left` how many the allocation lasts (None: ask Slurm's word).
        """
        self.interval, self.expected_failures_per_day, self.grace, self.clock = (
            interval,
            expected_failures_per_day,
            grace,
            clock,
        )
        self.end = clock() + (seconds_left(os.environ) if left is None else left)
        self.step_seconds = 0.0  # the longest of late
        self.blocked = self.durable = 0.0  # seconds of a save: that training waits, and until all is on disk
        self._stepped = self._saved = clock()
        self._warned = 0.0

    def stepped(self, write_seconds: float) -> None:
        """Note the end of a step, and what the last write that is finished took."""
        now = self.clock()
        self.step_seconds = max(now - self._stepped, 0.9 * self.step_seconds)
        self.durable = max(write_seconds, 0.9 * self.durable)
        self._stepped = now

    def saved(self, blocked: float) -> None:
        """Note a save that has begun, and for how many seconds training waited for it."""
        self.blocked = blocked
        self._saved = self._stepped = self.clock()

    def due(self, step: int) -> bool:
        """Whether to save after `step` (1-based)."""
        if self.interval:
            return step % self.interval == 0
        wanted = best_interval(self.blocked, self.expected_failures_per_day) if self.durable else FIRST
        return self.clock() - self._saved >= max(wanted, SPARSE * self.durable)

    def time_is_up(self) -> bool:
        """Whether one more step and a save might not fit in before the allocation ends."""
        return self.clock() + 2 * self.stopping_seconds + MARGIN > self.end

    @property
    def stopping_seconds(self) -> float:
        """From a signal to the end, at worst: the step under way, then a save that begins with another unfinished."""
        return self.step_seconds + self.blocked + 2 * self.durable

    def warning(self) -> str:
        """What to tell the user, once and again if it gets much worse: that a stop takes longer than it may."""
        if self.stopping_seconds <= max(self.grace, 1.5 * self._warned):
            return ""
        self._warned = self.stopping_seconds
        return (
            f"a stop would take {self.stopping_seconds:.0f} s (a step, evaluation included, {self.step_seconds:.1f}, "
            f"a save {self.durable:.1f}), more than grace_seconds={self.grace:g}: what is killed sooner repeats the "
            "steps since the last save; ask the scheduler to signal earlier, lower global_batch, or hold out fewer "
            "samples"
        )
