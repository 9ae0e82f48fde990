"""Disk cache of remote shards: each is downloaded whole, once, and shared by all processes of a machine.

Reads stay within the few shards of a shuffle window (see `sampler`), so a cache that holds a few windows is enough.
"""

from __future__ import annotations

import base64
import logging
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request, urlopen

import xxhash

from hive_scale import credentials
from hive_scale.exit_codes import FULL, TryAgain
from hive_scale.phase_timer import tick
from hive_scale.shared_files import cache_dir, locked, own_lock

PIECE = 2**20  # bytes read at a time
TIMEOUT = 60.0  # seconds without data after which a connection fails
LONGEST = 30.0  # seconds, the longest pause between two tries
RETRIED = (408, 429)  # 4xx answers worth a retry: request timeout, too many requests
logger = logging.getLogger(__name__)
drawn = random.Random()  # nosec B311 # separate, so that retries do not advance global random state; nothing secret


def is_remote(shard: str) -> bool:
    """True if `shard` is a URL rather than a path."""
    return "://" in credentials.place(shard)


def digest_of(descriptor: int) -> str:
    """Return the xxh3-128 of a file's bytes, in hex."""
    digest, at = xxhash.xxh3_128(), 0
    while piece := os.pread(descriptor, PIECE, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class ShardCache:
    """Opens shards, local or remote. Downloads take at most `max_bytes` of disk; the least recently used go first.

    A remote shard is assumed immutable: changed content needs a new name. Cached files are named by their content's
    digest, so one cannot be mistaken for another. A failed download is retried until no new bytes have arrived for
    `retry_seconds`.
    """

    max_bytes: int
    retry_seconds: float = 300.0
    pause: float = 0.5  # seconds, upper bound of the wait before the second try; doubled for each further try

    def open(self, shard: str, digest: str = "", size: int = 0) -> int:
        """A file descriptor on `shard`, if that is remote on one of that `digest` and `size`, where they are known.

        Raises OSError for a missing file, and for a URL that the server refuses or whose content does not match.
        Raises TryAgain if the server does not deliver within `retry_seconds`.
        """
        if not is_remote(shard):
            return os.open(credentials.place(shard), os.O_RDONLY)
        stem = cache_dir() / "shards" / xxhash.xxh3_64_hexdigest(credentials.identity(shard).encode())
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            return self._open_fetched(shard, stem, digest, size)
        except PermissionError as error:
            raise OSError(f"shard {shard}: {error}: set XDG_CACHE_HOME to a folder of yours") from None

    def _open_fetched(self, shard: str, stem: Path, digest: str, size: int) -> int:
        while True:
            for path in _kept(stem, digest):
                with suppress(FileNotFoundError):  # given up for room
                    descriptor = os.open(path, os.O_RDONLY)  # stays readable when its name is given up
                    if size and os.fstat(descriptor).st_size != size:  # cut by a failing disk: fetched again
                        os.close(descriptor)
                        logger.warning("%s is damaged, and fetched again", path)
                        path.unlink()
                        continue
                    with suppress(PermissionError, FileNotFoundError):  # another user's
                        os.utime(path)
                    return descriptor
            with locked(own_lock(stem)):  # ranks and workers that need the same shard wait for one download
                if not _kept(stem, digest):
                    self._fetch(shard, stem, digest)

    def _fetch(self, url: str, stem: Path, wanted: str) -> None:
        """Download `url` to `stem`-DIGEST.tar; after a failure, continue from the bytes already received."""
        part = stem.with_name(f".{stem.name}.{os.getuid()}.part")
        part.unlink(missing_ok=True)
        part.touch(exist_ok=False)  # refuses to follow a link
        try:
            self._download(url, part)
            with part.open("rb") as file:
                digest = digest_of(file.fileno())
                os.fsync(file.fileno())  # the name promises the content, after a power cut, too
            if wanted not in ("", digest):
                raise OSError(
                    f"shard {url} is not what it was when it was indexed: restore it, or give the new one another name"
                )
            path = stem.with_name(f"{stem.name}-{digest}.tar")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        with locked(own_lock(path.with_name("room"))):
            self._make_room(path)

    def _download(self, url: str, part: Path) -> None:
        versions = set[str]()
        furthest, ends, pause, warned = 0, time.monotonic() + self.retry_seconds, self.pause, False
        while True:
            try:
                return _append(credentials.place(url), part, versions)
            except (ImportError, ValueError) as error:
                told = credentials.hide(f"shard {url} cannot be fetched, or needs another package: {error}")
                raise ValueError(told) from None
            except Exception as error:
                reason = credentials.hide(str(error) or type(error).__name__)  # may contain credentials
                if _is_refused(error):
                    message = f"shard {url} cannot be fetched ({reason}): check address and access{_forgotten(error)}"
                    raise OSError(message) from None
                if not _may_pass(error):
                    raise
                if part.exists() and part.stat().st_size > furthest:  # progress was made: restart the clock
                    furthest, ends, pause = part.stat().st_size, time.monotonic() + self.retry_seconds, self.pause
                if time.monotonic() >= ends:
                    waited = f"{reason}, for {self.retry_seconds:.0f} s: data.retry_seconds"
                    raise TryAgain(f"shard {url} cannot be fetched ({waited})") from None
                if not warned:
                    logger.warning("shard %s does not come (%s): it is asked for again", url, reason)
                    warned = True
            tick()
            # random jitter, so that clients that failed together do not all retry together
            time.sleep(drawn.uniform(0.0, pause))
            pause = min(LONGEST, 2 * pause)

    def _make_room(self, newest: Path) -> None:
        used = sorted(_sizes(newest.parent.glob("*.tar")))
        total = sum(size for _, size, _ in used)
        for _, size, path in used:
            if total > self.max_bytes and path != newest:
                with suppress(OSError):  # another user's file, or already deleted
                    path.unlink()
                    total -= size


def _kept(stem: Path, digest: str) -> list[Path]:
    """Return the cached files of `stem`, most recently used first. Names without a digest (older versions) do not
    match.
    """
    found = stem.parent.glob(f"{stem.name}-{digest or '*'}.tar")
    return [path for *_, path in sorted(_sizes(found), reverse=True)]


def _sizes(paths: Iterable[Path]) -> Iterator[tuple[float, int, Path]]:
    """Yield (time of last use, bytes, path) of the files that still exist: another process may delete some."""
    for path in paths:
        with suppress(FileNotFoundError):
            found = path.stat()
            yield found.st_mtime, found.st_size, path


def _is_refused(error: Exception) -> bool:
    """True if a retry cannot succeed."""
    if isinstance(error, HTTPError):
        return 400 <= error.code < 500 and error.code not in RETRIED
    return isinstance(error, FileNotFoundError | PermissionError)


def _may_pass(error: Exception) -> bool:
    """True if `error` may be temporary: a network error, or a client package's own type, such as s3fs's."""
    if isinstance(error, OSError):
        return error.errno not in FULL
    return isinstance(error, HTTPException) or type(error).__module__ != "builtins"


def _append(url: str, part: Path, versions: set[str]) -> None:
    """Append the missing bytes of `url` to `part`. `versions` holds the ETag of the bytes already there.

    Raises OSError or HTTPException if the connection fails. If the shard has changed meanwhile, empties `part` and
    raises OSError.
    """
    with part.open("ab") as file:
        with _stream(url, file.tell()) as (stream, start, total, version):
            file.truncate(start)
            file.seek(start)
            if start and versions and version not in versions:
                file.truncate(0)
                raise OSError("it has changed while it was fetched")
            versions.clear()
            versions.update({version} - {""})
            while piece := stream.read(PIECE):
                file.write(piece)
                tick()
        if total is not None and file.tell() != total:
            raise OSError(f"{file.tell()} of {total} bytes came")


@contextmanager
def _stream(url: str, start: int) -> Iterator[tuple[Any, int, int | None, str]]:
    """Yield (stream, start, total length, ETag) of `url` from byte `start`, or from 0 if the server cannot seek."""
    if url.startswith(("http://", "https://")):
        request = _request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
        with urlopen(request, timeout=TIMEOUT) as response:  # nosec B310 # http or https, as was just seen
            start = start if response.status == 206 else 0  # a server without range support sends everything again
            length = response.headers["Content-Length"]
            total = start + int(length) if length else None
            told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
            if told and response.status == 206:
                if int(told[1]) != start:
                    raise OSError(f"asked for what is behind byte {start}, the server sends it from byte {told[1]} on")
                total = total if told[2] == "*" else int(told[2])
            yield response, start, total, response.headers["ETag"] or ""
    else:
        import fsspec  # for s3://, gs:// and others, each of which needs its own package

        address, options = _of_store(url)
        with fsspec.open(address, **options) as file:
            file.seek(start)
            yield file, start, getattr(file, "size", None), ""


def _request(url: str) -> Request:
    """Return a request for `url`. User and password go into a header that is not forwarded on a redirect."""
    address, user, password = _split(url)
    request = Request(address)
    if user or password:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _of_store(url: str) -> tuple[str, dict[str, str]]:
    """Return (address, options) for fsspec, whose S3 file system takes no credentials in the address."""
    if not url.startswith(("s3://", "s3a://")):
        return url, {}
    address, key, secret = _split(url)
    return address, {"key": key, "secret": secret} if key else {}


def _split(url: str) -> tuple[str, str, str]:
    """Return (`url` without credentials, user, password)."""
    given = credentials.USER.search(url)
    if not given:
        return url, "", ""
    user, _, password = given[0][:-1].partition(":")
    return url[: given.start()] + url[given.end() :], unquote(user), unquote(password)


def _forgotten(error: Exception) -> str:
    is_refused = isinstance(error, PermissionError) or (isinstance(error, HTTPError) and error.code in (401, 403))
    return "; credentials are in no saved config: the command gives them each time" if is_refused else ""
