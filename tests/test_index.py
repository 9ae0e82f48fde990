"""Why: the index is what order, dealing and reading trust; a stale, damaged or wrong one trains on the wrong bytes."""

from __future__ import annotations

import json
import os
import pickle
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from tars import pair, picture_bytes, write_set, write_tar

from hive_scale.commands import prepare_data
from hive_scale.data import index as index_module
from hive_scale.data.cache import ShardCache
from hive_scale.data.index import open_index
from hive_scale.data.scan import scan_shard

CACHE = ShardCache(10**9)


def test_ranges_point_at_the_members_webdataset_sees(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [3, 1, 4])
    index = open_index(shards, CACHE)
    expected = [sample for shard in shards for sample in webdataset.WebDataset(shard, shardshuffle=False)]
    assert len(index) == len(expected) == 8
    assert index.shard_sizes.tolist() == [3, 1, 4]
    for i, sample in enumerate(expected):
        assert index.key(i) == sample["__key__"]
        content = Path(shards[index.shard_of(i)]).read_bytes()
        for member, extension in enumerate(("jpg", "txt", "json")):
            start, length = index.members[i, member]
            assert content[start : start + length] == sample[extension]
        assert index.picture_sizes[i].tolist() == [24, 16]
        assert index.caption_bytes[i] == len(sample["txt"])


def test_is_kept_and_made_again_when_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path, [2, 2])
    first = open_index(shards, CACHE)
    scans: list[str] = []
    monkeypatch.setattr(
        index_module, "scan_shard", lambda shard, cache: scans.append(shard) or scan_shard(shard, cache)
    )
    assert open_index(shards, CACHE).fingerprint == first.fingerprint
    assert not scans
    write_tar(Path(shards[1]), [("new", pair(7))])
    changed = open_index(shards, CACHE)
    assert len(changed) == 3
    assert changed.fingerprint != first.fingerprint
    assert scans


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "version"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path, [2])
    path = open_index(shards, CACHE).path
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 100)
    else:
        monkeypatch.setattr(index_module, "VERSION", index_module.VERSION + 1)
    index = open_index(shards, CACHE)
    assert [index.key(i) for i in range(2)] == ["0-0", "0-1"]


def test_a_set_that_moves_keeps_its_index(tmp_path: Path) -> None:
    index = open_index(write_set(tmp_path / "old", [2]), CACHE)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = open_index([str(tmp_path / "new" / "set-0000.tar")], CACHE)
    assert moved.path.name == index.path.name
    assert len(list((tmp_path / "new").glob("*.index"))) == 1


def test_a_read_only_directory_uses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path / "set", [2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, whom no mode stops
    assert tmp_path / "cache" in open_index(shards, CACHE).path.parents
    assert not list((tmp_path / "set").glob("*.index"))


def test_processes_share_the_work_on_large_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path, [3, 2, 2])
    alone = open_index(shards, CACHE)
    alone.path.unlink()
    monkeypatch.setattr(index_module, "LONG_WORK", 0)
    assert open_index(shards, CACHE).fingerprint == alone.fingerprint


def test_survives_being_sent_to_another_process(tmp_path: Path) -> None:
    index = open_index(write_set(tmp_path, [2]), CACHE)
    assert len(pickle.dumps(index)) < 1000
    assert pickle.loads(pickle.dumps(index)).key(1) == index.key(1)


def test_samples_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = pair(1)
    gif = BytesIO(picture_bytes(format="GIF"))
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("first", good),
            ("no-caption", {"jpg": good["jpg"], "json": b"{}"}),
            ("no-picture", {"txt": b"text"}),
            ("wrong-extension", {"tiff": good["jpg"], "txt": b"text"}),
            ("empty", {"jpg": good["jpg"], "txt": b" \n"}),
            ("latin", {"jpg": good["jpg"], "txt": "café".encode("latin-1")}),
            ("not-a-picture", {"jpg": b"<html>", "txt": b"text"}),
            ("exotic", {"jpg": gif.getvalue(), "txt": b"text"}),
            ("first", good),
            ("last", good),
        ],
    )
    index = open_index([shard], CACHE)
    assert [index.key(i) for i in range(len(index))] == ["first", "last"]
    reasons = {fault.key: fault.reason for fault in index.faults}
    expected = {
        "no-caption": "no caption (.txt)",
        "no-picture": "no picture (.jpg",
        "wrong-extension": "only .tiff",
        "empty": "empty",
        "latin": "UTF-8",
        "not-a-picture": "cannot be opened",
        "exotic": "cannot be opened",
        "first": "duplicate key",
    }
    assert reasons.keys() == expected.keys()
    for key, words in expected.items():
        assert words in reasons[key]


def test_a_tar_cut_short_gives_the_samples_before_the_cut(tmp_path: Path) -> None:
    shard = Path(write_set(tmp_path, [4])[0])
    whole = scan_shard(str(shard), CACHE)
    content = shard.read_bytes()
    for cut_at in (int(whole.members[2, 0, 0]) + 10, int(whole.members[2, 0, 0]) - 100):  # in a picture, in a header
        shard.write_bytes(content[:cut_at])
        table = scan_shard(str(shard), CACHE)
        assert table.keys == ["0-0", "0-1"]
        assert any("cut short" in fault.reason for fault in table.faults)


def test_a_long_prefix_before_the_picture_size_is_read(tmp_path: Path) -> None:
    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=b"Exif\0\0" + b"x" * 60_000)
    table = scan_shard(write_tar(tmp_path / "a.tar", [("k", {"jpg": buffer.getvalue(), "txt": b"t"})]), CACHE)
    assert table.picture_sizes.tolist() == [[30, 20]]


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("k", {"jpg": b"broken", "txt": b"t"})])
    with pytest.raises(ValueError, match=r"no usable sample.*cannot be opened"):
        open_index([shard], CACHE)
    (tmp_path / "b.tar").write_bytes(b"this is no tar")
    with pytest.raises(ValueError, match=r"no usable sample.*cut short or damaged"):
        open_index([str(tmp_path / "b.tar")], CACHE)


def test_the_command_counts_and_lists_the_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_set(tmp_path, [3, 4])
    write_tar(tmp_path / "set-0002.tar", [("mute", {"jpg": picture_bytes()}), ("good", pair(5))])
    faults = tmp_path / "faults.jsonl"
    assert prepare_data.main(["index", f"{tmp_path}/set-*.tar", "--faults", str(faults)]) == 0
    told = capsys.readouterr().out
    assert "8 samples in 3 shards" in told
    assert "24 x 16" in told
    assert "1 x no caption (.txt)" in told
    bars = sum(float(line.split("%")[0].split()[-1]) for line in told.splitlines() if " bytes " in line and "%" in line)
    assert bars == pytest.approx(100, abs=1)
    assert [json.loads(line)["key"] for line in faults.read_text().splitlines()] == ["mute"]
    assert prepare_data.main(["index", shards[0], f"{tmp_path}/set-0009.tar"]) == 2
    assert "set-0009.tar" in capsys.readouterr().err
