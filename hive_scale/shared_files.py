"""Files in folders shared with other users: locks, atomic replacement, permissions according to the umask.

Existing files may belong to others, a link may stand in a file's place, and the file system may have no locks.
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

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # errors of a file system without locks
PRIVATE = stat.S_IFREG | 0o600  # mode of files that safetensors creates
PATIENCE = 10.0  # seconds of waiting for a lock before a warning is logged
logger = logging.getLogger(__name__)


class Held(Exception):
    """Another process holds the lock. The message is the remedy if the lock may be stale, else ""."""


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Hold the lock `path` against all other processes, on all machines that share the disk.

    It is a kernel lock: it ends with its process, forked children do not hold it, and the file stays. On a file
    system without locks, a file PATH.soft that names its owner stands in; if it is stale, the next process of the same
    machine removes it. A link in the place of either file is not followed.

    Args:
        path: the lock file, used for nothing else, in an existing folder.
        patience: seconds to wait for another process; None: no limit, with a warning after `PATIENCE`.

    Raises Held if another process keeps it for longer, OSError if the file cannot be made.
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
    """Path of this user's lock for making `path`: a lock file of another user could not be opened."""
    return path.with_name(f".{path.name}.{os.getuid()}.lock")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file to write; on success it replaces `path` by atomic rename, on an error it is removed.

    A library may replace the yielded file by one of its own. Raises OSError if the file cannot be made.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # random, so that nobody can plant a link there
    mode = _made(part)
    try:
        yield part
        part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def share(folder: Path) -> None:
    """Give files in `folder` that a library made private (mode 0600) the permissions that new files there get."""
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    mode = _made(probe)
    probe.unlink()
    for path in folder.iterdir():
        if path.lstat().st_mode == PRIVATE:
            path.chmod(mode)


def _made(path: Path) -> int:
    """Create the empty file `path`, and return the permissions it got from umask and folder."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)


@cache
def has_locks(folder: Path) -> bool:
    """True if the file system of `folder` supports locks; if not, logs a warning once."""
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
    """Folder for downloads and prepared sets: ``$XDG_CACHE_HOME/hive_scale`` or ``~/.cache/hive_scale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hive_scale"
