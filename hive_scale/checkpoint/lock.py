"""One run per output directory: two would publish, prune and clean up each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from hive_scale.distributed import World
from hive_scale.pulse import tick
from hive_scale.stops import TryAgain

LOCK = ".lock"


@contextmanager
def locked(directory: Path, world: World, patience: float = 0.0) -> Iterator[None]:
    """Hold `directory` for this run, on all ranks. Raises TryAgain naming the run that holds it already,
    and ValueError if the directory cannot be written.

    `patience` is how many seconds to wait for that one: of a requeued job the old processes may still be dying.

    The lock is the kernel's and dies with its process, so that a killed run leaves nothing to clean up. It is
    a record lock: unlike flock, data workers do not inherit it, and it reaches across nodes on shared disks.
    """
    descriptor = -1
    if world.is_main:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"output={directory} cannot be written ({error.strerror}): choose another") from None
    try:
        owner = _take(descriptor, time.monotonic() + patience) if world.is_main else ""
        if world.sum(bool(owner))[0]:
            raise TryAgain(
                f"{directory} is in use by {owner or 'another run (rank 0 says which)'}: "
                "wait for it, stop it, or choose another output"
            )
        yield
    finally:
        if world.is_main:
            os.close(descriptor)  # and with it the lock


def _take(descriptor: int, deadline: float) -> str:
    """Who holds the lock, or "" now that it is ours."""
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # POSIX allows either
            if time.monotonic() >= deadline:
                owner = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
                return owner or "a run that does not say who it is"
            tick()  # the other ranks wait for this one, which waits on purpose
            time.sleep(0.5)
    owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
    return ""
