"""Files and names by malicious people are refused, bounded or escaped, each in one place.

Why: shards, zips, benchmarks, weights, configs and whole run directories are passed around. A few megabytes must not
become gigabytes, a name must not control a terminal, and viewing a run must not write outside of it. `test_fuzz.py`
searches for more such cases.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table
from tars import image_bytes, pair, write_tar

from hive_scale import config as configs
from hive_scale import config_merge, presets
from hive_scale.checkpoint.format import audit, write_manifest
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config, EngineConfig
from hive_scale.data.bad_samples import read_faults
from hive_scale.data.index import open_index
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import ShardReader
from hive_scale.data.tar_scan import scan_shard
from hive_scale.data.transform import decode
from hive_scale.distributed import World
from hive_scale.evaluate.readers import image_file, read_json
from hive_scale.evaluate.readers import rows as parquet_rows
from hive_scale.exit_codes import ended
from hive_scale.export import model_card
from hive_scale.observability.console import Screen
from hive_scale.observability.logging_setup import RECORD, capture_library_logs
from hive_scale.preflight import _read_noted
from hive_scale.prepare import readers
from hive_scale.prepare.image_sources import ImageSource
from hive_scale.prepare.writer import JOURNAL, ShardLayout, _Journal, convert
from hive_scale.report.html import Report, page
from hive_scale.report.report import save_report
from hive_scale.run import find_encoder
from hive_scale.slurm.chain import Record
from hive_scale.slurm.resources import Resources
from hive_scale.strangers import printable
from hive_scale.strict_json import loads, read_lines

CACHE = ShardCache(10**9)
NAME = 'a\x1b[2J\n\u202e</td><script>alert(1)</script>"[bold]x[/]:smile:'


def most_memory(act: Callable[[], object]) -> int:
    """Bytes that `act` takes at its worst, or takes until its ValueError."""
    tracemalloc.start()
    try:
        act()
    except ValueError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


# ------------------------------------------------------------------------------ what is shown


def test_what_would_steer_a_terminal_is_spelled_out() -> None:
    assert printable("caf\xe9 \u4e2d \U0001f469\u200d\U0001f4bb [x]") == "caf\xe9 \u4e2d \U0001f469\u200d\U0001f4bb [x]"
    assert printable("a\x1b[31m\n\r\t\x9b\u202e\u2028\ud83d\0") == r"a\x1b[31m\n\r\t\x9b\u202e\u2028\ud83d\x00"
    assert printable("a\tb\n\x1bc", lines=True) == "a\tb\n\\x1bc"


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:

    def work() -> int:
        raise ValueError(NAME)

    assert ended(work) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "\x1b" not in shown


def test_a_screen_shows_brackets_and_colons_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    table = Table("name", title=NAME)
    table.add_row(NAME)
    screen.print(table, soft_wrap=True)
    screen.print("lost [/] [link=x]y", soft_wrap=True)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert shown.count("[bold]x[/]:smile:") == 2
    assert "lost [/] [link=x]y" in shown


def test_a_message_cannot_look_like_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "sample a\n2026-01-01 00:00:00,000 ERROR hive_scale: all is lost \x1b[2J"
    with capture_library_logs(tmp_path, World(0, 1, torch.device("cpu"))):
        logging.getLogger("hive_scale.test").warning("%s", forged)
    lines = (tmp_path / "rank_00000.log").read_text().splitlines()
    assert [bool(RECORD.match(line)) for line in lines] == [True, False]
    assert "\x1b" not in lines[1] + capsys.readouterr().err


def test_members_and_faults_with_such_names_are_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in ((f"{NAME[:8]}.jpg", image_bytes()), ("\x1bb.txt", b"alone")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = scan_shard(str(path), CACHE)
    told = "".join([*found.keys, *(fault.describe() for fault in found.faults)])
    assert len(found.faults) == 2
    assert told.isprintable()


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_holds_no_element_that_is_not_its_own(tmp_path: Path) -> None:
    row = {NAME: NAME, "a": NAME}
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    found = Report(
        **{"title": NAME, "notes": [NAME], "runs": [row], "recipe": [row], "plots": {NAME: "<svg></svg>"}},
        **{"captions": [(pixels, row)], "maps": {NAME: "<svg></svg>"}, "memory": {NAME: NAME}, "faults": [row]},
    )
    tags = Tags()
    tags.feed(page(found))
    assert {"script", "a", "iframe"}.isdisjoint(tag for tag, _ in tags.found)
    assert not [key for _, attributes in tags.found for key in attributes if key.startswith("on")]
    [policy] = [each["content"] for tag, each in tags.found if each.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'")
    save_report(found, tmp_path / "report.html")  # half characters, too, can be written
    assert "\x1b" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_model_card_s_table_keeps_its_cells() -> None:
    cell = model_card._plain("x | [a](javascript:b) <img src=x> `c` $d$\n# e")
    assert cell == r"x \| \[a\](javascript:b) \<img src=x\> \`c\` \$d\$\n# e".replace(r"\n", r"\\n")
    assert model_card._code("a`|b\n") == r"`a'\|b\n`"


# ------------------------------------------------------------------------------ JSON and YAML


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[" * 10**6, "nested more than 64 deep"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 deep"),
        (rb'{"a": ["\ud83d"]}', "half a character"),
        (rb'{"\uDe00": 1}', "half a character"),
        (b'"\xed\xa0\xbd"', "decode"),
        (b"9" * 5000, "digits"),
        (b"[1, ]" + b" " * 2000, "0.0 MB of JSON"),
    ],
)
def test_json_has_bounds(text: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        loads(text, 1000 if text.endswith(b" ") else 10**7)
    assert loads(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}
    assert loads("[" * 64 + "1" + "]" * 64)


def test_lines_too_long_or_deep_are_counted_as_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b" " * (5 * 2**20), b'{"a":' * 1000, b'{"b": "\xff"}', b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    assert read_lines(path) == ([{"a": 1}, {"a": 2}], [2, 3, 4])


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "folder"])
def test_what_is_no_file_or_has_no_end_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2**40)

    def refused() -> None:
        with pytest.raises(ValueError, match=r"is no file|MB that are read"):
            read_json(path)
        with pytest.raises(ValueError, match=r"is no file|MB that are read"):
            config_merge.read_yaml(path)

    assert most_memory(refused) < 10**7


BILLION = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BILLION, "aliases written out"),
        ("a: &a [*a]", "not complete yet"),
        ("a: *b", r"undefined alias|not there"),
        ("[" * 100_000, "nest"),
        ("[" * 100, "nested more than 64 deep"),
        ("a: " + "{b: " * 70, "nested more than 64 deep"),
        ("a: !!bool maybe", "not YAML"),
        ("a: !!int ''", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
        ("a: \x00", "not YAML"),
        ("x" * 2 * 2**20, "MB that are read"),
    ],
)
def test_yaml_has_bounds(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)

    def refused() -> None:
        with pytest.raises(ValueError, match=told):
            configs.load(file)

    assert most_memory(refused) < 10**8


def test_aliases_that_mean_well_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("x: &a {lr: 1, parameters: ['*']}\ny: [*a, *a]\nz: {<<: *a}\n")
    assert presets.read_file(file)["z"] == {"lr": 1, "parameters": ["*"]}
    with pytest.raises(ValueError, match="aliases written out"):
        config_merge.resolve(
            Config(), [f"model.vision.config.x=[&a [{', '.join('x' * 9)}], {', '.join(['*a'] * 20_000)}]"]
        )


@pytest.mark.parametrize(
    "text",
    [
        *("stages: [1]", "stages: {joint: 3}", "stages: ${oc.env:NOPE}", "preset: [1]", "preset: debug\nfusion: [x]"),
        *("preset: debug\nstages: {joint: 3}", "preset: debug\nmodel: {vision: {config: [1]}}"),
        *("preset: debug\ndata: {train: {a: 3}}", "preset: debug\nnull: 3", "preset: debug\nname: [x]"),
    ],
)
def test_values_of_another_kind_in_a_config_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        presets.load(None, file, [])


@pytest.mark.parametrize("word", ["data.train[0]=x", "[=1", "a=" + "[" * 5000, "stages." + "x." * 3000 + "y=1", "=="])
def test_words_of_another_kind_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="config: "):
        config_merge.resolve(Config(), [word])


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": 3}},
        {"stage": 3, "offload_param": {"device": ["nvme"]}},
        {"stage": 2, "leaf_module": 3},
        {"stage": [1]},
    ],
)
def test_values_of_another_kind_in_a_deepspeed_json_are_refused(tmp_path: Path, zero: dict[str, Any]) -> None:
    from hive_scale.engine import deepspeed_config

    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    stages = {"joint": (presets.load("debug", None, []).stages["joint"], 1)}
    with pytest.raises(ValueError, match="zero_optimization"):
        deepspeed_config.check(tmp_path / "ds.json", stages, EngineConfig())


@pytest.mark.parametrize(
    "content",
    [
        *("3", "[]", '{"a":' * 5000, '{"model_type": ["x"]}', '{"vision_config": 3, "model_type": "siglip"}'),
        '{"model_type": "siglip_vision_model", "hidden_size": "x"}',
    ],
)
def test_an_encoder_s_config_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.vision"):
        find_encoder(tmp_path)


def test_weights_in_a_format_that_is_not_written_here_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="x is stored as F8_E4M3"):
        read_weights(tmp_path / "w.safetensors").sources()


# ------------------------------------------------------------------------------ bombs


@pytest.mark.parametrize(
    "line",
    [
        "[2]",
        "null",
        '{"name": "train-00000.tar"}',
        '{"name": "../x.tar", "samples": 1, "num_bytes": 2}',
        '{"name": "train-00000.tar", "samples": "many", "num_bytes": 2}',
        "[" * 100_000,
    ],
)
def test_a_conversion_s_journal_of_another_making_is_refused_or_its_line_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / JOURNAL).write_text(f'{{"a": 1}}\n{line}\n')
    (tmp_path / "train-00000.tar").touch()
    try:
        assert not _Journal(tmp_path, {"a": 1}, overwrite=False).done
    except ValueError as refused:
        assert "is not what was written" in str(refused)  # noqa: PT017
    (tmp_path / JOURNAL).write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"holds (a set made with other|other shards)"):
        _Journal(tmp_path, {"a": 1}, overwrite=False)


@pytest.mark.parametrize(
    "train",
    [
        '{"samples": 1e999, "fingerprint": "x", "shards": {}}',
        '{"samples": 1, "fingerprint": "x", "shards": 3}',
        '{"samples": 1, "fingerprint": ["x"], "shards": {}}',
        '{"samples": 1, "fingerprint": "x", "shards": {"a": [1]}}',
        '{"samples": 1}',
        "7",
    ],
)
def test_a_note_of_samples_of_another_making_is_refused(tmp_path: Path, train: str) -> None:
    for text in (f'{{"joint": {{"train": {train}}}}}', f'{{"joint": {{"train": {train}, "heldout": {train}}}}}', "[]"):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(ValueError, match=r"data.json is not what was written"):
            _read_noted(tmp_path / "data.json")


def test_a_zip_bomb_costs_its_record_and_no_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("good.jpg", image_bytes())
        with archive.open("bomb.jpg", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(2**20))
    assert (tmp_path / "p.zip").stat().st_size < 3e6
    bomb = ImageSource(tmp_path / "p.zip").find("bomb.jpg")
    assert bomb is not None
    assert most_memory(bomb.read) < 10**7
    records = [{"image": f"{name}.jpg", "caption": "c"} for name in ("bomb", "good")]
    (tmp_path / "t.json").write_text(json.dumps(records))
    convert(readers.table(tmp_path / "t.json", tmp_path / "p.zip"), tmp_path / "out", ShardLayout(2, 0), workers=1)
    line = json.loads((tmp_path / "out" / JOURNAL).read_text().splitlines()[1])
    assert line["samples"] == 1
    assert "more than the 268,435,456 of an image" in line["skipped"][0][1]


def holed_tar(path: Path, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> str:
    """A tar with a sound sample around a member of `size` bytes, none of which is on the disk."""
    with tarfile.open(path, "w") as tar, path.open("r+b") as file:
        for ending, content in (("jpg", image_bytes()), ("txt", b"text")):
            member = tarfile.TarInfo(f"good.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        at = tar.offset
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    with path.open("r+b") as file:
        file.seek(at)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(at + 512 + -(-size // 512) * 512 + 1024)
    return str(path)


@pytest.mark.parametrize(
    ("name", "size", "kind", "told"),
    [
        ("x.txt", 400 * 2**20, tarfile.REGTYPE, "only .txt"),
        ("good.json", 400 * 2**20, tarfile.REGTYPE, ""),
        ("x.png", 400 * 2**20, tarfile.REGTYPE, "only .png"),
        ("x", 12 * 2**20, tarfile.XHDTYPE, "damaged"),
        ("x", 12 * 2**20, tarfile.GNUTYPE_LONGNAME, "damaged"),
    ],
)
def test_members_and_headers_of_any_size_take_no_memory(
    tmp_path: Path, name: str, size: int, kind: bytes, told: str
) -> None:
    shard = holed_tar(tmp_path / "a.tar", name, size, kind)
    scanned: list[Any] = []
    assert most_memory(lambda: scanned.append(scan_shard(shard, CACHE))) < 6 * 10**6
    [found] = scanned
    assert found.keys == ["good"]
    assert told in "".join(fault.reason for fault in found.faults)
    reader = ShardReader([shard], [found.stamp], CACHE)
    assert most_memory(lambda: [reader.read(0, *member) for member in found.members[0].tolist()]) < 10**6


def test_a_caption_and_an_image_that_are_too_large_are_faults(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("k", pair(1) | {"txt": b"x" * (2**20 + 1)})])
    [fault] = scan_shard(shard, CACHE).faults
    assert "the caption has 1,048,577 bytes" in fault.reason
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, 2**40)
    assert most_memory(image_file(path).read) < 10**6


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def test_images_that_unpack_to_much_are_refused(tmp_path: Path) -> None:
    head = (b"IHDR", bytes([0, 0, 0, 4, 0, 0, 0, 4, 8, 0, 0, 0, 0]))
    packed = zlib.compress(bytes(200 * 2**20))
    pixels = (b"IDAT", zlib.compress(bytes(20)))
    image = image_bytes(8, 8)
    bombs = {
        "text": png(head, (b"zTXt", b"Comment\0\0" + packed), pixels, (b"IEND", b"")),
        "profile": png(head, (b"iCCP", b"x\0\0" + packed), pixels, (b"IEND", b"")),
        "pixels": png(head, (b"IDAT", packed), (b"IEND", b"")),
    }
    for name, content in bombs.items():
        assert most_memory(lambda content=content: decode(content, 10**6)) < 10**8, name
    with pytest.raises(ValueError, match="1,000 scans"):
        decode(image[:-2] + 999 * b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + image[-2:], 10**6)
    from PIL import Image

    for format in ("GIF", "TIFF", "BMP", "PPM"):
        other = io.BytesIO()
        Image.new("RGB", (4, 4)).save(other, format)
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode(other.getvalue(), 10**6)


def test_a_parquet_that_says_it_unpacks_to_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    from hive_scale.data import parquet as ours

    table = pyarrow.table({"image": [{"bytes": bytes(10**6), "path": "a"}] * 3, "question": ["q"] * 3})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="zstd")
    monkeypatch.setattr(ours, "LARGEST_GROUP", 2 * 10**6)  # of gigabytes in truth
    [row, *_] = parquet_rows([tmp_path / "a.parquet"], "image", ["question"])
    with pytest.raises(ValueError, match=r"bytes in a row group, more than 2,000,000"):
        row["image"].read()


# ------------------------------------------------------------------------------ run directories, indexes, weights


def test_an_index_that_points_elsewhere_is_made_again(tmp_path: Path) -> None:
    from test_fuzz import checksummed

    shard = write_tar(tmp_path / "a.tar", [(f"k{i}", pair(i)) for i in range(3)])
    sound = open_index([shard], CACHE)
    arrays = {name: array.copy() for name, array in sound.arrays.items()}
    content = sound.path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sound.path.write_bytes(checksummed(header, arrays, []))
    before = sound.path.stat()
    assert open_index([shard], CACHE).key(0) == "k0"
    assert sound.path.stat().st_mtime_ns == before.st_mtime_ns  # what is right is taken
    for change in ([("members", 0, -1)], [("members", 1, 2**62)], [("shard_sizes", 0, 9)], [("key_ends", 0, 10**9)]):
        sound.path.write_bytes(checksummed(header, arrays, change))
        again = open_index([shard], CACHE)
        assert [again.key(i) for i in range(len(again))] == ["k0", "k1", "k2"]
        assert (again.members == arrays["members"]).all()
    sound.path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    assert most_memory(lambda: open_index([shard], CACHE)) < 10**7


@pytest.mark.parametrize(
    ("shapes", "files"),
    [
        ({"master/a": (-5,)}, {"r.safetensors": {"bytes": 0, "xxh3_128": "", "ranges": [["master/a", 0, -5]]}}),
        ({"master/a": (10**15,)}, {"r.safetensors": {"bytes": 9, "xxh3_128": "", "ranges": [["master/a", 0, 10**15]]}}),
        ({"master/a": ("x",)}, {}),
        ({}, {"r.safetensors": {"bytes": 9, "xxh3_128": "", "ranges": [["master/b", 0, 1]]}}),
        ({}, {"../r.safetensors": {"bytes": 9, "xxh3_128": "", "ranges": []}}),
        ({}, {"zero.safetensors": {"bytes": 0, "xxh3_128": "", "ranges": []}}),
        ({}, ["r"]),
    ],
)
def test_a_manifest_whose_checksum_is_right_is_not_believed(tmp_path: Path, shapes: Any, files: Any) -> None:
    step = tmp_path / "step_00000001"
    step.mkdir()
    (step / "zero.safetensors").symlink_to("/dev/zero")  # which has no end
    write_manifest(step, 1, shapes, files, {})
    assert audit(step)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"x": "../b"}},
        {"weight_map": {"x": 3}},
        {"weight_map": []},
        [],
        {"weight_map": {}, "metadata": 1},
    ],
)
def test_an_index_of_weights_that_leads_elsewhere_is_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not what was written"):
        read_weights(tmp_path / "a.safetensors.index.json")


def test_to_look_at_a_run_writes_through_none_of_its_links(tmp_path: Path) -> None:
    mine = tmp_path / "bashrc"
    mine.write_text("mine")
    output = tmp_path / "run" / "report.html"
    output.parent.mkdir()
    output.symlink_to(mine)
    save_report(Report("title", [], [], [], {}), output)
    assert mine.read_text() == "mine"
    assert "title" in output.read_text()
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_faults_that_are_none_are_left_out_of_a_report(tmp_path: Path) -> None:
    lines = [{"shard": "a", "key": "b", "reason": "c"}, {"shard": "a"}, {"shard": 1, "key": 2, "reason": []}, [1]]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [fault.key for fault in read_faults(tmp_path / "bad.jsonl")] == ["b"]


# ------------------------------------------------------------------------------ Slurm


@pytest.mark.parametrize("name", ["partition", "gpu", "mem", "account", "qos", "interface", "constraint"])
@pytest.mark.parametrize("value", ["gpu\ntouch x", "gpu; touch x", "$(touch x)", "a b", "`x`", "\x1b[2J", "a'b"])
def test_what_goes_into_a_job_s_script_is_a_word(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)slurm.{name}=.*no single word"):
        Resources(**{name: value})


def test_words_that_clusters_use_are_taken() -> None:
    Resources(
        partition="gpu-a100,gpu_h100", account="proj/vision@site", mem="200G", qos="high+", interface="^lo,docker0"
    )
    Resources(constraint="[rack1|rack2]*2&(ib|!old)")
    setup = ["module load cuda; export A='b c'"]
    assert Resources(setup=setup).setup == setup  # shell, by design


@pytest.mark.parametrize(
    "changed",
    [
        *({"jobs": {"joint": "7;x"}}, {"jobs": {"joint": "../7"}}, {"jobs": {"joint": 7}}, {"jobs": []}),
        *({"steps": {"joint": "3"}}, {"unknown": 1}, {"resources": {"joint": {"partition": "a\nb"}}}),
        *({"then": {"probe": {"launcher": "os", "after": "joint", "words": ["x"]}}}, {"then": {"probe": 3}}),
    ],
)
def test_the_record_of_a_chain_is_checked_when_it_is_read(tmp_path: Path, changed: dict[str, Any]) -> None:
    sound = {"cwd": "/", "cluster": "slurm", "jobs": {"joint": "7"}, "steps": {"joint": 3}}
    path = Record.path(tmp_path)
    path.parent.mkdir()
    path.write_text(json.dumps(sound))
    record = Record.read(tmp_path)
    assert record is not None
    assert record.jobs == {"joint": "7"}
    path.write_text(json.dumps(sound | changed))
    with pytest.raises(ValueError, match=r"chain.json is not what was written"):
        Record.read(tmp_path)
