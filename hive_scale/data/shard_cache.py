"""Shards that lie elsewhere are fetched whole, once, into a cache that all processes of a machine share.

Reads keep to the few shards of a window (see `order`), so a cache that holds some windows is enough.
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
TIMEOUT = 60.0  # seconds in which a server says something
LONGEST = 30.0  # seconds between two tries
RETRIED = (408, 429)  # of the answers that blame the one who asks: too slow, too often
logger = logging.getLogger(__name__)
drawn = random.Random()  # nosec B311 # its own, so that waiting moves nobody's random numbers; nothing secret


def is_remote(shard: str) -> bool:
    return "://" in credentials.place(shard)


def digest_of(descriptor: int) -> str:
    """xxh3-128 of a file's bytes, in hex."""
    digest, at = xxhash.xxh3_128(), 0
    while piece := os.pread(descriptor, PIECE, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class ShardCache:
    """Opens shards, local or remote. Fetched ones take at most `max_bytes` of disk, the least used going first.

    A remote shard is taken to stay as it is; one that changes needs another name. Files are named by what is in them,
    so that none stands for another. A shard that does not come is asked for again, until none of it has come for
    `retry_seconds`.
    """

    max_bytes: int
    retry_seconds: float = 300.0
    pause: float = 0.5  # seconds before the second try, at most; doubled before each further one

    def open(self, shard: str, digest: str = "", size: int = 0) -> int:
        """A file descriptor on `shard`, if that is remote on one of that `digest` and `size`, where they are known.

        Raises OSError for a missing file, and for a URL whose server refuses it or that brings something else, TryAgain
        for one that does not come.
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
            with locked(own_lock(stem)):  # ranks and workers that want the same shard wait for one fetch
                if not _kept(stem, digest):
                    self._fetch(shard, stem, digest)

    def _fetch(self, url: str, stem: Path, wanted: str) -> None:
        """Download `url` to `stem`-DIGEST.tar, going on from what has come after each failure."""
        part = stem.with_name(f".{stem.name}.{os.getuid()}.part")
        part.unlink(missing_ok=True)
        part.touch(exist_ok=False)  # not through a link
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
                reason = credentials.hide(str(error) or type(error).__name__)  # which may tell a store's secrets
                if _is_refused(error):
                    message = f"shard {url} cannot be fetched ({reason}): check address and access{_forgotten(error)}"
                    raise OSError(message) from None
                if not _may_pass(error):
                    raise
                if part.exists() and part.stat().st_size > furthest:  # it comes, if in pieces
                    furthest, ends, pause = part.stat().st_size, time.monotonic() + self.retry_seconds, self.pause
                if time.monotonic() >= ends:
                    waited = f"{reason}, for {self.retry_seconds:.0f} s: data.retry_seconds"
                    raise TryAgain(f"shard {url} cannot be fetched ({waited})") from None
                if not warned:
                    logger.warning("shard %s does not come (%s): it is asked for again", url, reason)
                    warned = True
            tick()
            # at a random time, so that those who failed together do not all come back together
            time.sleep(drawn.uniform(0.0, pause))
            pause = min(LONGEST, 2 * pause)

    def _make_room(self, newest: Path) -> None:
        used = sorted(_sizes(newest.parent.glob("*.tar")))
        total = sum(size for _, size, _ in used)
        for _, size, path in used:
            if total > self.max_bytes and path != newest:
                with suppress(OSError):  # another user's, or gone by now
                    path.unlink()
                    total -= size


def _kept(stem: Path, digest: str) -> list[Path]:
    """The files that hold the shard of `stem`, the latest first; of older versions' none, which do not say what."""
    found = stem.parent.glob(f"{stem.name}-{digest or '*'}.tar")
    return [path for *_, path in sorted(_sizes(found), reverse=True)]


def _sizes(paths: Iterable[Path]) -> Iterator[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of those that are still there: another user may share the folder."""
    for path in paths:
        with suppress(FileNotFoundError):
            found = path.stat()
            yield found.st_mtime, found.st_size, path


def _is_refused(error: Exception) -> bool:
    """Whether asking again would be in vain."""
    if isinstance(error, HTTPError):
        return 400 <= error.code < 500 and error.code not in RETRIED
    return isinstance(error, FileNotFoundError | PermissionError)


def _may_pass(error: Exception) -> bool:
    """Whether it is the network's error, or of a client package, such as s3fs, whose errors are its own."""
    if isinstance(error, OSError):
        return error.errno not in FULL
    return isinstance(error, HTTPException) or type(error).__module__ != "builtins"


def _append(url: str, part: Path, versions: set[str]) -> None:
    """Append to `part` what it lacks of `url`, all of one version: `versions` are the ETags of what it has.

    Raises OSError or HTTPException if the connection fails.
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
    """(the bytes of `url` from `start` on, or from 0 if it cannot seek; where they start; the whole's length; ETag)."""
    if url.startswith(("http://", "https://")):
        request = _request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
        with urlopen(request, timeout=TIMEOUT) as response:  # nosec B310 # http or https, as was just seen
            start = start if response.status == 206 else 0  # a server without ranges sends all again
            length = response.headers["Content-Length"]
            total = start + int(length) if length else None
            told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
            if told and response.status == 206:
                if int(told[1]) != start:
                    raise OSError(f"asked for what is behind byte {start}, the server sends it from byte {told[1]} on")
                total = total if told[2] == "*" else int(told[2])
            yield response, start, total, response.headers["ETag"] or ""
    else:
        import fsspec  # s3://, gs:// and others, each with its own package

        address, options = _of_store(url)
        with fsspec.open(address, **options) as file:
            file.seek(start)
            yield file, start, getattr(file, "size", None), ""


def _request(url: str) -> Request:
    """A request for `url`, whose user and password go into a header, and not to where it may be redirected."""
    address, user, password = _split(url)
    request = Request(address)
    if user or password:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _of_store(url: str) -> tuple[str, dict[str, str]]:
    """(address, options) for fsspec, whose S3 takes no key and secret in the address."""
    if not url.startswith(("s3://", "s3a://")):
        return url, {}
    address, key, secret = _split(url)
    return address, {"key": key, "secret": secret} if key else {}


def _split(url: str) -> tuple[str, str, str]:
    """(`url` without them, user, password)."""
    given = credentials.USER.search(url)
    if not given:
        return url, "", ""
    user, _, password = given[0][:-1].partition(":")
    return url[: given.start()] + url[given.end() :], unquote(user), unquote(password)


def _forgotten(error: Exception) -> str:
    is_refused = isinstance(error, PermissionError) or (isinstance(error, HTTPError) and error.code in (401, 403))
    return "; credentials are in no saved config: the command gives them each time" if is_refused else ""
