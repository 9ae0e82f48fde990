"""Why: order, split and reading rely on the index; a stale, damaged or wrong one trains on the wrong bytes."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import image_bytes, pair, write_set, write_tar

from hive_scale.commands import prepare_data
from hive_scale.data import index as index_module
from hive_scale.data.index import open_index
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.tar_scan import scan_shard

CACHE = ShardCache(10**9)
KEYS = [f"0-{i}" for i in range(6)]


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
        assert index.image_sizes[i].tolist() == [24, 16]
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


def test_other_bytes_of_equal_length_are_another_set_and_a_touched_shard_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_set(tmp_path, [3, 3])
    first, content = open_index(shards, CACHE), Path(shards[1]).read_bytes()
    scans: list[str] = []
    monkeypatch.setattr(
        index_module, "scan_shard", lambda shard, cache: scans.append(shard) or scan_shard(shard, cache)
    )
    os.utime(shards[1], ns=(1, 1))
    touched = open_index(shards, CACHE)
    assert touched.fingerprint == first.fingerprint
    assert scans == [shards[1]], "the other one is as it was"
    assert [touched.key(i) for i in range(6)] == [first.key(i) for i in range(6)]
    assert (touched.members == first.members).all()
    for old, new in ((b"w100 ", b"w1OO "), (b"JFIF", b"jfif")):  # a caption, an image
        assert old in content
        Path(shards[1]).write_bytes(content.replace(old, new, 1))
        changed = open_index(shards, CACHE)
        assert changed.layout == first.layout, "every sample lies where it lay"
        assert changed.fingerprint not in (first.fingerprint, touched.fingerprint)
    Path(shards[1]).write_bytes(content)
    assert open_index(shards, CACHE).fingerprint == first.fingerprint


def test_faults_of_a_set_that_moves_are_told_where_it_lies_now(tmp_path: Path) -> None:
    (shard,) = write_set(tmp_path / "old", [2])
    Path(shard).write_bytes(Path(shard).read_bytes() + b"and more")
    assert open_index([shard], CACHE).faults[0].shard == shard
    (tmp_path / "old").rename(tmp_path / "new")
    moved = str(tmp_path / "new" / Path(shard).name)
    assert open_index([moved], CACHE).faults[0].shard == moved


def test_a_digest_that_is_damaged_in_the_index_is_not_believed(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [2])
    index = open_index(shards, CACHE)
    content, digest = index.path.read_bytes(), index.stamps[0].digest.encode()
    index.path.write_bytes(content.replace(digest, digest[:-1] + (b"0" if digest[-1:] != b"0" else b"1")))
    assert open_index(shards, CACHE).fingerprint == index.fingerprint


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
    gif = BytesIO(image_bytes(format="GIF"))
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("first", good),
            ("no-caption", {"jpg": good["jpg"], "json": b"{}"}),
            ("no-image", {"txt": b"text"}),
            ("wrong-extension", {"tiff": good["jpg"], "txt": b"text"}),
            ("empty", {"jpg": good["jpg"], "txt": b" \n"}),
            ("latin", {"jpg": good["jpg"], "txt": "café".encode("latin-1")}),
            ("not-a-image", {"jpg": b"<html>", "txt": b"text"}),
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
        "no-image": "no image (.jpg",
        "wrong-extension": "only .tiff",
        "empty": "empty",
        "latin": "UTF-8",
        "not-a-image": "cannot be opened",
        "exotic": "cannot be opened",
        "first": "duplicate key",
    }
    assert reasons.keys() == expected.keys()
    for key, words in expected.items():
        assert words in reasons[key]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """A tar of six samples, and where each begins."""
    path, starts = tmp_path_factory.mktemp("six") / "a.tar", []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, key in enumerate(KEYS):
            starts.append(tar.offset)
            for ending, content in pair(number).items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return path.read_bytes(), starts


def scanned(path: Path, content: bytes) -> tuple[list[str], str]:
    """Keys of the samples that are found in `content`, and what is said of the tar itself."""
    path.write_bytes(content)
    table = scan_shard(str(path), CACHE)
    for number in range(len(table)):
        start, length = table.members[number, 0].tolist()
        with Image.open(BytesIO(content[start : start + length])) as image:
            assert image.size == (24, 16)
    return table.keys, "; ".join(fault.reason for fault in table.faults if not fault.key)


def without_magic(content: bytes) -> bytes:
    """Each header's magic set to zeros, and its checksum made up for that (a damaged header stays so)."""
    old = bytearray(content)
    while (at := old.find(b"ustar\x0000")) >= 0:
        old[at : at + 8] = bytes(8)
        checksum = slice(at - 257 + 148, at - 257 + 154)
        old[checksum] = b"%06o" % (int(old[checksum], 8) - sum(b"ustar\x0000"))
    return bytes(old)


def test_damage_in_the_middle_costs_what_it_hits_and_is_told_with_its_bytes(
    tmp_path: Path, six: tuple[bytes, list[int]]
) -> None:
    content, starts = six
    at, end = starts[2], starts[3]
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]  # in the name, so that the checksum is wrong
    keys, told = scanned(tmp_path / "a.tar", flipped)
    assert keys == KEYS[:2] + KEYS[3:]
    image = 512 + -(-len(pair(2)["jpg"]) // 512) * 512
    assert f"{image:,} bytes that belong to no member, the first at byte {at:,}" in told
    assert scanned(tmp_path / "a.tar", without_magic(flipped)) == (keys, told), "as tars before 1988"
    hole = content[:at] + bytes(end - at) + content[end:]
    keys, told = scanned(tmp_path / "b.tar", hole)
    assert keys == KEYS[:2] + KEYS[3:]
    assert f"{end - at:,} zeros between members" in told
    shifted = content[: at + 700] + b"7 bytes" + content[at + 700 :]  # all that follows is off the blocks
    keys, told = scanned(tmp_path / "c.tar", shifted)
    assert keys == KEYS  # whether 0-2 can be decoded is another matter
    assert "damaged: 7 zeros between members" in told


def test_a_tar_that_ends_early_says_so_wherever_it_was_cut(tmp_path: Path, six: tuple[bytes, list[int]]) -> None:
    content, starts = six
    for cut in (starts[2] + 520, starts[2] + 100):  # in an image, in a header
        keys, told = scanned(tmp_path / "a.tar", content[:cut])
        assert keys == KEYS[:2]
        assert f"{cut - starts[2]:,} bytes that belong to no member" in told
    keys, told = scanned(tmp_path / "a.tar", content[: starts[2]])
    assert keys == KEYS[:2]
    assert f"no end mark at byte {starts[2]:,}" in told
    assert scanned(tmp_path / "a.tar", content) == (KEYS, "")


def test_a_download_that_took_its_room_beforehand_and_stopped_is_told(
    tmp_path: Path, six: tuple[bytes, list[int]]
) -> None:
    content, starts = six
    room = 2 * 2**20
    keys, told = scanned(tmp_path / "a.tar", content[: starts[4]] + bytes(room))
    assert keys == KEYS[:4]
    assert f"{room:,} zeros at the end, the first at byte {starts[4]:,}" in told
    padded = content + bytes(-len(content) % 2**20)  # as tar --blocking-factor=2048 does
    assert scanned(tmp_path / "a.tar", padded) == (KEYS, "")


def test_tars_end_to_end_and_a_tail_that_is_no_tar_are_read_and_told(
    tmp_path: Path, six: tuple[bytes, list[int]]
) -> None:
    content, starts = six
    keys, told = scanned(tmp_path / "a.tar", content[: starts[2]] + bytes(1024) + content[starts[2] :])
    assert keys == KEYS
    assert "1,024 zeros between members (a hole, or several tars end to end)" in told
    keys, told = scanned(tmp_path / "a.tar", content[: starts[2] + 3] + content)  # the first one cut
    assert keys == KEYS
    assert "3 bytes that belong to no member" in told
    keys, told = scanned(tmp_path / "a.tar", content + b"and more")
    assert keys == KEYS
    assert "bytes that belong to no member" in told
    for other in (b"", gzip.compress(content), bytes(10240)):
        keys, told = scanned(tmp_path / "a.tar", other)
        assert keys == []
        assert "no member is in it" in told


def test_long_names_and_what_is_no_file_are_read_past(tmp_path: Path) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for key in ("a" * 150, "b"):
                for name, content in ((f"{key}.jpg", image_bytes()), (f"{key}.txt", b"text")):
                    member = tarfile.TarInfo(f"folder.d/{name}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
                folder = tarfile.TarInfo(f"folder.d/{key}.d")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            for ending in ("jpg", "txt"):
                link = tarfile.TarInfo(f"folder.d/linked.{ending}")
                link.type, link.linkname = tarfile.LNKTYPE, "folder.d/b.jpg"
                tar.addfile(link)
        table = scan_shard(str(path), CACHE)
        assert table.keys == ["folder.d/" + "a" * 150, "folder.d/b"]
        (fault,) = table.faults
        assert fault.key == "folder.d/linked"
        assert "its .jpg is a link" in fault.reason


def test_samples_that_img2dataset_counted_and_the_tar_lacks_are_told(tmp_path: Path) -> None:
    shard = write_set(tmp_path, [4])[0]
    stats = tmp_path / "set-0000_stats.json"
    for said, told in (('{"count": 9, "successes": 4}', ""), ('{"successes": 7}', "counts 7"), ("[3]", ""), ("{", "")):
        stats.write_text(said)
        faults = scan_shard(shard, CACHE).faults
        assert [fault.key for fault in faults] == [""] * bool(told)
        assert all("4 samples" in fault.reason and told in fault.reason for fault in faults)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_leaves_sound_samples_and_loses_none_unsaid(
    tmp_path: Path, six: tuple[bytes, list[int]], data: st.DataObject
) -> None:
    content = bytearray(six[0])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)) | st.sampled_from(six[1]).map(lambda at: at + 124))  # a size field
        new = data.draw(st.binary(max_size=40) | st.integers(0, 3000).map(bytes))
        content[at : at + data.draw(st.sampled_from([len(new), 0, 600]))] = new
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    table = scan_shard(str(path), CACHE)
    assert all(0 <= start <= start + length <= len(content) for start, length in table.members.reshape(-1, 2).tolist())
    if {*KEYS} - {*table.keys}:
        assert table.faults


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.builds(bytes.__add__, st.sampled_from([b"", bytes(8), b"\x02" + bytes(7), b"\xff" * 8]), st.binary()))
def test_any_bytes_in_place_of_a_tar_or_of_its_index_are_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert [fault.key for fault in scan_shard(str(path), CACHE).faults] == [""]
    shard = write_tar(tmp_path / "b.tar", [("k", pair(1))])
    open_index([shard], CACHE).path.write_bytes(content)
    assert open_index([shard], CACHE).key(0) == "k"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), format=st.sampled_from([0, 1, 2]))
def test_members_may_have_names_of_any_bytes(tmp_path: Path, names: list[bytes], format: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name in ("first", *(name.decode(errors="surrogateescape") for name in names), "last"):
            for ending, content in (("jpg", image_bytes()), ("txt", b"text")):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    index = open_index([str(path)], CACHE)
    keys = [index.key(i) for i in range(len(index))]
    assert [keys[0], keys[-1]] == ["first", "last"]
    "".join([*keys, *(fault.describe() for fault in index.faults)]).encode()  # can be printed and written


def test_a_name_that_is_no_utf8_is_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, content in (("caf\xe9.jpg", image_bytes()), ("caf\xe9.txt", b"text")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    index = open_index([str(path)], CACHE)
    assert [index.key(i) for i in range(len(index))] == [r"caf\xe9"]


def test_a_long_prefix_before_the_image_size_is_read(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=b"Exif\0\0" + b"x" * 60_000)
    table = scan_shard(write_tar(tmp_path / "a.tar", [("k", {"jpg": buffer.getvalue(), "txt": b"t"})]), CACHE)
    assert table.image_sizes.tolist() == [[30, 20]]


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("k", {"jpg": b"broken", "txt": b"t"})])
    with pytest.raises(ValueError, match=r"no usable sample.*cannot be opened"):
        open_index([shard], CACHE)
    (tmp_path / "b.tar").write_bytes(b"this is no tar")
    with pytest.raises(ValueError, match=r"no usable sample.*no member is in it"):
        open_index([str(tmp_path / "b.tar")], CACHE)


def test_the_command_counts_and_lists_the_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_set(tmp_path, [3, 4])
    write_tar(tmp_path / "set-0002.tar", [("mute", {"jpg": image_bytes()}), ("good", pair(5))])
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
