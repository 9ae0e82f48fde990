"""A first signal asks the run to stop at the next step edge; a second one stops it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether a signal has come to this process."""

    def __init__(self) -> None:
        self.requested = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True


@contextmanager
def listening() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into a flag while the context lasts."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt._note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
