"""Lock on a run directory: two runs in one directory would overwrite and delete each other's checkpoints."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from hive_scale import shared_files
from hive_scale.distributed import World
from hive_scale.exit_codes import TryAgain
from hive_scale.phase_timer import tick
from hive_scale.placement import ranks_of
from hive_scale.rundir import LOCK
from hive_scale.shared_files import Held

SEEN = 60.0  # seconds in which all ranks see a new file: as long as NFS may believe that there is none


@contextmanager
def locked(directory: Path, world: World, patience: float = 0.0) -> Iterator[Lock]:
    """Hold `directory` for this run, on all ranks. Raises TryAgain naming the run that holds it already,
    and ValueError if the directory cannot be written, or is not the same one on all nodes.

    `patience` is how many seconds to wait for another holder: after a requeue, the old processes may still be exiting.
    The lock ends with its process, so a killed run leaves nothing to clean up. Data workers do not hold it, and it
    works across nodes on shared disks (see `shared_files.locked`).

    Raises TryAgain that names the run that holds the lock, and ValueError if the directory cannot be written.
    """
    lock = Lock(directory)
    try:
        owner = lock.take(patience) if world.is_main else ""
        if world.sum(bool(owner))[0]:
            raise TryAgain(
                f"{directory} is in use by {owner or 'another run (rank 0 says which)'}: "
                "wait for it, stop it, or choose another output"
            )
        _check_shared(lock, world)
        yield lock
    finally:
        lock.release()


def _check_shared(lock: Lock, world: World) -> None:
    """See that all ranks find what the main rank has just signed. A collective. Raises ValueError."""
    signed, began = world.of_main(lock.owner()), time.monotonic()
    while lock.owner() != signed and time.monotonic() - began < SEEN:
        tick()
        time.sleep(0.1)
    blind = world.sum(*(rank == world.rank and lock.owner() != signed for rank in range(world.size)))
    if ranks := [rank for rank, count in enumerate(blind) if count]:
        raise ValueError(
            f"{lock.directory} is not one directory for all: {ranks_of(ranks)} cannot see there what rank 0 has "
            "written: give one of a file system that all nodes share (python -m hive_scale doctor --dir looks at it)"
        )


class Lock:
    """The lock on `directory`. Only rank 0 takes it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._path = directory, directory / LOCK
        self._held = ExitStack()
        self._made: list[Path] = []  # paths to remove again unless the run starts, innermost first

    def take(self, patience: float = 0.0) -> str:
        """Take the lock. Returns "", or who holds it. Creates the directory if it does not exist.

        Called again after the directory was moved away, it locks the new one in its place. Raises ValueError.
        """
        while True:
            try:
                if self._path.is_symlink():
                    raise ValueError(f"{self._path} is a link, and would be written through: remove it")
                self._make()
                with ExitStack() as stack:
                    stack.enter_context(shared_files.locked(self._path, patience))
                    self._sign()
                    self._held.enter_context(stack.pop_all())
                return ""
            except Held as held:
                owner = self.owner() or "a run that does not say who it is"
                return owner + (f" ({held})" if str(held) else "")
            except FileNotFoundError:  # of another start that has just given up, and has removed what it made
                continue
            except OSError as error:
                text = f"output={self.directory} cannot be written ({error.strerror}): choose another"
                raise ValueError(text) from None

    def owner(self) -> str:
        """Who has signed the lock, "" where nobody has, or where it cannot be seen."""
        try:
            return self._path.read_text(errors="replace").strip()
        except OSError:
            return ""

    def stay(self) -> None:
        """Keep what was created for the run: it has started."""
        self._made.clear()

    def release(self) -> None:
        """Release the lock; if the run has not started, remove what was created for it."""
        for path in self._made:
            with suppress(OSError):  # a directory that is no longer empty stays
                path.rmdir() if path.is_dir() else path.unlink()
        self._held.close()

    def _make(self) -> None:
        real = self.directory.resolve()  # resolved: it may be a link whose target was deleted, as on a scratch disk
        missing = [place for place in (real, *real.parents) if not place.exists()]
        real.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _sign(self) -> None:
        """Write the holder into the lock file. Raises FileNotFoundError if a start that gave up has removed it."""
        owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        soft = Path(f"{self._path}.soft").exists()  # stands in for the lock on disks without locks
        create = os.O_CREAT if soft else 0
        descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | create, 0o666)
        try:
            if not os.fstat(descriptor).st_size:  # empty: new, so it is removed again if the run does not start
                self._made.insert(0, self._path)
            with suppress(OSError):  # on a full disk the lock works without a name
                os.ftruncate(descriptor, 0)
                os.write(descriptor, owner.encode())
        finally:
            os.close(descriptor)
