"""Where the time of a stage has gone, over all its restarts: every second is in one account."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hive_scale.phase_timer import OUTSIDE, PhaseTimer

ACCOUNTS = ("steps", "data", "evaluate", "save", "start", "lost", "down")
# the others are of a step
OF_PHASE = {"data": "data", "evaluate": "evaluate", "save": "save"} | dict.fromkeys(OUTSIDE, "start")


class Goodput:
    """Seconds of the stage by account, as each line of metrics.jsonl carries them.

    steps: work that counts; data, evaluate, save: training waited for them; start: from the process's or the former
    stage's end to the first step; lost: work that was done again or left out; down: no process was there.
    """

    def __init__(self, timer: PhaseTimer, lines: Sequence[Mapping[str, Any]] = (), done_steps: int = 0) -> None:
        """`lines` are those of earlier attempts, of which all after `done_steps` have been lost."""
        self.timer = timer
        self.lost_steps = 0
        self._before = dict.fromkeys(ACCOUNTS, 0.0)
        if lines:
            self._before |= _spent(lines[-1])
            self.lost_steps = lines[-1].get("lost_steps", 0)
            self._before["down"] += max(0.0, time.time() - timer.age - lines[-1].get("time", time.time()))
        self._forget(lines, done_steps)

    def rollback(self, lines: Sequence[Mapping[str, Any]], step: int) -> None:
        """What `lines` tell of the steps after `step` was in vain."""
        self._forget(lines, step)

    def skip_batch(self, seconds: float) -> None:
        """So many seconds went into a step that was not taken."""
        self._move(seconds, "lost")
        self.lost_steps += 1

    def held_up(self, seconds: float) -> None:
        """So many seconds of a step this rank waited for another's data."""
        self._move(seconds, "data")

    def line(self) -> dict[str, Any]:
        """What a line of metrics tells, from which the next attempt goes on."""
        spent = {account: round(seconds, 3) for account, seconds in self.spent().items()}
        return {"spent": spent, "lost_steps": self.lost_steps}

    def spent(self) -> dict[str, float]:
        spent = dict(self._before)
        for phase, seconds in self.timer.so_far().items():
            spent[OF_PHASE.get(phase, "steps")] += seconds
        return spent

    def close(self) -> str:
        """What to tell at the stage's last step; what comes after it is the start of the next."""
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
    """The accounts of a line; zeros for those that it lacks, as lines of the first versions do."""
    told = line.get("spent", {})
    return {account: told.get(account, 0.0) for account in ACCOUNTS}


def share(spent: Mapping[str, float]) -> float:
    """Of all the time in `spent`, what went into steps that count."""
    return spent.get("steps", 0.0) / max(sum(spent.values()), 1e-9)


def summary(spent: Mapping[str, float], lost_steps: int) -> str:
    """One line for a person: the share of all time that went into steps that count, and where the rest went."""
    parts = ", ".join(f"{account} {seconds:.0f} s" for account, seconds in spent.items() if seconds >= 0.5)
    return f"goodput {share(spent):.1%} of {sum(spent.values()):.0f} s ({parts}; {lost_steps} steps lost)"


def added(lines: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], int]:
    """The accounts of several stages, by the last line of each, together."""
    total, lost = dict.fromkeys(ACCOUNTS, 0.0), 0
    for line in lines:
        lost += line.get("lost_steps", 0)
        for account, seconds in _spent(line).items():
            total[account] += seconds
    return total, lost


MEMORY = 0.95  # of what is remembered, step by step
ENOUGH = 20  # steps before anything is said: the first ones wait for workers to begin
TOO_MUCH = 0.2  # of the time


class DataStall:
    """Ranks keep step, so whoever waits longest holds up all."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._steps, self._warned = 0, 0.0
        self._seconds = self._waited = 0.0  # remembered
        self._by_rank: list[float] = []

    def stepped(self, waits: Sequence[float], seconds: float) -> None:
        """Note a step of `seconds`, of which rank r has waited ``waits[r]`` for data."""
        self._steps += 1
        self._seconds = MEMORY * self._seconds + seconds
        self._waited = MEMORY * self._waited + max(waits)
        before = self._by_rank or [0.0] * len(waits)
        self._by_rank = [MEMORY * old + new for old, new in zip(before, waits, strict=True)]

    def warning(self) -> str:
        """What to tell the user, once and again if it gets much worse: that too much of the time goes to waiting."""
        share = self._waited / max(1e-9, self._seconds)
        if self._steps < ENOUGH or share <= max(TOO_MUCH, 1.5 * self._warned):
            return ""
        self._warned = share
        hungry = max(range(len(self._by_rank)), key=self._by_rank.__getitem__)
        return (
            f"training waits for data {share:.0%} of the time, rank {hungry} the longest: raise data.workers (now "
            f"{self.workers}) as far as each rank has cores, or store the images no larger than the model sees them"
        )
