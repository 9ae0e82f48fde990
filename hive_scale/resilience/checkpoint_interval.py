"""When to save a checkpoint: by expected failures and the cost of a save, and before the job's time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from math import inf, sqrt

DAY = 86400.0
FIRST = 60.0  # seconds of training before the first save, which measures the cost of a save
SPARSE = 10  # the interval is at least this many times a write's duration, to leave the disk to others
MARGIN = 10.0  # seconds kept free before the job's time limit


def best_interval(save_seconds: float, expected_failures_per_day: float) -> float:
    """Seconds between saves that minimise the time lost to saving and to repeating work after failures.

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
    """Seconds until Slurm's time limit for this job; infinite if unknown, or past (then it is another job's)."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    left = float(end) - time.time() if end.isdigit() else inf
    return left if left > 0 else inf


class CheckpointInterval:
    """Decides when to save. Runs on rank 0, with a monotonic clock that starts when the stage starts or resumes."""

    def __init__(
        self,
        interval: int,
        expected_failures_per_day: float,
        grace: float,
        left: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Save every `interval` steps; if that is 0, by the measured cost of a save and the expected failures.

        `grace` is the number of seconds that a stop may take. `left` is the number of seconds until the job's time
        limit (None: from Slurm's environment).
        """
        self.interval, self.expected_failures_per_day, self.grace, self.clock = (
            interval,
            expected_failures_per_day,
            grace,
            clock,
        )
        self.end = clock() + (seconds_left(os.environ) if left is None else left)
        self.step_seconds = 0.0  # recent maximum of a step's duration, which decays by a tenth per step
        self.blocked = self.durable = 0.0  # a save's seconds: while training waits, and until it is on disk
        self._stepped = self._saved = clock()
        self._warned = 0.0

    def stepped(self, write_seconds: float) -> None:
        """Note the end of a step. `write_seconds` is the duration of the last finished write."""
        now = self.clock()
        self.step_seconds = max(now - self._stepped, 0.9 * self.step_seconds)
        self.durable = max(write_seconds, 0.9 * self.durable)
        self._stepped = now

    def saved(self, blocked: float) -> None:
        """Note that a save has started, and that training waited `blocked` seconds for it."""
        self.blocked = blocked
        self._saved = self._stepped = self.clock()

    def due(self, step: int) -> bool:
        """True if a checkpoint should be saved after `step` (1-based)."""
        if self.interval:
            return step % self.interval == 0
        wanted = best_interval(self.blocked, self.expected_failures_per_day) if self.durable else FIRST
        return self.clock() - self._saved >= max(wanted, SPARSE * self.durable)

    def time_is_up(self) -> bool:
        """True if another step and a save might not finish before the job's time limit."""
        return self.clock() + 2 * self.stopping_seconds + MARGIN > self.end

    @property
    def stopping_seconds(self) -> float:
        """Worst-case seconds from a signal to the exit: the current step, then a save that waits for an earlier one."""
        return self.step_seconds + self.blocked + 2 * self.durable

    def warning(self) -> str:
        """A message if a stop takes longer than `grace`; again only if it gets 1.5 times worse; else ""."""
        if self.stopping_seconds <= max(self.grace, 1.5 * self._warned):
            return ""
        self._warned = self.stopping_seconds
        return (
            f"a stop would take {self.stopping_seconds:.0f} s (a step, evaluation included, {self.step_seconds:.1f}, "
            f"a save {self.durable:.1f}), more than grace_seconds={self.grace:g}: what is killed sooner repeats the "
            "steps since the last save; ask the scheduler to signal earlier, lower global_batch, or hold out fewer "
            "samples"
        )
