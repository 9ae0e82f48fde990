"""Ends everything that a process has started, however that process ends: by itself, by Ctrl-C, or killed.

Daemons leave their parent and its session, so they cannot be found by descent; but children inherit the environment.
`watch` puts a mark there and starts ``guardian.py PID``, which waits until process PID has ended. Processes that still
bear the mark get a moment to end by themselves, then SIGTERM, and at last SIGKILL.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

MARK = "HIVE_SCALE_STARTED_BY"
MOMENT, MERCY, LIMIT = 2.0, 6.0, 60.0  # seconds to end by oneself, after SIGTERM, and until we give up
QUIET = 0.5  # seconds without any, after which there are none
PROC = Path("/proc")


def watch() -> None:
    """From now on, what this process starts ends with it."""
    os.environ[MARK] = uuid4().hex
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    # in a session of its own, which Ctrl-C does not reach; nobody waits for it
    os.posix_spawn(sys.executable, command, os.environ, file_actions=nothing, setsid=True)


def guard(pid: int, mark: str) -> None:
    """Wait for the end of process `pid`, then end what it leaves."""
    forks: dict[int, str] = {}
    with suppress(ProcessLookupError):  # it has ended already
        ended = select.poll()
        ended.register(os.pidfd_open(pid), select.POLLIN)
        while not ended.poll(1000):
            forks = {child: _start(child) for child in _children(pid)}
    asked: set[int] = set()
    began = seen = time.monotonic()
    # a look may miss what is just being started
    while (now := time.monotonic()) - seen < QUIET and (waited := now - began) < LIMIT:
        for one in {*_left(mark, forks)} - {os.getpid()}:
            seen = now
            with suppress(ProcessLookupError):
                if waited > MOMENT + MERCY:
                    os.kill(one, signal.SIGKILL)
                elif waited > MOMENT and one not in asked:
                    os.kill(one, signal.SIGTERM)
                    asked.add(one)
        time.sleep(0.1)


def _left(mark: str, forks: dict[int, str]) -> Iterator[int]:
    yield from _marked(mark)
    yield from (child for child, start in forks.items() if start and start == _start(child))


def _marked(mark: str) -> Iterator[int]:
    """Processes with `mark` in their environment; one that is dead and not yet waited for has none."""
    wanted = f"{MARK}={mark}".encode()
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                yield int(process.name)


def _children(pid: int) -> Iterator[int]:
    """Those that it has forked show its environment as it was before the mark."""
    for thread in (PROC / str(pid) / "task").glob("*"):
        with suppress(OSError):
            yield from map(int, (thread / "children").read_text().split())


def _start(pid: int) -> str:
    """When a process began, which tells it from a later one of its number; "" for one that is dead."""
    with suppress(OSError):
        state, *rest = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]
    return ""


if __name__ == "__main__":
    guard(int(sys.argv[1]), os.environ[MARK])
