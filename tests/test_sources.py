"""Why: the shipped sample is the data of every debug run, so its content, its split and its reproducibility must not
drift. And sources read archives from outside: bad ones must be refused, not unpacked or decoded.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tars
from PIL import Image, ImageFile

from hive_scale import shared_files
from hive_scale.prepare import concepts, emoji, packages, smollm2, tuxpaint
from hive_scale.prepare.jpeg import Jpeg, to_jpeg
from hive_scale.prepare.packages import Package, fetch, members
from hive_scale.prepare.records import Record, write

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "hive_scale" / "data" / "sample"
LAUNCHER = ROOT / "launchers" / "prepare_data.py"

Members = dict[str, bytes]


def read_split(folder: Path, split: str) -> dict[str, Members]:
    """Key -> extension -> content of every sample."""
    samples: dict[str, Members] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        for name, data in members(path, lambda name: True).items():
            key, _, extension = name.partition(".")
            assert extension not in samples.setdefault(key, {}), f"{name} is there twice"
            samples[key][extension] = data
    return samples


@pytest.fixture(scope="module")
def sample() -> dict[str, dict[str, Members]]:
    return {split: read_split(SAMPLE, split) for split in ("train", "heldout")}


def png(size: tuple[int, int] = (8, 8), color: Any = "red", mode: str = "RGBA") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, "PNG")
    return out.getvalue()


def record(name: str, **changes: Any) -> Record:
    values = {"key": name, "image": png(), "caption": name, "concept": name, "metadata": {"label": name}}
    return Record(**(values | changes))


# --- the shipped sample


def test_sample_is_about_a_thousand_pairs_with_a_sixth_held_out(sample: Any) -> None:
    train, heldout = len(sample["train"]), len(sample["heldout"])
    assert 1000 <= train + heldout <= 1900
    assert 0.12 <= heldout / (train + heldout) <= 0.18


def test_sample_fits_the_package_and_names_its_makers() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 4_000_000
    notice = (SAMPLE / "NOTICE").read_text()
    assert "Noto Emoji: Copyright Google LLC, Apache License 2.0" in notice
    assert "Miles Johnson" in notice  # whose labels are the captions
    assert "Apache License" in (SAMPLE / "LICENSE").read_text()


def test_sample_has_caption_labels_and_image_for_every_key(sample: Any) -> None:
    categories = set()
    for key, parts in (sample["train"] | sample["heldout"]).items():
        assert set(parts) == {"jpg", "txt", "json"}, key
        facts, caption = json.loads(parts["json"]), parts["txt"].decode()
        assert {"label", "category", "subcategory", "hexcode", "source", "concept"} <= set(facts), key
        assert caption.endswith(facts["label"]), key
        assert facts["label"]
        assert len(parts["txt"]) <= 60, key
        assert caption == caption.lower(), key
        categories.add(facts["category"])
        with Image.open(io.BytesIO(parts["jpg"])) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64)), key
    assert len(categories) == 9


def test_sample_splits_share_no_concept(sample: Any) -> None:
    found = {
        split: {json.loads(parts["json"])["concept"] for parts in samples.values()} for split, samples in sample.items()
    }
    assert not found["train"] & found["heldout"]
    assert not set(sample["train"]) & set(sample["heldout"])


def test_sample_splits_share_no_image(sample: Any) -> None:
    """Even a twin under another name and another concept would let memory pass for sight."""

    def thumbnails(split: str) -> np.ndarray:
        images = [Image.open(io.BytesIO(parts["jpg"])) for parts in sample[split].values()]
        return np.stack([np.asarray(p.resize((16, 16), Image.Resampling.BOX), np.float32).ravel() for p in images])

    train = thumbnails("train")
    nearest = [np.abs(train - image).mean(1).min() for image in thumbnails("heldout")]
    assert min(nearest) > 2.5  # of 255; clock faces an hour apart differ by 1.7, men's and women's room by 2.1


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed: the packages cannot be fetched")
def test_the_launcher_makes_the_shipped_sample_again_bit_for_bit(tmp_path: Path) -> None:
    """Fails without the npm registry, which says that the check was not made; needs no network once cached."""
    made = tmp_path / "sample"
    run = subprocess.run(
        [sys.executable, LAUNCHER, "emoji", "--output", made],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    shipped = sorted(path.name for path in SAMPLE.iterdir() if path.name != "LICENSE")
    assert sorted(path.name for path in made.iterdir()) == shipped
    for name in shipped:
        assert (made / name).read_bytes() == (SAMPLE / name).read_bytes(), (
            f"{name} differs: was the recipe changed, or Pillow's JPEG library (see images.Jpeg)?"
        )


# --- concepts


@pytest.mark.parametrize(
    ("one", "other", "category"),
    [
        ("woman farmer", "farmer", "people & body"),
        ("man running facing right", "person running", "people & body"),
        ("three o'clock", "four-thirty", "travel & places"),
        ("tiger face", "tiger", "animals & nature"),
        ("blue heart", "red heart", "smileys & emotion"),
        ("family: man, boy", "family: adult, adult, child", "people & body"),
        ("camera with flash", "camera", "objects"),
        ("mermaid", "merman", "people & body"),
        ("locked", "unlocked", "objects"),
    ],
)
def test_variants_of_one_thing_are_one_concept(one: str, other: str, category: str) -> None:
    assert concepts.concept_of(one, category) == concepts.concept_of(other, category)


@pytest.mark.parametrize(
    ("one", "other", "category"),
    [
        ("flag: south korea", "flag: north korea", "flags"),
        ("tiger", "lion", "animals & nature"),
        ("woman farmer", "woman pilot", "people & body"),
        ("moon cake", "full moon", "food & drink"),
    ],
)
def test_different_things_are_different_concepts(one: str, other: str, category: str) -> None:
    assert concepts.concept_of(one, category) != concepts.concept_of(other, category)


def test_concepts_with_the_same_image_merge_whatever_their_order() -> None:
    merged = concepts.merge(["norway", "bouvet", "norway", "france"], [b"1", b"1", b"2", b"3"])
    assert merged == {"norway": "bouvet", "bouvet": "bouvet", "france": "france"}
    chained = concepts.merge(["c", "b", "b", "a"], [b"1", b"1", b"2", b"2"])
    assert set(chained.values()) == {"a"}


def test_captions_name_the_kind_once() -> None:
    assert emoji.caption_of("tiger face", "animal-mammal") == "mammal: tiger face"
    assert emoji.caption_of("flag: andorra", "country-flag") == "flag: andorra"
    assert emoji.caption_of("family", "family") == "family"


# --- images


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(30_000, 20_000), (10_000, 10_000), (8_000, 7_000)])
def test_an_image_too_large_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: Any) -> None:
        raise AssertionError("the image was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(ValueError, match="allowed"):
        to_jpeg(header_only(*size), Jpeg())


@pytest.mark.parametrize("data", [b"", b"no image", png()[:40], header_only(8, 8), b"GIF89a" + bytes(40)])
def test_what_is_no_image_is_refused_with_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable"):
        to_jpeg(data, Jpeg())


def test_images_are_whole_centred_and_on_white() -> None:
    out = Image.open(io.BytesIO(to_jpeg(png((40, 20), (255, 0, 0, 255)), Jpeg(size=64, quality=95))))
    pixels = np.asarray(out, np.int32)
    assert out.size == (64, 64)
    assert pixels[:12].min() > 240  # white above and below
    assert pixels[-12:].min() > 240
    assert abs(pixels[32, 32] - [255, 0, 0]).max() < 10
    clear = np.asarray(Image.open(io.BytesIO(to_jpeg(png(color=(0, 0, 0, 0)), Jpeg()))))
    assert clear.min() > 250


# --- packages


def archive_with(tmp_path: Path, name: str, suffix: str) -> Path:
    path = tmp_path / f"package{suffix}"
    if suffix == ".whl":
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr(name, b"content")
    else:
        with tarfile.open(path, "w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = 7
            tar.addfile(entry, io.BytesIO(b"content"))
    return path


@pytest.mark.parametrize("suffix", [".tgz", ".whl"])
@pytest.mark.parametrize("name", ["../../etc/passwd", "package/../../evil.png", "/etc/passwd"])
def test_an_archive_path_that_leaves_its_folder_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    with pytest.raises(ValueError, match="leaves its folder"):
        members(archive_with(tmp_path, name, suffix), lambda name: True)


@pytest.mark.parametrize("suffix", [".tgz", ".whl"])
def test_members_reads_what_is_wanted(tmp_path: Path, suffix: str) -> None:
    path = archive_with(tmp_path, "package/a.txt", suffix)
    assert members(path, lambda name: name.endswith(".txt")) == {"package/a.txt": b"content"}
    assert members(path, lambda name: False) == {}


@pytest.mark.parametrize("suffix", ["tgz", "deb"])
def test_an_archive_that_was_cut_is_refused_wherever_the_cut_lies(tmp_path: Path, suffix: str) -> None:
    if suffix == "deb" and shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    tree, whole = tmp_path / "tree", tmp_path / f"a.{suffix}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: a\n"
    )
    noise = np.random.default_rng(0)
    for number in range(9):
        (tree / str(number)).write_bytes(noise.bytes(40_000))
    if suffix == "deb":
        subprocess.run(["dpkg-deb", "--build", "-Zgzip", tree, whole], check=True, capture_output=True)
    else:
        with tarfile.open(whole, "w:gz") as tar:
            tar.add(tree, "tree")
    found = members(whole, lambda name: name[-1].isdigit())
    assert [len(found[name]) for name in sorted(found)] == [40_000] * 9
    content, cut = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    for share in range(5, 100, 10):
        cut.write_bytes(content[: len(content) * share // 100])
        with pytest.raises(ValueError, match=r"cut\.(tgz|deb)"):
            members(cut, lambda name: True)


def test_a_missing_client_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm is not installed: install Node"):
        fetch(emoji.LABELS, tmp_path)


def test_an_archive_other_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], folder: Path, doing: str) -> None:
        (folder / "toy-1.0.tgz").write_bytes(b"tampered")

    monkeypatch.setattr(packages, "run_client", download)
    with pytest.raises(ValueError, match="is not the archive"):
        fetch(Package("npm", "toy", "1.0", "0" * 64), tmp_path)
    assert not list((tmp_path / "packages" / "npm").iterdir())


def test_a_cached_archive_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(command: list[str], folder: Path, doing: str) -> None:
        calls.append(command)
        (folder / "tuxpaint-stamps-default_1_all.deb").write_bytes(b"stamps")

    monkeypatch.setattr(packages, "run_client", download)
    assert fetch(tuxpaint.STAMPS, tmp_path) == fetch(tuxpaint.STAMPS, tmp_path)
    assert len(calls) == 1


def test_a_client_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    talk = "import sys; sys.exit('noise\\nE: no such package\\nnoise')"
    with pytest.raises(ConnectionError, match=r"^fetching toy failed: E: no such package; [^\n]*$"):
        packages.run_client([sys.executable, "-c", talk], tmp_path, "fetching toy")


# --- writing


def test_the_same_records_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    records = [record(f"thing-{i}") for i in range(40)]
    for name, order in (("a", records), ("b", records[::-1])):
        write(order, tmp_path / name, Jpeg(size=8), shard_size=10)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_a_broken_image_is_left_out_and_named(tmp_path: Path) -> None:
    summary = write([record("good"), record("bad", image=b"?")], tmp_path, Jpeg(size=8))
    assert sum(summary.samples.values()) == 1
    assert len(summary.skipped) == 1
    assert summary.skipped[0].startswith("bad: not a readable")


def test_shards_are_replaced_only_when_told(tmp_path: Path) -> None:
    many = [record(f"thing-{i}", concept="thing") for i in range(30)]
    write(many, tmp_path, Jpeg(size=8), shard_size=10)
    with pytest.raises(ValueError, match="--overwrite"):
        write(many[:5], tmp_path, Jpeg(size=8))
    write(many[:5], tmp_path, Jpeg(size=8), overwrite=True)
    assert len(list(tmp_path.iterdir())) == 1  # nothing stale is left to be trained on


def test_what_somebody_else_made_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "train-00000.tar"
    for content in (b"no tar", Path(tars.write_tar(tmp_path / "a.tar", [("k", tars.pair(1))])).read_bytes()):
        mine.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-00000.tar was not made by this command"):
            write([record("a")], tmp_path, Jpeg(size=8), overwrite=True)
        assert mine.read_bytes() == content
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").touch()
    for output in (tmp_path / "model", mine):
        with pytest.raises(ValueError, match="which is no part of a model"):
            smollm2.prepare(output, tmp_path, overwrite=True)
    assert (tmp_path / "model" / "thesis.tex").exists()
    captions = tmp_path / "captions"
    captions.mkdir()
    for name in ("1.txt", "labels.json", "best.safetensors"):  # such as models have, but of no model
        (captions / name).touch()
    with pytest.raises(ValueError, match="which is no part of a model"):
        smollm2.prepare(captions, tmp_path, overwrite=True)
    assert len(list(captions.iterdir())) == 3


def test_tuxpaint_pairs_each_png_with_its_first_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = "./usr/share/tuxpaint/stamps/animals/cats/"
    content = {"tiger.png": png(), "tiger.txt": b"A tiger.\nfr.utf8=Un tigre.", "mute.png": png()}
    monkeypatch.setattr(tuxpaint, "fetch", lambda package, cache: tmp_path)
    monkeypatch.setattr(tuxpaint, "members", lambda archive, wanted: {root + k: v for k, v in content.items()})
    [tiger] = tuxpaint.records(tmp_path)
    assert (tiger.key, tiger.caption, tiger.concept) == ("tuxpaint-animals-cats-tiger", "A tiger.", "tiger")
    assert tiger.metadata["category"] == "animals"


# --- the launcher


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_help_is_quick_and_imports_no_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", check], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0
    assert time.monotonic() - start < 2  # a second, and as much again for a busy machine
    assert run.stdout.endswith("False\n")
    assert "examples:" in run.stdout


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    command = [sys.executable, str(LAUNCHER), "smollm2", "--output", str(tmp_path / "here")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "--overwrite" in run.stderr


@pytest.mark.slow
def test_smollm2_becomes_a_directory_that_speaks(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = smollm2.prepare(tmp_path / "smollm2", shared_files.cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(made)
    model: Any = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    assert model.config.tie_word_embeddings
    ids = tokenizer("The capital of France is", return_tensors="pt")
    words = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in words
