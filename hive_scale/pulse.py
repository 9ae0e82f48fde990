"""What this process is doing right now, and how long it has been at each kind of thing."""

from __future__ import annotations

import time


class Pulse:
    """Written by whoever does the work, read by the hang watch and by the account of time.

    Phases are: start, data, forward, backward, reduce (with waiting for the other ranks), update, evaluate, save.
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
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def so_far(self) -> dict[str, float]:
        """Seconds by phase since the account began, the present one included."""
        now = time.monotonic() - self.since
        return self.seconds | {self.phase: self.seconds.get(self.phase, 0.0) + now}
