"""One run per output directory: two would publish, prune and clean up each other's checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from hive_scale import shared_files
from hive_scale.distributed import World
from hive_scale.shared_files import Held

LOCK = ".lock"


@contextmanager
def locked(directory: Path, world: World, patience: float = 0.0) -> Iterator[None]:
    """Hold `directory` for this run, on all ranks. Raises RuntimeError naming the run that holds it already,
    and ValueError if the directory cannot be written.

    `patience` is how many seconds to wait for that one: of a requeued job the old processes may still be dying.

    The lock dies with its process, so that a killed run leaves nothing to clean up; data workers do not hold it, and it
    reaches across nodes on shared disks (see `shared_files.locked`).
    """
    with ExitStack() as stack:
        owner = _take(stack, directory, patience) if world.is_main else ""
        if world.sum(bool(owner))[0]:
            raise RuntimeError(
                f"{directory} is in use by {owner or 'another run (rank 0 says which)'}: "
                "wait for it, stop it, or choose another output"
            )
        yield


def _take(stack: ExitStack, directory: Path, patience: float) -> str:
    """Who holds the lock, or "" now that it is ours, until `stack` is closed."""
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stack.enter_context(shared_files.locked(path, patience))
        _sign(path)
    except Held as held:
        owner = path.read_text(errors="replace").strip() if path.is_file() else ""
        return (owner or "a run that does not say who it is") + (f" ({held})" if str(held) else "")
    except OSError as error:
        raise ValueError(f"output={directory} cannot be written ({error.strerror}): choose another") from None
    return ""


def _sign(path: Path) -> None:
    """Write into the lock who holds it."""
    owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        os.write(descriptor, owner.encode())
    finally:
        os.close(descriptor)
