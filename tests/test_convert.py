"""Why: a conversion of hours must survive interruption, trust no name in an archive, and report every lost record."""

from __future__ import annotations

import csv
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import Members, image_bytes, pair, write_tar

from hive_scale.commands import prepare_data
from hive_scale.data.index import open_index
from hive_scale.data.shard_cache import ShardCache
from hive_scale.prepare import json_stream, readers
from hive_scale.prepare.concepts import split_of
from hive_scale.prepare.items import Item, Source
from hive_scale.prepare.packages import members
from hive_scale.prepare.readers import records_of
from hive_scale.prepare.writer import JOURNAL, Shard, ShardLayout, _samples, convert

CACHE = ShardCache(10**9)
PAIRS = ShardLayout(shard_size=4, heldout=0.0)


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
    return {number: reason for line in lines for number, reason, _ in line["skipped"]}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """CC3M-595K and LCS-558K: a JSON array beside images.zip or the folder it unpacks to."""
    names = [f"0045{i % 3}/GCC_train_{i:09d}.jpg" for i in range(10)]
    records = [talk(name, "<image>\nDescribe.", f"caption {i}") for i, name in enumerate(names)]
    (tmp_path / "chat.json").write_text(json.dumps(records, indent=1))
    for i, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed=i))
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
        assert all(found[f"{i:09d}"]["jpg"] == image_bytes(seed=i) for i in range(10))
        record = json.loads(found["000000003"]["json"])
        assert record["conversations"][0]["value"] == "<image>\nDescribe."
        assert len(open_index(sorted(map(str, out.glob("*.tar"))), CACHE)) == 10


def test_records_that_cannot_be_used_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(image_bytes())
    (images / "b.png").write_bytes(image_bytes(format="WEBP"))  # names lie
    (images / "c.gif").write_bytes(image_bytes(format="GIF"))
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
        "000000005": "about 2 images: only one",
        "000000006": "no image: text alone",
        "000000007": "neither a conversation nor a caption",
    }
    assert reasons.keys() == expected.keys()
    assert all(expected[number] in reason for number, reason in reasons.items())
    assert "left out: 1 x no image: text alone" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_tables_of_captions_of_any_columns(tmp_path: Path, ending: str) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(image_bytes(seed=i))
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


def items_of(path: Path, images: Path, text: str | bytes) -> list[Item]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(readers.table(path, images).items())


def captions(items: list[Item]) -> list[str]:
    """Captions of each record, or the reason for which there is none."""
    return [text for item in items for text in item.record.get("captions") or [item.caption or item.reason]]


def test_an_unquoted_tsv_keeps_its_quotation_marks_and_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    said = ['"Hello', "plain", 'a 5" nail', '"all"', '"begins" and goes on', 'ends"', 'the "last']
    rows = "image\tcaption\n" + "".join(f"a.jpg\t{text}\n" for text in said)
    found = captions(items_of(tmp_path / "t.tsv", tmp_path, rows))
    assert found == [text if text != '"all"' else "all" for text in said]  # which of the two cannot be told
    assert captions(items_of(tmp_path / "t.tsv", tmp_path, rows.replace("\n", "\r\n"))) == found


def test_a_quoted_field_of_several_lines_is_one_field(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    for ending, mark in (("csv", ","), ("tsv", "\t")):
        rows = f'image{mark}caption\na.jpg{mark}"one\n\nand ""two"" , 3"\n\na.jpg{mark}next\n'
        found = captions(items_of(tmp_path / f"t.{ending}", tmp_path, rows))
        assert found == ['one\n\nand "two" , 3', "next"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_row_that_does_not_add_up_is_named_and_the_next_one_read(tmp_path: Path, ending: str) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    mark = {"csv": ",", "tsv": "\t"}[ending]
    rows = [
        "image|caption",
        "a.jpg|one",
        "a.jpg",
        "a.jpg|two|3",
        '"a.jpg|three',
        "a.jpg|four",
        'a.jpg|"five" six',
        "a.jpg|seven",
    ]
    found = captions(items_of(tmp_path / f"t.{ending}", tmp_path, "\n".join(rows).replace("|", mark)))
    assert found[:1] + found[-1:] == ["one", "seven"]
    assert "four" in found
    wrong = [text for text in found if text.startswith("not 2 fields as in the header")]
    assert len(found) == 7
    assert len(wrong) == {"csv": 4, "tsv": 2}[ending]  # what a TSV cannot quote is no mistake


def test_json_that_ends_early_or_goes_on_is_refused_and_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    good = '{"image": "a.jpg", "caption": "c"}'
    for text, message in (
        (f"[{good}, {good}", "its list does not end: the file was cut short"),
        (f"[{good},", "its list does not end"),
        (f"[{good}] [{good}]", "more follows behind the end of its list"),
        (f"[{good} {good}]", "',' or ']' is missing"),
        (f"[{good}, {good[:-9]}", "is not JSON at character"),
        (f"[{good}, {'[' * 100_000}]", "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            items_of(tmp_path / "t.json", tmp_path, text)
    assert captions(items_of(tmp_path / "t.json", tmp_path, "[]")) == []
    assert captions(items_of(tmp_path / "t.json", tmp_path, f"[null, {good}, [3], 12]")) == [
        "no {...}, but a NoneType",
        "c",
        "no {...}, but a list",
        "no {...}, but a int",
    ]
    deep = f'{{"image": "a.jpg", "caption": "c", "more": {"[" * 900 + "]" * 900}}}'
    assert captions(items_of(tmp_path / "t.json", tmp_path, f"[{deep}, {good}]")) == ["nested more than 64 deep", "c"]
    lines = [good, good[:-9], "null", "", "[" * 100_000, good]
    assert captions(items_of(tmp_path / "t.jsonl", tmp_path, "\n".join(lines))) == [
        "c",
        "its line is not JSON: Invalid control character at",
        "no {...}, but a NoneType",
        "its line is not JSON that can be read: a number too long, or nested too deeply",
        "c",
    ]


def test_bytes_that_are_no_text_cost_their_record_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    (tmp_path / "\xe9.jpg").write_bytes(image_bytes())
    record = json.dumps({"image": "a.jpg", "caption": "fine", "author": "\ud83d"}).encode()
    record = record.replace(b"{", '{"place": "Łódź", '.encode())  # so that the file is seen to be UTF-8
    lines = record + b"\n" + record.replace(b"fine", b"caf\xe9") + b"\n" + record.replace(b"a.jpg", b"\xe9.jpg")
    (tmp_path / "t.jsonl").write_bytes(lines)
    convert(readers.table(tmp_path / "t.jsonl", tmp_path), tmp_path / "out", PAIRS, workers=1)
    [found] = read(tmp_path / "out").values()
    assert found["txt"] == b"fine"
    assert json.loads(found["json"])["author"] == "\ud83d"
    assert [reason.encode(errors="replace") for reason in skipped(tmp_path / "out").values()] == [
        b"the caption has bytes that are no text (--encoding NAME)",
        f"there is no ?.jpg in {tmp_path} (--image COLUMN)".encode(),
    ]


PIECES = (
    *(b"image", b"caption", b"a.jpg", b"c", b"null", b'"', b"\t", b",", b"\n", b"\r", b"{", b"}", b"[", b"]", b":"),
    *(b'{"image": "a.jpg", "caption": "c"}', b'{"image": "' + b"a" * 300 + b'"}', b'"\\ud83d"'),
    *(b"\xff", b"\xef\xbb\xbf", b"\0"),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    ending=st.sampled_from(["csv", "tsv", "json", "jsonl"]),
)
def test_any_table_is_read_or_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"t.{ending}"
    path.write_bytes(content)
    with suppress(ValueError):
        items = list(readers.table(path, tmp_path).items())
        skips: list[tuple[str, str]] = []
        written = list(_samples(list(enumerate(items)), skips))
        assert len(written) + len(skips) == len(items)
        assert all(split_of(item.group) for item in items)


def damaged(draw: Any, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 40))] = draw(st.binary(max_size=20))
    return bytes(content)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_a_damaged_zip_is_refused_or_its_damaged_members_named(tmp_path: Path, data: Any, method: int) -> None:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for i in range(3):
            archive.writestr(f"{i}.jpg", image_bytes(seed=i))
    (tmp_path / "a.zip").write_bytes(damaged(data.draw, buffer.getvalue()))
    (tmp_path / "t.jsonl").write_text("".join(f'{{"image": "{i}.jpg", "caption": "c"}}\n' for i in range(3)))
    with suppress(ValueError):
        items = list(readers.table(tmp_path / "t.jsonl", tmp_path / "a.zip").items())
        written = list(_samples(list(enumerate(items)), skips := []))
        assert len(written) + len(skips) == 3
        assert all(one["jpg"] == image_bytes(seed=int(str(one["__key__"]))) for one in written)


def rows_of_parquet(folder: Path, rows: int = 8) -> Path:
    cells = pa.array([{"bytes": image_bytes(seed=i), "path": None} for i in range(rows)])
    texts = pa.array([f"caption number {i} " * 9 for i in range(rows)])
    pq.write_table(
        pa.table({"image": cells, "caption": texts}), folder / "a.parquet", row_group_size=2, use_dictionary=False
    )
    return folder / "a.parquet"


def test_a_damaged_row_group_is_named_row_by_row_and_the_others_read(tmp_path: Path) -> None:
    path = rows_of_parquet(tmp_path)
    content = path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(1)
    at = next(group.column(i) for i in range(3) if "caption" in group.column(i).path_in_schema).data_page_offset
    path.write_bytes(content[:at] + b"\xff" * 60 + content[at + 60 :])
    convert(readers.parquet([path]), tmp_path / "out", PAIRS, workers=1)
    assert sorted(read(tmp_path / "out")) == [f"{i:09d}" for i in (0, 1, 4, 5, 6, 7)]
    reasons = skipped(tmp_path / "out")
    assert list(reasons) == ["000000002", "000000003"]
    assert all("row group 1 of" in reason and "cannot be read as parquet" in reason for reason in reasons.values())
    path.write_bytes(content[:-40])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        readers.parquet([path])


def test_times_in_nanoseconds_as_pandas_writes_them_cost_no_row(tmp_path: Path) -> None:
    odd = 1_700_000_000_123_456_789
    times = {
        "seen": pa.array([odd], pa.timestamp("ns", tz="UTC")),
        "took": pa.array([odd], pa.duration("ns")),
        "daily": pa.array([123_456_789], pa.time64("ns")),
    }
    pq.write_table(pa.table({"image": [image_bytes()], "caption": ["a caption"], **times}), tmp_path / "a.parquet")
    convert(readers.parquet([tmp_path / "a.parquet"]), tmp_path / "out", PAIRS, workers=1)
    record = json.loads(read(tmp_path / "out")["000000000"]["json"])
    assert record["seen"] == "2023-11-14 22:13:20.123456+00:00"


def test_what_macos_adds_to_a_zip_is_no_file_of_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("train/a.jpg", image_bytes())
        archive.writestr("__MACOSX/train/._a.jpg", b"Mac OS X")
    (tmp_path / "chat.json").write_text(json.dumps([talk("a.jpg", "Q", "A")]))
    assert captions(list(readers.table(tmp_path / "chat.json", tmp_path / "mac.zip").items())) == ["A"]


def test_a_class_that_the_hubs_names_do_not_have_is_no_caption(tmp_path: Path) -> None:
    feature = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    cells = pa.array([{"bytes": image_bytes(seed=i), "path": None} for i in range(4)])
    table = pa.table({"image": cells, "label": pa.array([1, -1, 7, 0])})
    hub = {"huggingface": json.dumps({"info": {"features": feature}})}
    pq.write_table(table.replace_schema_metadata(hub), tmp_path / "a.parquet")
    reason = "neither a conversation nor a caption in label, class (--caption COLUMN)"
    assert captions(list(readers.parquet([tmp_path / "a.parquet"]).items())) == ["dog", reason, reason, "cat"]
    pq.write_table(table.replace_schema_metadata({"huggingface": "[3]"}), tmp_path / "a.parquet")
    nameless = reason.replace("label, class", "label")
    assert captions(list(readers.parquet([tmp_path / "a.parquet"]).items())) == [nameless] * 4


def test_parquet_of_conversations_and_of_classes(tmp_path: Path) -> None:
    turns = pa.array([talk("", "Q", f"answer {i}", "Q", "B")["conversations"] for i in range(6)])
    cells = pa.array([{"bytes": image_bytes(seed=i), "path": None} if i != 2 else None for i in range(6)])
    ids = pa.array([f"id{i}" for i in range(6)])
    rows = pa.table({"id": ids, "conversations": turns, "data_source": ids, "image": cells})
    pq.write_table(rows, tmp_path / "next-0.parquet", row_group_size=4)
    layout = replace(PAIRS, shard_size=3)
    convert(readers.parquet([tmp_path / "next-0.parquet"]), tmp_path / "next", layout, workers=2)
    found = read(tmp_path / "next")
    assert [found[key]["txt"] for key in sorted(found)] == [f"answer {i}".encode() for i in (0, 1, 3, 4, 5)]
    assert found["000000005"]["jpg"] == image_bytes(seed=5)
    record = json.loads(found["000000004"]["json"])
    assert (record["id"], len(record["conversations"])) == ("id4", 4)
    assert skipped(tmp_path / "next") == {"000000002": "no image: text alone"}

    feature = {"label": {"names": ["cat", "tabby dog"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    labelled = pa.table({"img": cells.take([0, 1, 3]), "label": pa.array([1, 0, None])})
    hub = {"huggingface": json.dumps({"info": {"features": feature}})}
    pq.write_table(labelled.replace_schema_metadata(hub), tmp_path / "cifar.parquet")
    convert(readers.parquet([tmp_path / "cifar.parquet"], image="img"), tmp_path / "cifar", PAIRS, workers=1)
    found = read(tmp_path / "cifar")
    assert [one["txt"] for one in found.values()] == [b"tabby dog", b"cat"]
    assert [json.loads(one["json"]) for one in found.values()] == [
        {"label": 1, "class": "tabby dog"},
        {"label": 0, "class": "cat"},
    ]
    with pytest.raises(ValueError, match=r"has no column 'image': name the images' with --image \(img, label\)"):
        readers.parquet([tmp_path / "cifar.parquet"], image="image")


def test_class_folders_and_an_empty_one_refused(tmp_path: Path) -> None:
    junk = (".DS_Store", "a_dog/.DS_Store", "b/._x.jpg", ".ipynb_checkpoints/x.jpg")
    for name in ("b/x.jpg", "b/deep/y.JPEG", "a_dog/z.png", "a_dog/notes.txt", "b/Thumbs.db", *junk):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(format="PNG" if name.endswith("png") else "JPEG"))
    assert (
        prepare_data.main(["classes", str(tmp_path / "train"), "--output", str(tmp_path / "out"), "--heldout", "0"])
        == 0
    )
    found = [(one["txt"].decode(), json.loads(one["json"])["label"]) for one in read(tmp_path / "out").values()]
    assert found == [("a dog", 0), ("b", 1), ("b", 1)]
    assert list(skipped(tmp_path / "out").values()) == [
        "notes.txt is no .jpg, .jpeg, .png, .webp",
        "Thumbs.db is no .jpg, .jpeg, .png, .webp",
    ]
    with pytest.raises(ValueError, match="holds no class folders"):
        readers.classes(tmp_path / "train" / "a_dog")


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
    (tmp_path / "secret.jpg").write_bytes(image_bytes())
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "chat.json").write_text(json.dumps([talk(name, "Q", "A")]))
    with pytest.raises(ValueError, match="not reading this set"):
        convert(readers.table(tmp_path / "chat.json", images), tmp_path / "out", PAIRS, workers=1)
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr(name, image_bytes())
        archive.writestr("a.jpg", image_bytes())
    (tmp_path / "chat.json").write_text(json.dumps([talk("a.jpg", "Q", "A")]))
    with pytest.raises(ValueError, match="not reading this set"):
        convert(readers.table(tmp_path / "chat.json", tmp_path / "slip.zip"), tmp_path / "out2", PAIRS, workers=1)
    assert not list(tmp_path.glob("out*/*.tar"))


def test_a_damaged_member_of_a_zip_is_left_out(llava: Path) -> None:
    data = bytearray((llava / "flat.zip").read_bytes())
    at = data.index(image_bytes(seed=4)) + 40
    data[at] ^= 255
    (llava / "flat.zip").write_bytes(data)
    shards = convert(readers.table(llava / "chat.json", llava / "flat.zip"), llava / "out", PAIRS, workers=1)
    assert [reason for shard in shards for _, reason, _ in shard.skipped] == [
        "00451/GCC_train_000000004.jpg is damaged in flat.zip"
    ]
    (llava / "cut.zip").write_bytes(data[:-30])
    with pytest.raises(ValueError, match=r"cut\.zip is neither a folder nor a zip"):
        readers.table(llava / "chat.json", llava / "cut.zip")


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
        (root / f"{i}.jpg").write_bytes(image_bytes(seed=i))
    source, layout = readers.table(root / "rows.jsonl", root), ShardLayout(shard_size=3, heldout=0.3)
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


def by_name(shards: list[Shard]) -> dict[str, tuple[int, int, list[tuple[str, ...]]]]:
    return {one.name: (one.samples, one.num_bytes, [tuple(skip) for skip in one.skipped]) for one in shards}


def test_another_set_in_the_output_is_refused_and_overwrite_replaces_it(llava: Path) -> None:
    source = readers.table(llava / "chat.json", llava / "images")
    convert(source, llava / "out", PAIRS, workers=1)
    with pytest.raises(ValueError, match="made with other shard_size: choose another --output"):
        convert(source, llava / "out", replace(PAIRS, shard_size=5), workers=1)
    other = llava / "out" / "movie.mp4.part"  # of a browser that downloads into the same folder
    other.touch()
    convert(source, llava / "out", replace(PAIRS, shard_size=10), workers=1, overwrite=True)
    assert other.exists()
    assert [path.name for path in (llava / "out").glob("*.tar")] == ["train-00000.tar"]
    (llava / "out" / JOURNAL).unlink()
    with pytest.raises(ValueError, match="holds other shards"):
        convert(source, llava / "out", PAIRS, workers=1)


def test_the_split_keeps_records_of_one_image_together(llava: Path) -> None:
    names = [f"0045{i % 3}/GCC_train_{i:09d}.jpg" for i in range(10)]
    (llava / "two.json").write_text(json.dumps([talk(name, "Q", answer) for answer in "AB" for name in names]))
    convert(readers.table(llava / "two.json", llava / "images"), llava / "out", ShardLayout(4, 0.4), workers=1)
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
    (llava / "empty.json").write_text("[]")
    assert prepare_data.main(["llava", str(llava / "empty.json"), *command[2:]]) == 2
    (llava / "chat.json").write_text('[{"image": "a"}, {"image": b}]')
    assert prepare_data.main(command) == 2
    (llava / "chat.json").write_text("[1, 2]")
    assert prepare_data.main([*command, "--overwrite"]) == 2
    (llava / "chat.json").write_text(json.dumps([talk("missing.jpg", "Q", "A")]))
    assert prepare_data.main([*command, "--overwrite"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare_data.py")]
    expected = (
        "is not there",
        "empty.json: is it empty, or cut behind its header?",
        "is not JSON at character 27",
        "none of the first 2 records can be used: chat.json, record 1: no {...}, but a int",
        "none of the first 1 records",
    )
    assert len(errors) == 5
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "PIECE", piece)
        assert [record for _, record, _ in records_of(path, "utf-8")] == records
