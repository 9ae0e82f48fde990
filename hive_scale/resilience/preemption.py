"""Preemption: a signal to any process, or a file STOP in the run directory, asks the run to save and stop.

All ranks act on the first request together, at the end of a step. A second signal ends its process at once. A file
STOP stays in force until it is removed, also for runs that start later.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hive_scale.distributed import World
from hive_scale.exit_codes import HALTED, TRY_AGAIN, Stopped, say
from hive_scale.observability.console import console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP = "STOP"
ECHO = 3.0  # seconds during which a repeated signal counts as the same: launchers forward what the terminal sent, too
LOOK = 1.0  # seconds between checks for the file


class Preemption:
    """Stop requests to this process. `stop_file` is checked on rank 0 only, and None on other ranks."""

    def __init__(self, stop_file: Path | None) -> None:
        self._stop_file = stop_file
        self._signalled: float | None = None
        self._looked = -LOOK
        self._found = False

    def request(self) -> None:
        """Ask this run to save and stop, as a signal to this process does."""
        self._signalled = self._signalled or time.monotonic()

    def requested(self) -> bool:
        """True if this process got a signal or a `request`, or found the file STOP."""
        now = time.monotonic()
        if self._stop_file is not None and now - self._looked >= LOOK:
            self._looked = now
            self._found = self._found or self._stop_file.exists()
        return self._found or self._signalled is not None

    def note(self, number: int, _: FrameType | None = None) -> None:
        """Signal handler: note the first request; a later one ends the process. Runs in the main thread."""
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
            say(f"{signal.Signals(number).name}: saving after this step; once more ends it at once")
        elif now - self._signalled > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def listening(run_dir: Path, world: World) -> Iterator[Preemption]:
    """Context in which signals, and a file STOP in `run_dir`, set a flag instead of ending the process."""
    interrupt = Preemption(run_dir / STOP if world.is_main else None)
    before = {number: signal.signal(number, interrupt.note) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_of_stop(stopped: Stopped, run_dir: Path, world: World) -> int:
    """Print how to resume after `stopped`. A collective. Returns the exit code: HALTED if a file STOP is there."""
    (halted,) = world.sum(world.is_main and (run_dir / STOP).exists())
    if world.is_main:
        remedy = f"Remove {run_dir / STOP}, and the" if halted else "The"
        console.print(f"{stopped}. {remedy} same command goes on from there.", soft_wrap=True, markup=False)
    return HALTED if halted else TRY_AGAIN
