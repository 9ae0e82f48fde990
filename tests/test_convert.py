"""Why: a conversion of hours must survive interruption, believe no name in an archive, and lose no record unsaid."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import Members, pair, picture_bytes, write_tar

from hive_scale.commands import prepare_data
from hive_scale.data.cache import ShardCache
from hive_scale.data.convert import sources
from hive_scale.data.convert.sources import Item, Source, json_records
from hive_scale.data.convert.writer import JOURNAL, Layout, Shard, convert
from hive_scale.data.index import open_index
from hive_scale.data.sources.packages import members

CACHE = ShardCache(10**9)
PAIRS = Layout(shard_size=4, heldout=0.0)


def talk(name: str | list[str], *said: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "1", "image": name, "conversations": turns} | more


def read(folder: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        for name, data in members(path, lambda name: True).items():
            key, _, extension = name.partition(".")
            found.setdefault(key, {})[extension] = data
    return found


def skipped(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()[1:]]
    return {number: reason for line in lines for number, reason in line["skipped"]}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """CC3M-595K and LCS-558K: a JSON array beside images.zip or the folder it unpacks to."""
    names = [f"0045{i % 3}/GCC_train_{i:09d}.jpg" for i in range(10)]
    records = [talk(name, "<image>\nDescribe.", f"caption {i}") for i, name in enumerate(names)]
    (tmp_path / "chat.json").write_text(json.dumps(records, indent=1))
    for i, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(seed=i))
    for zipped, method, top in (("flat", zipfile.ZIP_STORED, ""), ("deep", zipfile.ZIP_DEFLATED, "images/")):
        with zipfile.ZipFile(tmp_path / f"{zipped}.zip", "w", method) as archive:
            for name in names:
                archive.write(tmp_path / "images" / name, top + name)
    return tmp_path


def test_llavas_json_gives_the_same_tars_from_folder_and_zip_and_both_are_indexed(llava: Path) -> None:
    for images in ("images", "flat.zip", "deep.zip"):
        out = llava / f"out_{images}"
        command = ["llava", str(llava / "chat.json"), str(llava / images), "--output", str(out), "--shard-size", "4"]
        assert prepare_data.main([*command, "--workers", "2", "--heldout", "0"]) == 0
        assert [path.name for path in sorted(out.glob("*.tar"))] == [f"train-0000{i}.tar" for i in range(3)]
        found = read(out)
        assert [found[key]["txt"] for key in sorted(found)] == [f"caption {i}".encode() for i in range(10)]
        assert all(found[f"{i:09d}"]["jpg"] == picture_bytes(seed=i) for i in range(10))
        record = json.loads(found["000000003"]["json"])
        assert record["conversations"][0]["value"] == "<image>\nDescribe."
        assert len(open_index(sorted(map(str, out.glob("*.tar"))), CACHE)) == 10


def test_records_that_cannot_be_used_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(picture_bytes())
    (images / "b.png").write_bytes(picture_bytes(format="WEBP"))  # names lie
    (images / "c.gif").write_bytes(picture_bytes(format="GIF"))
    records = [
        talk("a.jpg", "Q", "yes"),
        talk("b.png", "Q", "web"),
        talk("c.gif", "Q", "A"),
        talk("none.jpg", "Q", "A"),
        talk("a.jpg", "Q"),
        talk(["a.jpg", "b.png"], "Q", "A"),
        {"id": "7", "conversations": talk("", "Q", "A")["conversations"]},
        {"image": "a.jpg"},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    command = ["llava", str(tmp_path / "chat.json"), str(images), "--output", str(tmp_path / "out"), "--heldout", "0"]
    assert prepare_data.main(command) == 0
    assert {key: sorted(one) for key, one in read(tmp_path / "out").items()} == {
        "000000000": ["jpg", "json", "txt"],
        "000000001": ["json", "txt", "webp"],
    }
    reasons = skipped(tmp_path / "out")
    expected = {
        "000000002": "no JPEG, PNG or WebP",
        "000000003": "there is no none.jpg in",
        "000000004": "does not alternate",
        "000000005": "about 2 pictures: only one",
        "000000006": "no picture: text alone",
        "000000007": "neither a conversation nor a caption",
    }
    assert reasons.keys() == expected.keys()
    assert all(expected[number] in reason for number, reason in reasons.items())
    assert "left out: 1 x no picture: text alone" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_tables_of_captions_of_any_columns(tmp_path: Path, ending: str) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(picture_bytes(seed=i))
    rows = [{"file": name, "said": f'a "café", {i}\nmore', "n": str(i)} for i, name in enumerate(names)]
    path = tmp_path / f"captions.{ending}"
    with path.open("w", newline="", encoding="utf-8") as file:
        if ending in ("csv", "tsv"):
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    command = ["table", str(path), str(tmp_path), "--output", str(tmp_path / "out"), "--heldout", "0"]
    assert prepare_data.main([*command, "--image", "file", "--caption", "said"]) == 0
    found = read(tmp_path / "out")
    assert [one["txt"].decode() for one in found.values()] == [row["said"] for row in rows]
    assert [json.loads(one["json"]) for one in found.values()] == rows


def test_parquet_of_conversations_and_of_classes(tmp_path: Path) -> None:
    turns = pa.array([talk("", "Q", f"answer {i}", "Q", "B")["conversations"] for i in range(6)])
    cells = pa.array([{"bytes": picture_bytes(seed=i), "path": None} if i != 2 else None for i in range(6)])
    ids = pa.array([f"id{i}" for i in range(6)])
    rows = pa.table({"id": ids, "conversations": turns, "data_source": ids, "image": cells})
    pq.write_table(rows, tmp_path / "next-0.parquet", row_group_size=4)
    layout = replace(PAIRS, shard_size=3)
    convert(sources.parquet([tmp_path / "next-0.parquet"]), tmp_path / "next", layout, workers=2)
    found = read(tmp_path / "next")
    assert [found[key]["txt"] for key in sorted(found)] == [f"answer {i}".encode() for i in (0, 1, 3, 4, 5)]
    assert found["000000005"]["jpg"] == picture_bytes(seed=5)
    record = json.loads(found["000000004"]["json"])
    assert (record["id"], len(record["conversations"])) == ("id4", 4)
    assert skipped(tmp_path / "next") == {"000000002": "no picture: text alone"}

    feature = {"label": {"names": ["cat", "tabby dog"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    labelled = pa.table({"img": cells.take([0, 1, 3]), "label": pa.array([1, 0, None])})
    hub = {"huggingface": json.dumps({"info": {"features": feature}})}
    pq.write_table(labelled.replace_schema_metadata(hub), tmp_path / "cifar.parquet")
    convert(sources.parquet([tmp_path / "cifar.parquet"], image="img"), tmp_path / "cifar", PAIRS, workers=1)
    found = read(tmp_path / "cifar")
    assert [one["txt"] for one in found.values()] == [b"tabby dog", b"cat"]
    assert [json.loads(one["json"]) for one in found.values()] == [
        {"label": 1, "class": "tabby dog"},
        {"label": 0, "class": "cat"},
    ]
    with pytest.raises(ValueError, match=r"has no column 'picture': name the pictures' with --image \(img, label\)"):
        sources.parquet([tmp_path / "cifar.parquet"], image="picture")


def test_class_folders_and_an_empty_one_refused(tmp_path: Path) -> None:
    for name in ("b/x.jpg", "b/deep/y.JPEG", "a_dog/z.png", "a_dog/notes.txt"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(format="PNG" if name.endswith("png") else "JPEG"))
    assert (
        prepare_data.main(["classes", str(tmp_path / "train"), "--output", str(tmp_path / "out"), "--heldout", "0"])
        == 0
    )
    found = [(one["txt"].decode(), json.loads(one["json"])["label"]) for one in read(tmp_path / "out").values()]
    assert found == [("a dog", 0), ("b", 1), ("b", 1)]
    with pytest.raises(ValueError, match="holds no class folders"):
        sources.classes(tmp_path / "train" / "a_dog")


def test_img2datasets_tars_are_read_as_they_are(tmp_path: Path) -> None:
    def sample(i: int) -> Members:
        facts = {"caption": f"a horse {i}", "url": "https://x/y.jpg", "key": f"{i:09d}", "status": "success"}
        return {**pair(i), "txt": facts["caption"].encode(), "json": json.dumps(facts).encode()}

    shard = write_tar(tmp_path / "00000.tar", [(f"{i:09d}", sample(i)) for i in range(3)])
    (tmp_path / "00000_stats.json").write_text("{}")
    index = open_index([shard], CACHE)
    assert [index.key(i) for i in range(3)] == ["000000000", "000000001", "000000002"]
    assert not index.faults


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg", "..\\secret.jpg"])
def test_names_that_leave_their_folder_or_zip_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture_bytes())
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "chat.json").write_text(json.dumps([talk(name, "Q", "A")]))
    with pytest.raises(ValueError, match="not reading this set"):
        convert(sources.table(tmp_path / "chat.json", images), tmp_path / "out", PAIRS, workers=1)
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr(name, picture_bytes())
        archive.writestr("a.jpg", picture_bytes())
    (tmp_path / "chat.json").write_text(json.dumps([talk("a.jpg", "Q", "A")]))
    with pytest.raises(ValueError, match="not reading this set"):
        convert(sources.table(tmp_path / "chat.json", tmp_path / "slip.zip"), tmp_path / "out2", PAIRS, workers=1)
    assert not list(tmp_path.glob("out*/*.tar"))


def test_a_damaged_member_of_a_zip_is_left_out(llava: Path) -> None:
    data = bytearray((llava / "flat.zip").read_bytes())
    at = data.index(picture_bytes(seed=4)) + 40
    data[at] ^= 255
    (llava / "flat.zip").write_bytes(data)
    shards = convert(sources.table(llava / "chat.json", llava / "flat.zip"), llava / "out", PAIRS, workers=1)
    assert [reason for shard in shards for _, reason in shard.skipped] == [
        "00451/GCC_train_000000004.jpg is damaged in flat.zip"
    ]
    (llava / "cut.zip").write_bytes(data[:-30])
    with pytest.raises(ValueError, match=r"cut\.zip is neither a folder nor a zip"):
        sources.table(llava / "chat.json", llava / "cut.zip")


def interrupted(source: Source, after: int) -> Source:
    def items() -> Iterator[Item]:
        for number, item in enumerate(source.items()):
            if number == after:
                raise KeyboardInterrupt
            yield item

    return replace(source, items=items)


@settings(max_examples=8)
@given(stops=st.lists(st.integers(1, 9), max_size=3), damage=st.sampled_from(["", "line", "tar", "part"]))
def test_a_conversion_that_was_stopped_gives_the_same_tars(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], damage: str
) -> None:
    root = tmp_path_factory.mktemp("resume")
    rows = "".join(json.dumps({"image": f"{i}.jpg", "caption": f"c{i}"}) + "\n" for i in range(10))
    (root / "rows.jsonl").write_text(rows)
    for i in range(9):  # the tenth is missing
        (root / f"{i}.jpg").write_bytes(picture_bytes(seed=i))
    source, layout = sources.table(root / "rows.jsonl", root), Layout(shard_size=3, heldout=0.3)
    whole = convert(source, root / "whole", layout, workers=1)
    for after in stops:
        with pytest.raises(KeyboardInterrupt):
            convert(interrupted(source, after), root / "parts", layout, workers=1)
    if damage and (made := sorted((root / "parts").glob("*.tar"))):
        if damage == "line":
            journal = root / "parts" / JOURNAL
            first, *lines = journal.read_text().splitlines(keepends=True)
            journal.write_text(first + "".join(lines)[:-9])
        elif damage == "tar":
            made[0].unlink()
        else:
            made[-1].with_suffix(".part").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in (root / "parts").glob("*.tar")}
    parts = convert(source, root / "parts", layout, workers=2)
    assert by_name(parts) == by_name(whole)
    for path in (root / "whole").glob("*.tar"):
        assert path.read_bytes() == (root / "parts" / path.name).read_bytes()
    if not damage:
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "what is done is not done again"
    assert not list((root / "parts").glob("*.part"))
    shutil.rmtree(root)


def by_name(shards: list[Shard]) -> dict[str, tuple[int, int, list[tuple[str, str]]]]:
    return {one.name: (one.samples, one.num_bytes, [(n, r) for n, r in one.skipped]) for one in shards}


def test_another_set_in_the_output_is_refused_and_overwrite_replaces_it(llava: Path) -> None:
    source = sources.table(llava / "chat.json", llava / "images")
    convert(source, llava / "out", PAIRS, workers=1)
    with pytest.raises(ValueError, match="made with other shard_size: choose another --output"):
        convert(source, llava / "out", replace(PAIRS, shard_size=5), workers=1)
    convert(source, llava / "out", replace(PAIRS, shard_size=10), workers=1, overwrite=True)
    assert [path.name for path in (llava / "out").glob("*.tar")] == ["train-00000.tar"]
    (llava / "out" / JOURNAL).unlink()
    with pytest.raises(ValueError, match="holds other shards"):
        convert(source, llava / "out", PAIRS, workers=1)


def test_the_split_keeps_records_of_one_picture_together(llava: Path) -> None:
    names = [f"0045{i % 3}/GCC_train_{i:09d}.jpg" for i in range(10)]
    (llava / "two.json").write_text(json.dumps([talk(name, "Q", answer) for answer in "AB" for name in names]))
    convert(sources.table(llava / "two.json", llava / "images"), llava / "out", Layout(4, 0.4), workers=1)
    sides = {
        split: {json.loads(one["json"])["image"] for one in read(llava / "out", split).values()}
        for split in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert len(sides["train"] | sides["heldout"]) == 10
    assert sides["heldout"]


def test_what_is_no_list_of_records_or_wholly_useless_stops_with_one_line(
    llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["llava", str(llava / "chat.json"), str(llava / "images"), "--output", str(llava / "out")]
    assert prepare_data.main(["llava", str(llava / "no.json"), *command[2:]]) == 2
    (llava / "chat.json").write_text('[{"image": "a"}, {"image": b}]')
    assert prepare_data.main(command) == 2
    (llava / "chat.json").write_text("[1, 2]")
    assert prepare_data.main(command) == 2
    (llava / "chat.json").write_text(json.dumps([talk("missing.jpg", "Q", "A")]))
    assert prepare_data.main([*command, "--overwrite"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare_data.py")]
    expected = (
        "is not there",
        "is not JSON at character 27",
        "is not a list of records",
        "none of the first 1 records",
    )
    assert len(errors) == 4
    assert all(message in error for message, error in zip(expected, errors, strict=True))


@settings(max_examples=30)
@given(
    records=st.lists(st.dictionaries(st.text("ab[]{},", max_size=3), st.text('é"\\[{,', max_size=9)), max_size=6),
    lines=st.booleans(),
    piece=st.integers(1, 40),
)
def test_json_is_read_record_by_record_wherever_its_pieces_end(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], lines: bool, piece: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = (
        "".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records, ensure_ascii=False)
    )
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(sources, "PIECE", piece)
        assert list(json_records(file, path)) == records
