"""Why: strangers come with the layouts of other tools. Each must be read as it is, with every lost row named by file,
row, what was found and the option that helps; and what is written must be trainable with the printed command.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shlex
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import image_bytes, write_tar

from hive_scale.commands import prepare_data
from hive_scale.config import Config
from hive_scale.config_merge import read_words
from hive_scale.data.index import open_index
from hive_scale.data.messages import parse_messages
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import all_shards, expand
from hive_scale.locate import command_name
from hive_scale.prepare import published_sets
from hive_scale.prepare.packages import members
from hive_scale.prepare.writer import JOURNAL

Samples = list[tuple[str, dict[str, Any]]]  # (caption, record)


def images(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed=seed))
    return folder


def convert(command: str, *words: object, output: Path | str, heldout: str = "0") -> int:
    line = [command, *map(str, words), "--output", str(output), "--workers", "1", "--heldout", heldout]
    return prepare_data.main(line)


def samples(output: Path) -> Samples:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(output.glob("train-*.tar")):
        for name, data in members(path, lambda name: True).items():
            found.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = data
    assert all({"jpg", "txt", "json"} == one.keys() for one in found.values())
    return [(one["txt"].decode(), json.loads(one["json"])) for one in found.values()]


def left_out(output: Path) -> list[str]:
    lines = [json.loads(line) for line in (output / JOURNAL).read_text().splitlines()[1:]]
    return [f"{where}: {reason}" for line in lines for _, reason, where in line["skipped"]]


def said(output: Path) -> list[str]:
    return [caption for caption, _ in samples(output)]


# --- encodings and delimiters


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_the_encoding_of_a_table_is_told_by_its_bytes(
    tmp_path: Path, encoding: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["Ein Café in Köln", "prix: 5 €", "a plain one", "d\u2019été"]
    rows = [{"image": f"{i}.jpg", "caption": text} for i, text in enumerate(texts)]
    content = json.dumps(rows, ensure_ascii=False)
    if ending == "csv":
        content = "image;caption\r\n" + "".join(f"{one['image']};{one['caption']}\r\n" for one in rows)
    if ending == "jsonl":
        content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
    path = images(tmp_path, *(f"{i}.jpg" for i in range(4))) / f"t.{ending}"
    path.write_bytes(content.encode(encoding))
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 0
    assert said(tmp_path / "out") == texts
    told = capsys.readouterr().out
    assert ("--encoding names another one" in told) == (not encoding.startswith("utf-8"))
    if encoding == "cp1252":
        assert f"t.{ending} is no UTF-8: read as cp1252, such as 'Café'" in told


def test_bytes_of_another_encoding_are_named_and_the_option_reads_them(tmp_path: Path) -> None:
    texts = ["桜の花", "赤い車が走る", "plain"]
    rows = "image,caption\n" + "".join(f"{i}.jpg,{text}\n" for i, text in enumerate(texts))
    path = images(tmp_path, "0.jpg", "1.jpg", "2.jpg") / "sjis.csv"
    path.write_bytes(rows.encode("shift_jis"))
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == [
        f"sjis.csv, line {line}: the caption has bytes that are no text (--encoding NAME)" for line in (2, 3)
    ]
    assert convert("table", path, tmp_path, "--encoding", "shift_jis", output=tmp_path / "jis") == 0
    assert said(tmp_path / "jis") == texts
    path.write_bytes("image,caption\n0.jpg,Привет мир\n1.jpg,ещё одна\n2.jpg,c\n".encode("cp1251"))
    assert convert("table", path, tmp_path, output=tmp_path / "cyrillic") == 0
    assert said(tmp_path / "cyrillic") == ["c"]  # and no Ïðèâåò


def test_an_unknown_encoding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n")
    assert convert("table", tmp_path / "t.csv", tmp_path, "--encoding", "latin9000", output=tmp_path / "out") == 2
    assert "--encoding latin9000: no such encoding" in capsys.readouterr().err


def test_open_clips_table_is_read_and_its_columns_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "photos", "a.jpg", "b.jpg")
    lines = ["filepath\ttitle", "a.jpg\ta dog, running", f'{folder.resolve()}/b.jpg\tthe 5" nail', "a.jpg", "c.jpg\tno"]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    assert convert("table", tmp_path / "train.csv", folder, output=tmp_path / "out") == 0
    assert said(tmp_path / "out") == ["a dog, running", 'the 5" nail']
    told = capsys.readouterr().out
    assert "train.csv has the columns filepath, title; read are filepath (images), title (captions)" in told
    assert "--image and --caption choose others" in told
    short, missing = left_out(tmp_path / "out")
    assert short.startswith("train.csv, line 4: not 2 fields as in the header (filepath, title)")
    assert short.endswith("but 'a.jpg': put fields with a tab in quotation marks")
    assert missing == f"train.csv, line 5: there is no c.jpg in {folder} (--image COLUMN)"
    assert convert("table", tmp_path / "train.csv", folder, "--image", "image", output=tmp_path / "out2") == 2
    assert "no column 'image', but filepath, title: name the images' with --image" in capsys.readouterr().err
    assert convert("table", tmp_path / "train.csv", folder, "--caption", "text", output=tmp_path / "out2") == 2
    assert "no column 'text', but filepath, title: name the captions' with --caption" in capsys.readouterr().err


def test_names_that_begin_with_their_folder_tell_which_folder_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path, "photos/a.jpg") / "photos"
    (tmp_path / "t.csv").write_text("image,caption\nphotos/a.jpg,c\n")
    assert convert("table", tmp_path / "t.csv", folder, output=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"t.csv, line 2: there is no photos/a.jpg in {folder}; give {tmp_path} as IMAGES" in error
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out") == 0


def test_a_table_without_a_known_column_names_those_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text("bild,beschreibung\na.jpg,ein Hund\n")
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out") == 2
    assert "t.csv, line 2: neither a conversation nor a caption in bild, beschreibung" in capsys.readouterr().err
    options = ["--image", "bild", "--caption", "beschreibung"]
    assert convert("table", tmp_path / "t.csv", tmp_path, *options, output=tmp_path / "out") == 0
    assert said(tmp_path / "out") == ["ein Hund"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,caption,caption\na.jpg,x,y\n", "t.csv has column 'caption' twice: rename one"),
        ("t.tsv", "a.jpg\tx\na.jpg\ty\n", "t.tsv has no header, but begins with 'a.jpg': add a first line"),
        ("t.json", '{\n "image": "a.jpg"\n}', "t.json holds an object of several lines at line 1: a list of records"),
        ("t.csv", "url,caption\nhttps://x/a.jpg,x\n", "t.csv, line 2: no image in url, caption (fetch the images with"),
        ("t.csv", "image,caption\n/etc/a.jpg,x\n", "t.csv, line 2: the image's name '/etc/a.jpg' leaves"),
        (
            "t.jsonl",
            '{"image": 3, "caption": "c"}',
            "t.jsonl, line 1: no name of an image in column 'image', but a int",
        ),
    ],
)
def test_a_table_that_cannot_be_read_says_what_to_change(
    tmp_path: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (images(tmp_path, "a.jpg") / name).write_text(content)
    assert convert("table", tmp_path / name, tmp_path, output=tmp_path / "out") == 2
    assert message in capsys.readouterr().err


# --- several captions per image


def coco(folder: Path, **changes: Any) -> Path:
    """Two images with captions in any order, one without, as COCO's captions_train2017.json is built."""
    content = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"id": 1, "name": "CC"}],
        "images": [{"license": 1, "file_name": f"00000000000{i}.jpg", "height": 16, "id": i} for i in (1, 2, 3)],
        "annotations": [
            {"image_id": about, "id": number, "caption": f"caption {number} of {about}"}
            for number, about in enumerate([2, 1, 2, 1, 2])
        ],
    }
    path = images(folder, "000000000001.jpg", "000000000002.jpg", "000000000003.jpg") / "captions_train2017.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_cocos_captions_give_a_sample_per_image_and_lose_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("table", coco(tmp_path), tmp_path, output=tmp_path / "out") == 0
    found = samples(tmp_path / "out")
    assert [caption for caption, _ in found] == ["caption 1 of 1", "caption 0 of 2"]
    assert [record["captions"] for _, record in found] == [
        ["caption 1 of 1", "caption 3 of 1"],
        ["caption 0 of 2", "caption 2 of 2", "caption 4 of 2"],
    ]
    assert found[0][1]["file_name"] == "000000000001.jpg"
    assert "the first caption of an image is trained on; 3 others are kept in the .json" in capsys.readouterr().out
    assert left_out(tmp_path / "out") == ["captions_train2017.json, image 3: no annotation is a caption of it"]


def test_odd_annotations_of_coco_are_named(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 1, "caption": "fine"},
        {"image_id": 1, "bbox": [1, 2, 3, 4]},
        {"image_id": 77, "caption": "lost"},
        {"caption": "about nothing"},
        None,
    ]
    assert convert("table", coco(tmp_path, annotations=annotations), tmp_path, output=tmp_path / "out") == 0
    name = "captions_train2017.json"
    assert left_out(tmp_path / "out")[:4] == [
        f"{name}, annotations[1]: no caption, but image_id, bbox: give COCO's captions_*.json",
        f"{name}, annotations[3]: no id of an image, but caption",
        f"{name}, annotations[4]: no {{...}}, but a NoneType",
        f"{name}, image 77: not in images, but 1 captions are about it",
    ]
    assert said(tmp_path / "out") == ["fine"]


def test_images_of_one_id_do_not_replace_each_other(tmp_path: Path) -> None:
    path = coco(tmp_path, annotations=[{"image_id": 1, "caption": "of the first"}])
    content = json.loads(path.read_text())
    content["images"].append(content["images"][1] | {"id": 1})
    path.write_text(json.dumps(content))
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 0
    place = f"{path.name}, images[{len(content['images']) - 1}]"
    assert f"{place}: its id, 1, is an earlier image's, too" in left_out(tmp_path / "out")
    assert samples(tmp_path / "out")[0][1]["file_name"] == content["images"][0]["file_name"]


def test_a_coco_file_that_was_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = coco(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 2
    assert "captions_train2017.json is not JSON at character" in capsys.readouterr().err


FLICKR = {
    "Flickr8k.token.txt": (
        "1.jpg#0\tA child , in pink .\n1.jpg#1\tA girl .\n2.jpg#0\tA dog .\n2.jpg.1#0\tNobody .\n3.jpg\n",
        {"line 4": "there is no 2.jpg.1", "line 5": "not NAME#NUMBER, a tab and a caption, but '3.jpg'"},
    ),
    "results.csv": (  # one row of the published file lacks a delimiter, too
        "image_name| comment_number| comment\n1.jpg| 0| A child , in pink .\n1.jpg| 1| A girl .\n"
        "2.jpg| 0| A dog .\n2.jpg| 4   A dog runs .\n",
        {"line 5": "not 3 fields as in the header (image_name, comment_number, comment)"},
    ),
    "captions.txt": (
        'image,caption\n1.jpg,"A child , in pink ."\n1.jpg,A girl .\n2.jpg,A dog .\n2.jpg,A dog , again\n',
        {"line 5": "not 2 fields as in the header (image, caption)"},
    ),
}


@pytest.mark.parametrize("name", FLICKR)
def test_flickrs_lists_give_a_sample_per_image_and_lose_no_caption(tmp_path: Path, name: str) -> None:
    content, wrong = FLICKR[name]
    path = images(tmp_path, "1.jpg", "2.jpg") / name
    path.write_text(content)
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 0
    (first, record), (second, _) = samples(tmp_path / "out")
    assert (first, second) == ("A child , in pink .", "A dog .")
    assert [one.strip() for one in record["captions"]] == ["A child , in pink .", "A girl ."]
    told = left_out(tmp_path / "out")
    assert len(told) == len(wrong)
    assert all(f"{name}, {line}: {reason}" in one for (line, reason), one in zip(wrong.items(), told, strict=True))


def test_rows_about_one_image_keep_what_differs(tmp_path: Path) -> None:
    rows = ["image,caption,source,id", "1.jpg,one,alt,7", "1.jpg,two,blip,7", "1.jpg,,blip,7", "2.jpg,three,alt,8"]
    path = images(tmp_path, "1.jpg", "2.jpg") / "t.csv"
    path.write_text("\n".join(rows))
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 0
    assert samples(tmp_path / "out")[0][1] == {
        "image": "1.jpg",
        "captions": ["one", "two"],
        "source": ["alt", "blip"],
        "id": "7",
    }
    assert left_out(tmp_path / "out") == ["t.csv, line 4: the caption in column 'caption' is empty (--caption COLUMN)"]


# --- conversations of the hub


def parquet(path: Path, column: str, cells: list[Any], **columns: Any) -> Path:
    encoded = [[{"bytes": one, "path": None} for one in cell] for cell in cells]
    pq.write_table(pa.table({column: encoded, **columns}), path, row_group_size=2)
    return path


def turns(output: Path) -> list[list[tuple[str, str]]]:
    """The conversations that training with data.format=conversation reads."""
    return [[(one["role"], one["content"]) for one in parse_messages(record)] for _, record in samples(output)]


def test_the_cauldrons_texts_become_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        [
            {"user": "What is it?", "assistant": "A cat.", "source": "vqa"},
            {"user": "Where?", "assistant": "Home.", "source": "vqa"},
        ],
        [{"user": "Two?", "assistant": "Yes.", "source": "nlvr2"}],
        [{"user": "And?", "assistant": "", "source": "vqa"}],
    ]
    one = image_bytes()
    path = parquet(tmp_path / "train-0.parquet", "images", [[one], [one, one], [one]], texts=asked)
    assert convert("parquet", path, output=tmp_path / "out") == 0
    assert said(tmp_path / "out") == ["A cat."]
    assert turns(tmp_path / "out") == [
        [("user", "What is it?"), ("assistant", "A cat."), ("user", "Where?"), ("assistant", "Home.")]
    ]
    assert samples(tmp_path / "out")[0][1]["messages"][0]["source"] == "vqa"
    assert left_out(tmp_path / "out") == [
        "train-0.parquet, row 2: 2 images: only one is supported",
        "train-0.parquet, row 3: an answer of the conversation is empty",
    ]
    assert "1 samples have a conversation" in capsys.readouterr().out


def parts(role: str, *texts: str | None, kind: str = "image") -> dict[str, Any]:
    """A turn of content parts, where None stands for the image."""
    content = [{"type": kind if text is None else "text", "text": text} for text in texts]
    return {"role": role, "content": content}


def test_trls_content_parts_become_texts(tmp_path: Path) -> None:
    talks = [
        [parts("user", "What is it?\n", None), parts("assistant", "A cat.")],
        [parts("user", None, "Play", kind="video"), parts("assistant", "No.")],
    ]
    path = parquet(tmp_path / "vsft.parquet", "images", [[image_bytes()]] * 2, messages=talks)
    assert convert("parquet", path, output=tmp_path / "out") == 0
    assert turns(tmp_path / "out") == [[("user", "What is it?"), ("assistant", "A cat.")]]
    assert left_out(tmp_path / "out") == [
        "vsft.parquet, row 2: a content part of type 'video': only an image and text are supported"
    ]


def test_prompts_with_completions_and_lines_that_name_their_image(tmp_path: Path) -> None:
    question, answer = parts("user", None, "What?"), parts("assistant", "A cat.")
    named = {"role": "user", "content": [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "What?"}]}
    records = [
        {"images": ["a.jpg"], "prompt": [question], "completion": [answer]},
        {"messages": [named, answer]},
        {"messages": [parts("user", "Hi"), answer]},
        {"images": ["a.jpg", "b.jpg"], "messages": [question, answer]},
    ]
    path = images(tmp_path, "a.jpg", "b.jpg") / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert convert("table", path, tmp_path, output=tmp_path / "out") == 0
    assert turns(tmp_path / "out") == [[("user", "What?"), ("assistant", "A cat.")]] * 2
    assert left_out(tmp_path / "out") == [
        "chat.jsonl, line 3: no image: text alone",
        "chat.jsonl, line 4: the conversation is about 2 images: only one is supported",
    ]


def test_a_list_of_captions_in_a_cell_is_kept(tmp_path: Path) -> None:
    path = parquet(tmp_path / "flickr30k.parquet", "image", [[image_bytes()]], caption=[["A dog.", "A brown dog."]])
    assert convert("parquet", path, output=tmp_path / "out") == 0
    assert samples(tmp_path / "out") == [("A dog.", {"captions": ["A dog.", "A brown dog."]})]


# --- images and captions side by side


def img2dataset(folder: Path) -> Path:
    """What ``img2dataset --output_format files`` leaves: four images of five, one without its caption."""
    shard = images(folder, *(f"00000/00000000{i}.jpg" for i in range(4))) / "00000"
    for i in range(4):
        facts = {"caption": f"caption {i}", "url": "https://x/y.jpg", "key": f"00000000{i}", "status": "success"}
        (shard / f"00000000{i}.json").write_text(json.dumps(facts))
        (shard / f"00000000{i}.txt").write_text(facts["caption"])
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text('{"count": 6, "successes": 5}')
    return folder


def test_img2datasets_files_are_read(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "raw")
    (folder / "00000" / "000000001.txt").unlink()
    (folder / "00000" / "000000001.json").write_text("{")
    (folder / "00000" / "000000002.jpg").unlink()
    assert convert("pairs", folder, output=tmp_path / "out") == 0
    found = samples(tmp_path / "out")
    assert [caption for caption, _ in found] == ["caption 0", "caption 3"]
    assert found[0][1]["url"] == "https://x/y.jpg"
    unread, alone, short = left_out(tmp_path / "out")
    assert unread.startswith("raw/00000/000000001: its .json cannot be read")
    assert alone == "raw/00000/000000002: no image (.jpg, .png or .webp) beside its caption: only .json and .txt"
    assert short == "raw/00000: 3 samples, where its _stats.json counts 5"


def test_caption_files_of_any_encoding_and_place(tmp_path: Path) -> None:
    folder = images(tmp_path / "mine", "cats/my.cat.jpg", "dog.jpg", "bird.jpg", "fish.jpg", ".hidden/x.jpg")
    (folder / "cats/my.cat.caption").write_bytes("un été".encode("utf-16"))
    (folder / "dog.caption").write_text("dog, brown, sitting")
    (folder / "dog.txt").write_text("a brown dog sits")
    (folder / "bird.txt").write_bytes("café".encode("cp1252"))
    assert convert("pairs", folder, output=tmp_path / "out") == 0
    assert samples(tmp_path / "out") == [
        ("a brown dog sits", {"captions": ["a brown dog sits", "dog, brown, sitting"]}),
        ("un été", {}),
    ]
    assert left_out(tmp_path / "out") == [
        "mine/bird: its .txt: no utf-8 at byte 3 (b'caf\\xe9'): --encoding NAME, such as cp1252",
        "mine/fish: no caption beside it: only .jpg; .txt, .caption and .json are read; prepare_data.py table reads a "
        "list of captions, and classes a folder per class",
    ]
    words = ["--encoding", "cp1252", "--caption", "caption"]
    assert convert("pairs", folder, *words, output=tmp_path / "out2") == 0
    assert said(tmp_path / "out2") == ["dog, brown, sitting", "un été"]
    assert (
        "mine/bird: no .caption and no column 'caption': found .jpg and .txt (--caption"
        in left_out(tmp_path / "out2")[0]
    )


def test_further_images_and_links_of_a_key_are_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "mine", "a.jpg", "a.JPG", "a.webp", "b.jpg")
    (folder / "a.txt").write_text("one")
    (folder / "b.text").write_text("two")
    assert convert("pairs", folder, output=tmp_path / "out") == 0
    assert said(tmp_path / "out") == ["one", "two"]
    assert left_out(tmp_path / "out") == [
        "mine/a.jpg: its name differs from another file's in its case only",
        "mine/a: a further image, .webp: only .jpg is used",
    ]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jpg", "a.txt", "b.jpg"):
            tar.add(folder / name, name)
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        tar.addfile(link)
    assert convert("pairs", tmp_path / "x.tar", output=tmp_path / "tars") == 0
    assert left_out(tmp_path / "tars") == [
        "x.tar, b: its .txt: a link in x.tar stands for it: make the tar with the files themselves"
    ]


def test_tars_of_images_and_records_are_read(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "set-0000.tar",
        [
            ("a", {"jpg": image_bytes(), "json": b'{"caption": "from the record"}'}),
            ("b", {"jpg": image_bytes(seed=1), "caption": b"from .caption"}),
            ("c", {"jpg": image_bytes(seed=2), "json": b'{"width": 5}'}),
            ("d", {"jpg": image_bytes(seed=3), "json": b'{"prompt": "p", "text": "t"}'}),
        ],
    )
    with pytest.raises(ValueError, match=r"only \.jpg and \.json; prepare_data\.py pairs reads other captions"):
        open_index([shard], ShardCache(10**9))
    assert convert("pairs", shard, output=tmp_path / "out") == 0
    assert said(tmp_path / "out") == ["from the record", "from .caption", "t"]
    assert left_out(tmp_path / "out") == [
        "set-0000.tar, c: neither a conversation nor a caption in width (--caption COLUMN)"
    ]
    Path(shard).write_bytes(Path(shard).read_bytes()[:-11_000])
    assert convert("pairs", str(tmp_path / "set-*.tar"), output=tmp_path / "cut") == 0
    assert "set-0000.tar: the tar is cut short or damaged" in left_out(tmp_path / "cut")[-1]


def test_what_another_command_reads_names_that_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = img2dataset(tmp_path / "raw")
    shard = write_tar(tmp_path / "x.tar", [("a", {"jpg": image_bytes(), "txt": b"c"})])
    table = parquet(tmp_path / "a.parquet", "image", [[image_bytes()]], caption=["c"])
    (tmp_path / "t.csv").write_text("image,caption\n")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"image,caption\n"))
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    (pointer := tmp_path / "pointer.zip").write_text("version https://git-lfs.github.com/spec/v1\n")
    pq.write_table(pa.table({"image": ["a.jpg"]}), names := tmp_path / "names.parquet")
    for words, expected in (
        (("classes", folder), f"use prepare_data.py pairs {folder}"),
        (("table", folder, folder), "prepare_data.py pairs reads"),
        (("table", shard, folder), f"use prepare_data.py pairs {shard}"),
        (("table", table, folder), f"{table} is parquet: use prepare_data.py parquet"),
        (("table", tmp_path / "t.csv.gz", folder), "t.csv.gz is compressed: unpack it with gunzip"),
        (("table", tmp_path / "t.xlsx", folder), "t.xlsx is a zip or an Excel file: unpack it, or save it as CSV"),
        (("table", folder / "00000" / "000000000.jpg", folder), "is an image: give the file that names the images"),
        (("table", tmp_path / "t.csv", pointer), "pointer.zip is only git-lfs's pointer to the file: git lfs pull"),
        (("parquet", folder), f"{folder} is a folder: give its files, such as '{folder}/*.parquet'"),
        (("parquet", names), "has no images inside, or several columns of them: name one with --image (image: string)"),
        (("pairs", tmp_path / "t.csv"), "prepare_data.py table reads CSV"),
        (("pairs", tmp_path / "none"), "none is not there"),
    ):
        assert convert(*words, output=tmp_path / "out") == 2
        assert expected in capsys.readouterr().err


# --- the next command


@pytest.mark.parametrize(
    "name",
    [
        "mine",
        "my photos",
        "a,b",
        "it's",
        'say "x"',
        "[draft]",
        "{1..3}",
        "50%",
        "2 x a",
        "s:train",
        "ü*?",
        "a\\b",
        "~mine",
        "./~",  # a ~ at the beginning is the home directory
        "$HOME",
        "#1 x: y",
    ],
)
def test_the_command_that_trains_finds_the_shards(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no name here may lead to the user's own
    images(Path(), *(f"{i}.jpg" for i in range(12)))
    Path("t.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,caption {i}\n" for i in range(12)))
    assert convert("table", "t.csv", ".", output=name, heldout="0.3") == 0
    command = capsys.readouterr().out.partition("train on it:\n")[2].strip()
    _, _, package, action, preset, value, *words = shlex.split(command)
    assert (package, action, preset, value) == ("hive_scale", "pretrain", "--preset", "debug")
    config = read_words(words, Config)
    assert config.output == f"runs/{re.sub(r'[^a-zA-Zü0-9.]', '_', Path(name).name)}"
    for split in ("train", "heldout"):
        found = all_shards(expand(list(config.data[split])))
        assert [Path(one) for one in found] == sorted(Path(name).glob(f"{split}-*.tar"))
        assert found


def test_a_folder_that_no_pattern_can_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images(tmp_path, "a.jpg") / "t.csv").write_text("image,caption\na.jpg,c\n")
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "${x}") == 0
    told = capsys.readouterr().out
    assert "rename the folder" in told
    assert "train on it" not in told


def test_without_held_out_samples_it_says_how_to_get_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\nb.jpg,two\n")
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out", heldout="0.002") == 0
    told = capsys.readouterr().out
    assert "no heldout samples: too few for --heldout 0.002; --heldout 0.5 --overwrite sets about 1 aside" in told
    assert told.rstrip().endswith("data.heldout=none")


def test_a_share_may_be_a_percentage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, *(f"{i}.jpg" for i in range(20)))
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,{i}\n" for i in range(20)))
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out", heldout="50%") == 0
    again = convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out", heldout="0.5")
    assert again == 0  # the same share: nothing to do
    assert re.search(r"heldout: [1-9]\d* samples", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out", heldout="half")
    assert "argument --heldout: invalid share value: 'half'" in capsys.readouterr().err


def test_the_command_is_called_as_this_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for called, expected in (
        ("launchers/prepare_data.py", "python launchers/pretrain.py"),
        ("/my tools/launchers/prepare_data.py", "python '/my tools/launchers/pretrain.py'"),
        ("python -m hive_scale prepare_data", "python -m hive_scale pretrain"),
    ):
        monkeypatch.setattr("sys.argv", [called])
        assert command_name("pretrain") == expected


def test_a_conversion_begun_by_an_older_version_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\nb.jpg,two\nc.jpg,three\n")
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out") == 0
    journal = tmp_path / "out" / JOURNAL
    first, *lines = map(json.loads, journal.read_text().splitlines())
    for line in lines:
        del line["further"], line["conversations"]
        line["skipped"] = [skip[:2] for skip in line["skipped"]]
    first["columns"] = ["image", ""]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))
    assert convert("table", tmp_path / "t.csv", tmp_path, output=tmp_path / "out") == 0
    assert "left out: 1 x there is no" in capsys.readouterr().out


# --- published sets


def fetched(folder: Path) -> Path:
    """Three records of LLaVA-CC3M-Pretrain-595K, as `hf download --local-dir` leaves them, with the hub's checksums."""
    folder.mkdir()
    talk = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "a cat"}]
    records = [{"id": str(i), "image": f"GCC_train_{i}.jpg", "conversations": talk} for i in range(3)]
    (folder / "chat.json").write_text(json.dumps(records))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"GCC_train_{i}.jpg", image_bytes(seed=i))
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name in ("chat.json", "images.zip"):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (notes / f"{name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1726498445.9\n")
    return folder


def published(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> None:
    """Let the published figures be those of `folder`, which is as small as a test."""
    sizes = {one: f"{(folder / one).stat().st_size / 1e6:.6f} MB" for one in ("chat.json", "images.zip")}
    one = replace(published_sets.SETS["cc3m"], files=sizes, samples=3)
    monkeypatch.setitem(published_sets.SETS, "cc3m", replace(one, **changes))


def test_a_published_set_is_checked_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetched(tmp_path / "cc3m")
    published(monkeypatch, folder)
    assert convert("cc3m", folder, output=tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert told.count("the sha256 that the hub gave at download (1 of 1 files)") == 2
    assert "all 3 records of the published set are there" in told
    assert "pretrain --preset paper_siglip output=runs/paper_siglip 'data.train=[" in told.splitlines()[-1]
    assert said(tmp_path / "out") == ["a cat"] * 3
    (folder / ".cache" / "huggingface" / "download" / "chat.json.metadata").unlink()
    assert convert("cc3m", folder, output=tmp_path / "out") == 0
    assert "no checksum known: hf download --local-dir records the hub's" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["short", "pointer", "changed", "missing", "fewer"])
def test_files_that_are_not_the_published_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetched(tmp_path / "cc3m")
    published(monkeypatch, folder, **({"samples": 4} if damage == "fewer" else {}))
    path = folder / "images.zip"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    if damage == "missing":
        path.unlink()
    elif damage != "fewer":
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6460000000\n"
        path.write_bytes({"short": content[:-300], "pointer": pointer, "changed": content}[damage])
    assert convert("cc3m", folder, output=tmp_path / "out") == 2
    error = capsys.readouterr().err
    expected = {
        "short": "bytes where",
        "pointer": "is only git-lfs's pointer to the file: git lfs pull, or fetch it again: hf download liuhaotian/",
        "changed": "images.zip has sha256",
        "missing": "has no images.zip",
        "fewer": "3 records where liuhaotian/LLaVA-CC3M-Pretrain-595K has 4: fetch its files again",
    }
    assert expected[damage] in error
    assert (tmp_path / "out").exists() == (damage == "fewer")


def test_a_numbered_series_with_a_gap_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00001-of-00003.parquet", "image", [[image_bytes()]], id=["a"])
    assert convert("llava_next", tmp_path, output=tmp_path / "out") == 2
    told = "lacks 2 of 00003 files: train-00000-of-00003.parquet, train-00002-of-00003.parquet"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", published_sets.SETS)
def test_a_published_set_says_where_it_comes_from(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main([name]) == 0
    told = capsys.readouterr().out
    one = published_sets.SETS[name]
    assert f"hf download {one.repository} " in told
    assert f"prepare_data {name} downloads/{name} --output data/" in told
    assert prepare_data.main([name, "somewhere"]) == 2
    assert "Say --output DIR" in capsys.readouterr().err


def test_sizes_as_a_page_shows_them_bound_the_bytes() -> None:
    for size, sound, cut in (("211 MB", 211_400_000, 205_000_000), ("27.4 GB", 27_384_000_000, 27_000_000_000)):
        least, most = published_sets._bounds(size)
        assert cut < least <= sound <= most
