"""What asks a run to stop: a signal to any of its processes, or a file STOP in its directory.

The first request is noted, and obeyed by all ranks together at the end of a step. A second signal ends its process
at once. The file is obeyed until somebody removes it, also by a run that begins later.
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
ECHO = 3.0  # seconds in which a signal is the first one again: launchers pass on what the terminal sent already
LOOK = 1.0  # seconds between looks for the file


class Preemption:
    """Whether this process has been asked to stop. `stop_file` is None on all ranks but one."""

    def __init__(self, stop_file: Path | None) -> None:
        self._stop_file = stop_file
        self._signalled: float | None = None
        self._looked = -LOOK
        self._found = False

    def requested(self) -> bool:
        """Whether somebody has asked this run to stop: a signal, or a file STOP."""
        now = time.monotonic()
        if self._stop_file is not None and now - self._looked >= LOOK:
            self._looked = now
            self._found = self._found or self._stop_file.exists()
        return self._found or self._signalled is not None

    def note(self, number: int, _: FrameType | None = None) -> None:
        """Take a signal. Python calls it between two instructions of the main thread."""
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
            say(f"{signal.Signals(number).name}: saving after this step; once more ends it at once")
        elif now - self._signalled > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def listening(run_dir: Path, world: World) -> Iterator[Preemption]:
    """Turn signals, and a file STOP in `run_dir`, into a flag while the context lasts."""
    interrupt = Preemption(run_dir / STOP if world.is_main else None)
    before = {number: signal.signal(number, interrupt.note) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_of_stop(stopped: Stopped, run_dir: Path, world: World) -> int:
    """Say how to go on after `stopped`. A collective. The exit code: HALTED where a file STOP lies in `run_dir`."""
    (halted,) = world.sum(world.is_main and (run_dir / STOP).exists())
    if world.is_main:
        remedy = f"Remove {run_dir / STOP}, and the" if halted else "The"
        console.print(f"{stopped}. {remedy} same command goes on from there.", soft_wrap=True, markup=False)
    return HALTED if halted else TRY_AGAIN
