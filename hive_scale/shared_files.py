"""Files in folders that others use too: one lock, whole files, permissions as the umask has them.

Others may own what is there, may have put a link in its place, and the file system may know no locks.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # what a file system without locks answers
PRIVATE = stat.S_IFREG | 0o600  # as safetensors makes files
PATIENCE = 10.0  # seconds after which a process that waits for a lock says so
logger = logging.getLogger(__name__)


class Held(Exception):
    """Another process holds the lock. The message is the remedy where it may be left of one that was killed, or ""."""


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Hold the lock `path` against all other processes, also of other machines that share the disk.

    The lock is the kernel's: it dies with its process, whose forked children do not hold it, and the file stays. On
    a file system without locks a file PATH.soft stands for it, which says whose it is; one that a killed process has
    left is removed by the next process of the same machine. A link in the place of either is not followed.

    Args:
        path: of a file for this alone, in a folder that is there.
        patience: seconds to wait for another process; None: as long as it takes, which is said.

    Raises Held if another process has it for longer, OSError if there can be no such file.
    """
    soft = Path(f"{path}.soft")
    lock: BaseFileLock = FileLock(path) if has_locks(path.parent) else SoftFileLock(soft)
    remedy = f"if that process is gone, delete {soft}" if isinstance(lock, SoftFileLock) else ""
    try:
        lock.acquire(timeout=PATIENCE if patience is None else patience)
    except Timeout:
        if patience is not None:
            raise Held(remedy) from None
        logger.warning("waiting for the process that holds %s%s", lock.lock_file, remedy and f": {remedy}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def own_lock(path: Path) -> Path:
    """The lock for what becomes `path` that belongs to this user: another's could not be opened."""
    return path.with_name(f".{path.name}.{os.getuid()}.lock")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to fill, which becomes `path` at the end: complete or absent.

    It may be written by a library that makes a file of its own in its place. Raises OSError if there can be none.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # a name that nobody can have put a link at
    mode = _made(part)
    try:
        yield part
        part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def share(folder: Path) -> None:
    """Give what a library has made in `folder` for this user alone the permissions of any new file there."""
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    mode = _made(probe)
    probe.unlink()
    for path in folder.iterdir():
        if path.lstat().st_mode == PRIVATE:
            path.chmod(mode)


def _made(path: Path) -> int:
    """The permissions of the new, empty file `path`: as umask and folder have them, which no function tells."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)


@cache
def has_locks(folder: Path) -> bool:
    """Whether the file system of `folder` knows locks; that it does not is said once."""
    with TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s knows no locks (%s): files stand for them, and one left by a machine that "
                "died must be deleted by hand",
                *(folder, error.strerror),
            )
            return False
    return True


def cache_dir() -> Path:
    """Where downloads and prepared sets are kept: ``$XDG_CACHE_HOME/hive_scale`` or ``~/.cache/hive_scale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hive_scale"
