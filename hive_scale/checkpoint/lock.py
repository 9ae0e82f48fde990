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
from hive_scale.rundir import LOCK


@contextmanager
def locked(directory: Path, world: World, patience: float = 0.0) -> Iterator[Lock]:
    """Hold `directory` for this run, on all ranks. Raises RuntimeError naming the run that holds it already,
    and ValueError if the directory cannot be written.

    `patience` is how many seconds to wait for that one: of a requeued job the old processes may still be dying.

    The lock is the kernel's and dies with its process, so that a killed run leaves nothing to clean up. It is
    a record lock: unlike flock, data workers do not inherit it, and it reaches across nodes on shared disks.
    """
    lock = Lock(directory)
    try:
        owner = lock.take(patience) if world.is_main else ""
        if world.sum(bool(owner))[0]:
            raise RuntimeError(
                f"{directory} is in use by {owner or 'another run (rank 0 says which)'}: "
                "wait for it, stop it, or choose another output"
            )
        yield lock
    finally:
        lock.release()


class Lock:
    """The lock on `directory`, which the main rank alone takes."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._path = directory, directory / LOCK
        self._held: list[int] = []
        self._made: list[Path] = []  # what is to go again unless the run stays: innermost first

    def take(self, patience: float = 0.0) -> str:
        """Who holds the directory, or "" now that this process does. Makes it where there is none.

        Once more after it was moved away: then the one that has come in its place. Raises ValueError.
        """
        deadline = time.monotonic() + patience
        while True:
            descriptor = self._open()
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # POSIX allows either
                owner = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
                os.close(descriptor)
                if time.monotonic() >= deadline:
                    return owner or "a run that does not say who it is"
                time.sleep(0.5)
                continue
            if self._is_ours(descriptor):
                break
            os.close(descriptor)  # of a start that has given up, or a run that was moved away, since it was opened
        if not os.fstat(descriptor).st_size:  # nobody has held it before
            self._made.insert(0, self._path)
        self._held.append(descriptor)
        owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        return ""

    def stay(self) -> None:
        """The run has begun: what was made for it is not to go again."""
        self._made.clear()

    def release(self) -> None:
        """Let go; of a run that has not begun leave nothing that was not there before."""
        for path in self._made:
            with suppress(OSError):  # somebody has put something into a directory
                path.rmdir() if path.is_dir() else path.unlink()
        for descriptor in self._held:
            os.close(descriptor)  # and with it the lock
        self._held.clear()

    def _open(self) -> int:
        while True:
            try:
                if self._path.is_symlink():
                    raise ValueError(f"{self._path} is a link, and would be written through: remove it")
                self._make()
                return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # another start that made the directory, too, has just given up
                continue
            except OSError as error:
                text = f"output={self.directory} cannot be written ({error.strerror}): choose another"
                raise ValueError(text) from None

    def _make(self) -> None:
        real = self.directory.resolve()  # a link may lead to a folder that is gone, from a scratch disk perhaps
        missing = [place for place in (real, *real.parents) if not place.exists()]
        real.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _is_ours(self, descriptor: int) -> bool:
        """Whether the file that is open is still the one in the directory."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path, follow_symlinks=False))
        except OSError:
            return False
