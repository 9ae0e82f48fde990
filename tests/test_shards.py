"""Why: a wrong name of a set must fail at once with the remedy, and no name may run a command."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import ShardReader, all_shards, expand
from hive_scale.data.tar_scan import scan_shard

CACHE = ShardCache(10**9)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for s in range(3):
        (tmp_path / f"a-{s:04d}.tar").write_bytes(bytes([s]) * 10)
    return tmp_path


def test_paths_ranges_and_globs_name_shards_in_order(directory: Path) -> None:
    names = [f"{directory}/a-{s:04d}.tar" for s in range(3)]
    assert all_shards(expand([f"{directory}/a-{{0000..0002}}.tar"])) == names
    assert all_shards(expand([f"{directory}/a-*.tar"])) == names
    assert all_shards(expand([names[2], names[0]])) == [names[2], names[0]]
    sets = expand([f"2 x {names[0]}", f"0.25 x {directory}/a-000[12].tar"])
    assert [(one.repeats, one.shards) for one in sets] == [(2, names[:1]), (0.25, names[1:])]
    assert all_shards(expand([f"{directory}/a-{{0002,0001}}.tar"])) == [names[2], names[1]]


def test_a_folder_stands_for_its_tars_of_the_split(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tars(pattern: str, split: str = "train") -> list[str]:
        return [Path(shard).name for shard in all_shards(expand([pattern], split))]

    names = [f"a-{s:04d}.tar" for s in range(3)]
    assert tars(str(directory)) == tars(f"{directory}/", "heldout") == names
    assert expand([f"2 x {directory}"])[0].repeats == 2
    mine = directory / "mine [1]"
    mine.mkdir()
    for name in ("train-0.tar", "train-1.tar", "heldout-0.tar", "other.tar", "train-0.txt"):
        (mine / name).write_bytes(b"x")
    assert (tars(str(mine)), tars(str(mine), "heldout")) == (["train-0.tar", "train-1.tar"], ["heldout-0.tar"])
    monkeypatch.setenv("HOME", str(directory))
    assert (tars("~/mine [1]"), tars("~/a-{0000..0001}.tar")) == (["train-0.tar", "train-1.tar"], names[:2])
    (mine / "heldout-0.tar").unlink()
    with pytest.raises(ValueError, match=r"no heldout-\*\.tar in the folder '.*mine \[1\]'"):
        expand([str(mine)], "heldout")
    (directory / "photos").mkdir()
    with pytest.raises(ValueError, match=r"no tars in the folder '.*photos'.*prepare_data\.py"):
        expand([f"{directory}/photos"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0001..0004}.tar", r"a-0003\.tar of .*a-\{0001\.\.0004\}\.tar.* is missing"),
        ("b-*.tar", r"no shard matches .*b-\*\.tar"),
        ("a-{0000,0000}.tar", "named twice"),
    ],
)
def test_what_is_missing_is_named_with_its_pattern(directory: Path, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand([f"{directory}/{pattern}"])


@pytest.mark.parametrize("pattern", ["pipe:touch {}/ran", "pipe: touch {}/ran", "sample:none"])
def test_names_that_are_no_files_are_refused_unused(directory: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"run a command|sample:train"):
        expand([pattern.format(directory)])
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("share", ["1000000000000000000", "9" * 400])
def test_more_repeats_than_can_be_counted_are_refused(directory: Path, share: str) -> None:
    with pytest.raises(ValueError, match="at most 1,000,000"):
        expand([f"{share} x {directory}/a-0001.tar"])


def test_no_shards_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.train"):
        expand([])


def test_reads_ranges_with_few_files_open(directory: Path) -> None:
    shards = all_shards(expand([f"{directory}/a-*.tar"]))
    reader = ShardReader(shards, [scan_shard(shard, CACHE).stamp for shard in shards], CACHE, max_open=2)
    for s in (0, 1, 2, 0, 2, 1, 1):
        assert reader.read(s, 3, 4) == bytes([s]) * 4
        assert len(reader._open) <= 2
    with pytest.raises(ValueError, match="ends at byte 10"):
        reader.read(1, 8, 4)
    assert pickle.loads(pickle.dumps(reader)).read(2, 0, 1) == b"\x02"
    reader.close()
    assert not reader._open


def test_a_shard_that_changes_under_a_run_is_not_read(directory: Path) -> None:
    shard = directory / "a-0000.tar"
    reader = ShardReader([str(shard)], [scan_shard(str(shard), CACHE).stamp], CACHE)
    os.utime(shard, ns=(1, 1))
    assert reader.read(0, 3, 4) == bytes(4), "only touched"
    reader.close()
    shard.write_bytes(b"0123456789")
    with pytest.raises(OSError, match=r"a-0000.tar has changed since it was indexed"):
        reader.read(0, 3, 4)
