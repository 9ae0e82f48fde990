"""Whether training waits for data, on which rank, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 0.95  # of what is remembered, step by step
ENOUGH = 20  # steps before anything is said: the first ones wait for workers to begin
TOO_MUCH = 0.2  # of the time


class Starvation:
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
            f"{self.workers}) as far as each rank has cores, or store the pictures no larger than the model sees them"
        )
