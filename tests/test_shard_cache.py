"""Why: downloads fail halfway; a shard must arrive whole or not at all, and the cache must keep to its size."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

import fsspec
import pytest
import torch
from tars import write_set

from hive_scale.config import DataConfig
from hive_scale.data import shard_cache as caches
from hive_scale.data.index import open_index
from hive_scale.data.loader import Loader
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import ShardReader, expand
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import World
from hive_scale.exit_codes import REFUSED, TRY_AGAIN, TryAgain, code_of


@dataclass
class Remote:
    """Files over HTTP, from a server that can be told to be bad at it."""

    address: str
    files: dict[str, bytes]
    ranges: bool = True
    drop_after: int = 0  # bytes, after which each connection closes
    fail_first: int = 0  # requests answered with 503
    refusal: int = 0  # the code of all answers
    silent: bool = False  # answers nobody
    wrong_range: int = 0  # bytes by which an asked part is off
    short_range: bool = False  # parts are at most 1000 bytes, and say so
    next_version: bytes = b""  # of every file, behind the first request
    requests: list[str] = field(default_factory=list)
    login: str = ""  # what each request must have for Authorization
    redirect: dict[str, str] = field(default_factory=dict)
    authorizations: list[str] = field(default_factory=list)  # what requests had
    authorized: list[str] = field(default_factory=list)  # and which


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Remote]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            if given := self.headers["Authorization"]:
                state.authorizations.append(given)
                state.authorized.append(self.path)
            if self.path in state.redirect:
                self.send_response(302)
                self.send_header("Location", state.redirect[self.path])
                self.end_headers()
                return
            if state.login and given != state.login:
                self.send_error(401)
                return
            content = state.files.get(self.path.lstrip("/"))
            if state.silent:
                time.sleep(0.3)
                return
            if state.refusal:
                self.send_error(state.refusal)
                return
            if state.next_version and len(state.requests) > 1:
                content = state.next_version
            if content is None or len(state.requests) <= state.fail_first:
                self.send_error(404 if content is None else 503)
                return
            total, ranged = len(content), state.ranges and "Range" in self.headers
            start, end = 0, total
            if ranged:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                start, end = int(first) + state.wrong_range, min(total, int(last) + 1 if last else total)
                end = min(end, start + 1000) if state.short_range else end
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{crc32(content)}"')
            if ranged:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[start:end][: state.drop_after or total])

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Remote(f"http://127.0.0.1:{server.server_address[1]}", {})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.01)
        yield state
        server.shutdown()
    server.server_close()


def _read(cache: ShardCache, url: str) -> bytes:
    with os.fdopen(cache.open(url), "rb") as file:
        return file.read()


def _cache(max_bytes: int = 10**9) -> ShardCache:
    return ShardCache(max_bytes, retry_seconds=0.5, pause=0.001)


def test_a_shard_is_fetched_once(remote: Remote) -> None:
    remote.files["a.tar"] = os.urandom(5000)
    for _ in range(2):
        assert _read(_cache(), f"{remote.address}/a.tar") == remote.files["a.tar"]
    assert remote.requests == ["/a.tar"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_goes_on_where_it_broke(remote: Remote, ranges: bool) -> None:
    remote.files["a.tar"] = os.urandom(5000)
    remote.ranges, remote.drop_after = ranges, 1500
    if ranges:
        assert _read(_cache(), f"{remote.address}/a.tar") == remote.files["a.tar"]
        assert len(remote.requests) == 4
    else:  # begins again each time and never gets there, which is said instead of a short shard kept
        with pytest.raises(TryAgain, match="1500 of 5000 bytes"):
            _cache().open(f"{remote.address}/a.tar")
        remote.drop_after = 0
        assert _read(_cache(), f"{remote.address}/a.tar") == remote.files["a.tar"]


def test_a_server_that_sends_another_part_or_less_than_the_whole_is_not_believed(remote: Remote) -> None:
    remote.files["a.tar"], remote.drop_after, remote.wrong_range = os.urandom(5000), 1500, 7
    with pytest.raises(TryAgain, match="asked for what is behind byte 1500, the server sends it from byte 1507 on"):
        _cache().open(f"{remote.address}/a.tar")
    remote.wrong_range, remote.short_range = 0, True  # parts whose own length is right, of a whole that is longer
    assert _read(_cache(), f"{remote.address}/a.tar") == remote.files["a.tar"]


def test_a_shard_is_not_put_together_of_two_versions(remote: Remote) -> None:
    remote.files["a.tar"], remote.next_version, remote.drop_after = b"old" * 1000, b"new" * 1000, 1600
    assert _read(_cache(), f"{remote.address}/a.tar") == b"new" * 1000


def test_a_shard_that_has_changed_since_it_was_indexed_is_not_read(remote: Remote, tmp_path: Path) -> None:
    (local,) = write_set(tmp_path, [4])
    content, url = Path(local).read_bytes(), f"{remote.address}/a.tar"
    remote.files["a.tar"] = content
    index = open_index([url], _cache())
    remote.files["a.tar"] = content.replace(b"w1 ", b"wI ")
    for path in (tmp_path / "cache" / "hive_scale" / "shards").glob("*.tar"):
        path.unlink()
    assert _read(_cache(), url) != content, "another set has fetched it as it is now"
    reader = ShardReader([url], index.stamps, _cache())
    with pytest.raises(OSError, match=r"a.tar is not what it was when it was indexed"):
        reader.read(0, 0, 10)
    remote.files["a.tar"] = content
    assert reader.read(0, 0, 10) == content[:10]


def test_a_shard_that_was_cut_in_the_cache_is_fetched_again(remote: Remote, tmp_path: Path) -> None:
    (local,) = write_set(tmp_path, [4])
    content, url = Path(local).read_bytes(), f"{remote.address}/a.tar"
    remote.files["a.tar"] = content
    index = open_index([url], _cache())
    (cached,) = (tmp_path / "cache" / "hive_scale" / "shards").glob("*.tar")
    for size in (0, 100):
        os.truncate(cached, size)
        reader = ShardReader([url], index.stamps, _cache())
        assert reader.read(0, 0, len(content)) == content
        reader.close()


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(remote: Remote) -> None:
    remote.files["a.tar"], remote.fail_first = b"x" * 100, 3
    assert _read(_cache(), f"{remote.address}/a.tar") == b"x" * 100
    remote.requests.clear()
    remote.fail_first = 0
    with pytest.raises(OSError, match=r"none\.tar cannot be fetched .*404"):
        _cache().open(f"{remote.address}/none.tar")
    assert len(remote.requests) == 1


@pytest.mark.parametrize("bad", [{"fail_first": 10**6}, {"drop_after": 1, "ranges": False}, {"silent": True}])
def test_a_server_that_stays_away_ends_the_run_to_be_tried_again(
    remote: Remote, bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "TIMEOUT", 0.1)
    remote.files["a.tar"] = b"x" * 100
    vars(remote).update(bad)
    began = time.monotonic()
    with pytest.raises(TryAgain, match=r"a\.tar cannot be fetched \(.*, for 0 s: data\.retry_seconds\)") as ended:
        ShardCache(10**9, retry_seconds=0.4, pause=0.1).open(f"{remote.address}/a.tar")
    assert 0.4 <= time.monotonic() - began < 5
    assert 2 <= len(remote.requests) < 30  # it waits longer each time
    assert code_of(ended.value) == TRY_AGAIN
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "hive_scale" / "shards").glob("*.part"))


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_not_asked_for_again_and_says_what_to_do(remote: Remote, code: int) -> None:
    remote.files["a.tar"], remote.refusal = b"x" * 100, code
    with pytest.raises(OSError, match=rf"cannot be fetched .*{code}.*: check address and access") as ended:
        _cache().open(f"{remote.address}/a.tar")
    assert len(remote.requests) == 1
    assert code_of(ended.value) == REFUSED


def test_in_a_worker_it_is_no_bad_sample_but_the_end(remote: Remote, tmp_path: Path) -> None:
    """Else a server's bad day would pass for broken images, all left out."""
    local = write_set(tmp_path / "set", [5, 5])
    remote.files = {Path(shard).name: Path(shard).read_bytes() for shard in local}
    urls = [f"{remote.address}/{Path(shard).name}" for shard in local]
    for workers in (0, 1):
        config = DataConfig(cache_gb=1e-9, retry_seconds=0.2, workers=workers, shuffle_window=1)
        loader = Loader(config, urls, open_tokenizer(config.tokenizer), image_size=8)
        remote.fail_first = 10**6
        with pytest.raises(TryAgain, match=r"cannot be fetched \(.*503") as ended:
            list(loader.once(batch_size=5, world=World(0, 1, torch.device("cpu"))))
        assert "Traceback" not in str(ended.value)
        remote.fail_first = 0


def test_the_cache_gives_up_the_least_used(remote: Remote) -> None:
    remote.files = {f"{name}.tar": name.encode() * 1000 for name in "abc"}
    cache = _cache(2500)
    held = cache.open(f"{remote.address}/a.tar")
    for name in "babcb":  # a is used again before c needs room, so b goes; then b comes back, and a goes
        os.utime(next((Path(os.environ["XDG_CACHE_HOME"]) / "hive_scale" / "shards").glob("*.tar")))
        assert _read(cache, f"{remote.address}/{name}.tar") == name.encode() * 1000
    assert os.pread(held, 3, 0) == b"aaa"  # what is open stays readable
    os.close(held)
    kept = list((Path(os.environ["XDG_CACHE_HOME"]) / "hive_scale" / "shards").glob("*.tar"))
    assert len(kept) == 2


def _fetch(url: str) -> int:
    return len(_read(_cache(), url))


def test_processes_that_want_one_shard_fetch_it_once(remote: Remote) -> None:
    remote.files["a.tar"] = os.urandom(10**6)
    with get_context("fork").Pool(3) as pool:
        assert pool.map(_fetch, [f"{remote.address}/a.tar"] * 3, chunksize=1) == [10**6] * 3
    assert len(remote.requests) == 1


def test_other_protocols_go_through_fsspec(remote: Remote) -> None:
    with fsspec.open("memory://set/a.tar", "wb") as file:
        file.write(b"y" * 3000)
    assert _read(_cache(), "memory://set/a.tar") == b"y" * 3000
    with pytest.raises(ValueError, match=r"needs another package|not known"):
        _cache().open("nosuch://set/a.tar")


def test_an_s3_bucket_is_read_through_its_own_client(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs against a server that speaks as much of S3 as reading takes."""
    pytest.importorskip("s3fs", reason="pip install 'hive_scale[s3]'")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": remote.address})
    remote.files["bucket/a.tar"] = os.urandom(3 * 10**6)
    assert _read(_cache(), "s3://bucket/a.tar") == remote.files["bucket/a.tar"]
    with pytest.raises(OSError, match=r"s3://bucket/none\.tar cannot be fetched"):
        _cache().open("s3://bucket/none.tar")


def test_a_remote_set_gives_the_batches_of_the_local_one(remote: Remote, tmp_path: Path) -> None:
    local = write_set(tmp_path / "set", [5, 4, 6])
    remote.files = {Path(shard).name: Path(shard).read_bytes() for shard in local}
    remote.fail_first = 1
    config = DataConfig(cache_gb=4e-5)  # about two of the three shards
    urls = [f"{remote.address}/set-{{0000..0002}}.tar"]
    assert expand(urls)[0].shards[2] == f"{remote.address}/set-0002.tar"
    keys = []
    for shards in (local, urls):
        loader = Loader(config, shards, open_tokenizer(config.tokenizer), image_size=8)
        steps = loader.steps(global_batch=5, accumulation=1, seed=0, start=0, world=World(0, 1, torch.device("cpu")))
        keys.append([next(steps)[0].keys for _ in range(6)])
    assert keys[0] == keys[1]
