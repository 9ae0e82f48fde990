"""Shards that lie elsewhere are fetched whole, once, into a cache that all processes of a machine share.

Reads keep to the few shards of a window (see `order`), so a cache that holds some windows is enough.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import time
from collections.abc import Iterator
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
from hive_scale.data.sources.packages import cache_dir

TRIES = 6
PIECE = 2**20  # bytes read at a time


def is_remote(shard: str) -> bool:
    return "://" in credentials.place(shard)


@dataclass(frozen=True)
class ShardCache:
    """Opens shards, local or remote. Fetched ones take at most `max_bytes` of disk, the least used going first.

    A remote shard is taken to stay as it is; one that changes needs another name.
    """

    max_bytes: int
    pause: float = 0.5  # seconds before the second try, doubled before each further one

    def open(self, shard: str) -> int:
        """A file descriptor on `shard`. Raises OSError for a missing file and for a URL that cannot be fetched."""
        if not is_remote(shard):
            return os.open(credentials.place(shard), os.O_RDONLY)
        folder = cache_dir() / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{xxhash.xxh3_64_hexdigest(credentials.identity(shard).encode())}.tar"
        while True:
            with suppress(FileNotFoundError):  # never fetched, or given up for room
                os.utime(path)
                return os.open(path, os.O_RDONLY)  # stays readable when its name is given up
            with locked(path.with_suffix(".lock")):  # ranks and workers that want the same shard wait for one fetch
                if not path.exists():
                    self._fetch(shard, path)

    def _fetch(self, url: str, path: Path) -> None:
        """Download `url` to `path`, going on from what has come after each failure."""
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        for attempt in range(TRIES):
            try:
                _download(credentials.place(url), part)
                break
            except (ImportError, ValueError) as error:
                told = credentials.hide(f"shard {url} cannot be fetched, or needs another package: {error}")
                raise ValueError(told) from None
            except Exception as error:  # packages that read a store raise what they like, and may tell its secrets
                refused = isinstance(error, HTTPError) and error.code in (401, 403, 404, 410)
                hopeless = refused or isinstance(error, FileNotFoundError | PermissionError)
                may_pass = isinstance(error, OSError | HTTPException) and not hopeless
                if not may_pass or attempt == TRIES - 1:
                    told = credentials.hide(f"shard {url} cannot be fetched ({error or type(error).__name__})")
                    raise OSError(f"{told}: check address and access{_forgotten(error)}") from None
            time.sleep(self.pause * 2**attempt)
        part.replace(path)
        with locked(path.parent / "room.lock"):
            self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        used = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in newest.parent.glob("*.tar"))
        total = sum(size for _, size, _ in used)
        for _, size, path in used:
            if total > self.max_bytes and path != newest:
                path.unlink()
                total -= size


def _download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`. Raises OSError or HTTPException if the connection fails."""
    with part.open("ab") as file:
        with _stream(url, file.tell()) as (stream, start, total):
            file.truncate(start)
            file.seek(start)
            while piece := stream.read(PIECE):
                file.write(piece)
        if total is not None and file.tell() != total:
            raise OSError(f"{file.tell()} of {total} bytes came")


@contextmanager
def _stream(url: str, start: int) -> Iterator[tuple[Any, int, int | None]]:
    """(the bytes of `url` from `start` on, or from 0 if it cannot seek; where they start; the whole's length)."""
    if url.startswith(("http://", "https://")):
        request = _request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
        with urlopen(request, timeout=60) as response:  # nosec B310 # http or https, as was just seen
            start = start if response.status == 206 else 0  # a server without ranges sends all again
            length = response.headers["Content-Length"]
            total = start + int(length) if length else None
            told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
            if told and response.status == 206:
                if int(told[1]) != start:
                    raise OSError(f"asked for what is behind byte {start}, the server sends it from byte {told[1]} on")
                total = total if told[2] == "*" else int(told[2])
            yield response, start, total
    else:
        import fsspec  # s3://, gs:// and others, each with its own package

        address, options = _of_store(url)
        with fsspec.open(address, **options) as file:
            file.seek(start)
            yield file, start, getattr(file, "size", None)


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against all other processes."""
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
