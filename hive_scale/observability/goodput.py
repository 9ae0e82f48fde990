"""Accounting of a stage's wall time over all its restarts: every second belongs to one account."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hive_scale.phase_timer import OUTSIDE, PhaseTimer

ACCOUNTS = ("steps", "data", "evaluate", "save", "start", "lost", "down")
# phases not listed here belong to "steps"
OF_PHASE = {"data": "data", "evaluate": "evaluate", "save": "save"} | dict.fromkeys(OUTSIDE, "start")


class Goodput:
    """Seconds of the stage by account, as in each line of metrics.jsonl.

    steps: useful work; data, evaluate, save: training waited for these; start: from the start of the process, or the
    end of the previous stage, to the first step; lost: work that was repeated or discarded; down: no process was
    running.
    """

    def __init__(self, timer: PhaseTimer, lines: Sequence[Mapping[str, Any]] = (), done_steps: int = 0) -> None:
        """`lines` come from earlier attempts. Steps after `done_steps` count as lost."""
        self.timer = timer
        self.lost_steps = 0
        self._before = dict.fromkeys(ACCOUNTS, 0.0)
        if lines:
            self._before |= _spent(lines[-1])
            self.lost_steps = lines[-1].get("lost_steps", 0)
            self._before["down"] += max(0.0, time.time() - timer.age - lines[-1].get("time", time.time()))
        self._forget(lines, done_steps)

    def rollback(self, lines: Sequence[Mapping[str, Any]], step: int) -> None:
        """Move the time of the steps after `step`, as found in `lines`, to "lost"."""
        self._forget(lines, step)

    def skip_batch(self, seconds: float) -> None:
        """Move `seconds` to "lost": they went into a step that was skipped."""
        self._move(seconds, "lost")
        self.lost_steps += 1

    def held_up(self, seconds: float) -> None:
        """Move `seconds` of a step to "data": this rank waited for another rank's data."""
        self._move(seconds, "data")

    def line(self) -> dict[str, Any]:
        """Return the fields for a line of metrics, from which the next attempt continues."""
        spent = {account: round(seconds, 3) for account, seconds in self.spent().items()}
        return {"spent": spent, "lost_steps": self.lost_steps}

    def spent(self) -> dict[str, float]:
        spent = dict(self._before)
        for phase, seconds in self.timer.so_far().items():
            spent[OF_PHASE.get(phase, "steps")] += seconds
        return spent

    def close(self) -> str:
        """Return a summary for the end of the stage; time after it counts as start of the next stage."""
        told = summary(self.spent(), self.lost_steps)
        self.timer.reset()
        return told

    def _forget(self, lines: Sequence[Mapping[str, Any]], step: int) -> None:
        dropped = [line for line in lines if line["step"] > step]
        if dropped:
            kept = [_spent(line)["steps"] for line in lines if line["step"] <= step]
            self._move(_spent(dropped[-1])["steps"] - (kept[-1] if kept else 0.0), "lost")
            self.lost_steps += len(dropped)

    def _move(self, seconds: float, account: str) -> None:
        self._before["steps"] -= seconds
        self._before[account] += seconds


def _spent(line: Mapping[str, Any]) -> dict[str, float]:
    """Accounts of a line, with 0 for missing ones (lines of the first versions lack some)."""
    told = line.get("spent", {})
    return {account: told.get(account, 0.0) for account in ACCOUNTS}


def share(spent: Mapping[str, float]) -> float:
    """Share of the total time that went into steps."""
    return spent.get("steps", 0.0) / max(sum(spent.values()), 1e-9)


def summary(spent: Mapping[str, float], lost_steps: int) -> str:
    """Return one line for people: the share of time that went into steps, and the seconds of every account."""
    parts = ", ".join(f"{account} {seconds:.0f} s" for account, seconds in spent.items() if seconds >= 0.5)
    return f"goodput {share(spent):.1%} of {sum(spent.values()):.0f} s ({parts}; {lost_steps} steps lost)"


def added(lines: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], int]:
    """Sum the accounts of several stages, given the last line of each; returns (accounts, lost steps)."""
    total, lost = dict.fromkeys(ACCOUNTS, 0.0), 0
    for line in lines:
        lost += line.get("lost_steps", 0)
        for account, seconds in _spent(line).items():
            total[account] += seconds
    return total, lost


MEMORY = 0.95  # decay per step of the moving sums
ENOUGH = 20  # steps before the first warning: early steps wait for workers to start
TOO_MUCH = 0.2  # share of the time spent waiting, above which to warn


class DataStall:
    """Detects training that waits for data. Ranks run in lockstep, so the slowest rank delays all."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._steps, self._warned = 0, 0.0
        self._seconds = self._waited = 0.0  # decayed sums
        self._by_rank: list[float] = []

    def stepped(self, waits: Sequence[float], seconds: float) -> None:
        """Record a step of `seconds`, of which rank r waited ``waits[r]`` for data."""
        self._steps += 1
        self._seconds = MEMORY * self._seconds + seconds
        self._waited = MEMORY * self._waited + max(waits)
        before = self._by_rank or [0.0] * len(waits)
        self._by_rank = [MEMORY * old + new for old, new in zip(before, waits, strict=True)]

    def warning(self) -> str:
        """Return a warning if too much time is spent waiting, and again if it gets much worse; else ""."""
        share = self._waited / max(1e-9, self._seconds)
        if self._steps < ENOUGH or share <= max(TOO_MUCH, 1.5 * self._warned):
            return ""
        self._warned = share
        hungry = max(range(len(self._by_rank)), key=self._by_rank.__getitem__)
        return (
            f"training waits for data {share:.0%} of the time, rank {hungry} the longest: raise data.workers (now "
            f"{self.workers}) as far as each rank has cores, or store the images no larger than the model sees them"
        )
