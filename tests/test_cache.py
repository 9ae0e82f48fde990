"""Why: networks fail halfway; a shard must arrive whole or not at all, and the cache must keep to its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
import torch
from tars import write_set

from hive_scale.config import DataConfig
from hive_scale.data.cache import ShardCache
from hive_scale.data.loader import Loader
from hive_scale.data.shards import expand
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import World


@dataclass
class Remote:
    """Files over HTTP, from a server that can be told to be bad at it."""

    address: str
    files: dict[str, bytes]
    ranges: bool = True
    drop_after: int = 0  # bytes, after which each connection closes
    fail_first: int = 0  # requests answered with 503
    wrong_range: int = 0  # bytes by which an asked part is off
    short_range: bool = False  # parts are at most 1000 bytes, and say so
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
    return ShardCache(max_bytes, pause=0.001)


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
        with pytest.raises(OSError, match="1500 of 5000 bytes"):
            _cache().open(f"{remote.address}/a.tar")
        remote.drop_after = 0
        assert _read(_cache(), f"{remote.address}/a.tar") == remote.files["a.tar"]


def test_a_server_that_sends_another_part_or_less_than_the_whole_is_not_believed(remote: Remote) -> None:
    remote.files["a.tar"], remote.drop_after, remote.wrong_range = os.urandom(5000), 1500, 7
    with pytest.raises(OSError, match="asked for what is behind byte 1500, the server sends it from byte 1507 on"):
        _cache().open(f"{remote.address}/a.tar")
    remote.wrong_range, remote.short_range = 0, True  # parts whose own length is right, of a whole that is longer
    assert _read(_cache(), f"{remote.address}/a.tar") == remote.files["a.tar"]


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(remote: Remote) -> None:
    remote.files["a.tar"], remote.fail_first = b"x" * 100, 3
    assert _read(_cache(), f"{remote.address}/a.tar") == b"x" * 100
    remote.requests.clear()
    remote.fail_first = 0
    with pytest.raises(OSError, match=r"none\.tar cannot be fetched .*404"):
        _cache().open(f"{remote.address}/none.tar")
    assert len(remote.requests) == 1


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
