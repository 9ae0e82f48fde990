"""Why: on a cluster the data, caches and exports belong to several people, on file systems of any kind.

One user must not lock the others out, nor be led by a link to write to a place that only he may write to.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tars import write_set

from hive_scale.config import ModelConfig, PartConfig
from hive_scale.data.bad_samples import BadSampleLog
from hive_scale.data.index import open_index
from hive_scale.data.shard_cache import ShardCache, digest_of
from hive_scale.data.tar_scan import SampleError
from hive_scale.export.huggingface import export_encoder
from hive_scale.model import build
from hive_scale.shared_files import Held, locked, replacing

CACHE = ShardCache(10**9)
GROUP, ANNA, BERT = 4711, 4712, 4713
people = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")

codecs.lookup("utf-8-sig")  # other users may not be able to read Python's own files, which it imports late


def as_user(user: int, do: Callable[..., Any], *arguments: Any, umask: int = 0o022) -> str:
    """What `do` returns, or raises, in a process of that user."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.umask(umask)
            os.setgroups([GROUP])
            os.setgid(GROUP)
            os.setuid(user)
            os.environ["XDG_CACHE_HOME"] = f"{arguments[0]}/cache-{user}"
            told = str(do(*arguments))
        except BaseException as error:
            told = "".join(traceback.format_exception(error))
        os.write(writing, told.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in which everybody of the group may write, on a path that everybody may go."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def opened(folder: Path) -> str:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    index = open_index(shards, CACHE)
    return f"{len(index)} {index.path}"


@people
def test_an_index_that_one_has_made_another_reads_and_makes_anew(shared: Path) -> None:
    (shard,) = write_set(shared, [3])
    first = as_user(ANNA, opened, shared)
    path = next(shared.glob("*.index"))
    assert first == f"3 {path}"
    made = path.stat()
    assert stat.S_IMODE(made.st_mode) == 0o644
    assert as_user(BERT, opened, shared) == first
    assert path.stat().st_ino == made.st_ino, "read, not made again"
    os.utime(shard, ns=(1, 1))
    assert as_user(BERT, opened, shared) == first
    assert path.stat().st_uid == BERT
    path.chmod(0o600)  # as older versions left them
    assert as_user(ANNA, opened, shared) == first
    assert as_user(BERT, opened, shared, umask=0o077) == first


@people
def test_a_folder_that_may_only_be_read_keeps_a_good_index_and_a_stale_one_is_made_in_the_own_cache(
    shared: Path,
) -> None:
    data = shared / "data"
    (shard,) = write_set(data, [3])
    for user in (ANNA, BERT):
        (shared / f"cache-{user}").mkdir(mode=0o777)
        (shared / f"cache-{user}").chmod(0o777)

    def told(folder: Path) -> str:
        return opened(folder / "data")

    made = as_user(ANNA, told, shared)
    assert made.startswith(f"3 {shared}/cache-{ANNA}/")
    path = open_index([shard], CACHE).path  # root may write there
    assert path.parent == data
    assert as_user(BERT, told, shared) == f"3 {path}"
    os.utime(shard, ns=(1, 1))
    assert as_user(BERT, told, shared).startswith(f"3 {shared}/cache-{BERT}/")
    shutil.rmtree(shared / f"cache-{BERT}")
    (shared / f"cache-{BERT}").touch()  # no folder can be made
    assert "set XDG_CACHE_HOME to a folder of yours" in as_user(BERT, told, shared)


@people
@pytest.mark.parametrize("sticky", [False, True])
def test_links_in_a_shared_folder_lead_to_nothing_that_is_emptied(shared: Path, sticky: bool) -> None:
    (shard,) = write_set(shared, [3])
    index = Path(as_user(ANNA, opened, shared).split()[1])
    index.unlink()
    precious = shared / "precious"
    precious.write_text("everything")
    os.chown(precious, ANNA, GROUP)
    if sticky:
        shared.chmod(0o3777)
    lock = shared / f".{index.name}.{ANNA}.lock"
    lock.unlink()
    for name in (lock.name, index.name, f"{lock.name}.soft", f"{index.stem}.lock", f"{index.stem}.tmp"):
        (shared / name).symlink_to(precious)
        os.chown(shared / name, BERT, GROUP, follow_symlinks=False)
    assert as_user(ANNA, opened, shared).startswith("3 ")
    assert precious.read_text() == "everything"
    assert not (shared / index.name).is_symlink() or sticky
    assert Path(shard).exists()


def test_nobody_s_file_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("everything")
    for name in ("lock", "lock.soft", "file"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "lock", 0):
        pass
    with replacing(tmp_path / "file") as part:
        part.write_text("new")
    assert precious.read_text() == "everything"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    with pytest.raises(FileExistsError), replacing(tmp_path / "file") as part:
        part.open("x")
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_an_exported_encoder_is_as_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    model = build.with_full_configs(
        ModelConfig(vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=tiny.language()))
    )
    before = os.umask(umask)
    try:
        weights = dict(build.init_model(model, seed=0).named_parameters())
        export_encoder(model, weights, tmp_path / "encoder", "resize")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "encoder").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}


@people
def test_shards_in_a_cache_of_several_users_are_read_by_all(shared: Path) -> None:
    source = shared / "source.tar"
    source.write_bytes(b"x" * 1000)

    def fetched(folder: Path) -> str:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        return digest_of(CACHE.open(f"file://{folder}/source.tar"))

    first = as_user(ANNA, fetched, shared, umask=0o002)
    assert len(first) == 32
    source.chmod(0o600)  # so that it comes from the cache
    assert as_user(BERT, fetched, shared) == first
    source.chmod(0o644)
    (cached,) = (shared / "hive_scale" / "shards").glob("*.tar")
    cached.unlink()
    assert as_user(BERT, fetched, shared) == first, "the first one's lock is not in the way"


# -------------------------------------------------------------------------------------------- locks


def lacking_locks(patch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", refuse)


def held_by_another(lock: Path, how: str) -> subprocess.Popen[str]:
    """A process that holds `lock` until it is killed, and a forked child of it that outlives it."""
    code = (
        "import errno, fcntl, os, sys, time\n"
        "from pathlib import Path\n"
        "from hive_scale.shared_files import locked\n"
        "def refuse(*_): raise OSError(errno.ENOLCK, 'no locks')\n"
        f"if {how!r} == 'soft': fcntl.flock = refuse\n"
        f"with locked(Path({str(lock)!r})):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(100)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["kernel", "soft"])
def test_a_lock_dies_with_its_process_whatever_that_has_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "soft":
        lacking_locks(monkeypatch, errno.ENOLCK)
    lock = tmp_path / "lock"
    owner = held_by_another(lock, how)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(Held, match=r"^$" if how == "kernel" else r"delete .*lock\.soft"), locked(lock, 0.2):
            pass
        owner.kill()
        owner.wait()
        started = time.monotonic()
        with locked(lock, 30):
            assert time.monotonic() - started < 20
        os.kill(child, 0)  # which is alive, and had no part in it
    finally:
        owner.kill()
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    lacking_locks(monkeypatch, number)
    shards = write_set(tmp_path, [3])
    for _ in range(2):
        index = open_index(shards, CACHE)
        index.path.unlink()
        BadSampleLog(tmp_path / "bad.jsonl", 5).add([SampleError("a", "b", "c")])
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"the file system of {tmp_path} knows no locks" in caplog.text
    with locked(tmp_path / "lock"), pytest.raises(Held), locked(tmp_path / "lock", 0):
        pass
    assert not list(tmp_path.glob("*.soft"))


def test_another_failure_of_a_lock_is_no_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock"):
        pass
