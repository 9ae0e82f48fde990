"""Labelled sets are read as they are published. Why: a set read wrongly gives plausible figures."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tars
import torch
from PIL import Image
from test_tasks import image, write
from torch.utils.data import DataLoader

from hive_scale.evaluate import classification_datasets
from hive_scale.evaluate.classification_datasets import KNOWN, open_dataset
from hive_scale.evaluate.encoder import LabelledImages


def rows(count: int, column: str, label: str, first: int = 0) -> list[dict[str, Any]]:
    return [{column: image(i), label: first + i} for i in range(count)]


def save(path: Path, image: str, made: list[dict[str, Any]]) -> None:
    if image == "image":
        write(path, made)
        return
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from test_tasks import IMAGE

    path.parent.mkdir(parents=True, exist_ok=True)
    (label,) = made[0].keys() - {image}
    columns = {image: pa.array([row[image] for row in made], type=IMAGE), label: pa.array([r[label] for r in made])}
    parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "image", "label", "first", "tests", "choice"),
    [
        ("cifar10", "img", "label", 0, {"test": "test"}, None),
        ("cifar100", "img", "fine_label", 0, {"test": "test"}, None),
        ("tiny_imagenet", "image", "label", 0, {"valid": "valid"}, None),
        ("imagenet", "image", "label", 0, {"validation": "validation"}, None),
        ("caltech256", "image", "label", 1, {"test": "test", "validation": "validation"}, "validation"),
        ("pets", "image", "label", 0, {"test": "test"}, None),
    ],
)
def test_the_hubs_parquet(
    tmp_path: Path, name: str, image: str, label: str, first: int, tests: dict[str, str], choice: str | None
) -> None:
    for part in ("train", *tests):
        save(tmp_path / "data" / f"{part}-00000-of-00001.parquet", image, rows(3, image, label, first))
    data = open_dataset(name, tmp_path)
    assert data.train.size == 3
    assert data.test.name == next(iter(tests))
    assert (data.validation.name if data.validation else None) == choice
    pixels, found = data.train.read(2)
    assert found == 2
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 16, 24)


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    save(tmp_path / "train-0.parquet", "image", rows(3, "image", "label", first=36))
    with pytest.raises(ValueError, match="pets, train split, row 1: label 37 is not below 37"):
        open_dataset("pets", tmp_path)


def test_a_set_without_test_images_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "train-0.parquet", "image", rows(3, "image", "label"))
    with pytest.raises(ValueError, match="none of test, validation, valid, val; see timm/oxford-iiit-pet"):
        open_dataset("pets", tmp_path)
    with pytest.raises(ValueError, match="the files are at ethz/food101"):
        open_dataset("food101", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.png", "train/b/1.png", "test/a/.hidden"], "test split: there is no labelled image"),
        (["train/a/.hidden", "train/b/.hidden", "test/a/1.png"], "train split: there is no labelled image"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "val/a/.hidden"], "val split: there is no labelled"),
        (["train/a/1.png", "test/a/1.png"], "has 1 class"),
    ],
)
def test_a_set_of_which_nothing_can_be_told_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(tars.image_bytes(format="PNG"))
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", tmp_path)


def test_class_folders(tmp_path: Path) -> None:
    for path in ("train/cat/1.jpg", "train/dog/2.png", "val/dog/3.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(tars.image_bytes())
    data = open_dataset("folder", tmp_path)
    assert data.num_classes == 2
    assert data.test.read(0)[1] == 1
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match="the class 'cow', which"):
        open_dataset("folder", tmp_path)


def test_what_desktops_leave_in_class_folders_is_no_image(tmp_path: Path) -> None:
    junk = ("train/.DS_Store", "train/.ipynb_checkpoints/1.jpg", "train/cat/.DS_Store", "test/cat/._1.jpg")
    named = ("train/cat/Thumbs.db", "train/dog/notes.txt")
    for path in ("train/cat/1.jpg", "train/dog/deep/2.PNG", "test/cat/1.webp", *junk, *named):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(tars.image_bytes())
    data = open_dataset("folder", tmp_path)
    assert (data.num_classes, data.train.size, data.test.size) == (2, 2, 1)
    assert [data.train.read(i)[1] for i in range(2)] == [0, 1]
    [note] = data.notes
    assert note.startswith("train: 2 files that are no .jpg, .jpeg, .png, .webp, such as ")
    assert note.endswith("Thumbs.db'")


def test_a_broken_image_is_named_once_and_the_next_one_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for i in range(4):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = tars.image_bytes(seed=i)
            path.write_bytes(whole if split == "test" or i != 2 else whole[:-80])  # 2 is the second of class a
    (tmp_path / "test" / "b" / "3.jpg").write_bytes(b"<html>")
    data = open_dataset("folder", tmp_path)
    assert [data.train.read(i)[1] for i in range(4)] == [0, 1, 1, 1]
    assert torch.equal(data.train.read(1)[0], data.train.read(2)[0])
    assert data.test.read(3)[1] == 0, "behind the last one the first"
    assert data.num_broken == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("folder, train split: image 1 is left out (the image cannot be decoded")
    asked: list[Any] = [[(0, None), (1, None)], [(2, None), (3, None)]]
    loader = DataLoader(LabelledImages(data.train, 8, "resize"), batch_sampler=asked, num_workers=2)
    assert [labels.tolist() for _, labels in loader] == [[0, 1], [1, 1]]
    for path in (tmp_path / "test").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="test split: no image from number 0 on can be decoded"):
        data.test.read(0)


def test_rows_and_records_without_image_or_label_are_left_out_and_counted(tmp_path: Path) -> None:
    made = rows(4, "image", "label")
    made[1]["image"], made[2]["label"] = None, None
    for part in ("train", "test"):
        save(tmp_path / "hub" / f"{part}-0.parquet", "image", made)
    data = open_dataset("pets", tmp_path / "hub")
    assert [data.train.read(i)[1] for i in range(data.train.size)] == [0, 3]
    assert data.notes[0] == "train: 2 rows without an image or a label are left out"
    records = [b'{"category": "food"}', b"[]", b"null", b"{", b'{"category": ["x"]}', b"[" * 9999, b'{"category": "a"}']
    pairs = [(str(i), tars.pair(i) | {"json": one}) for i, one in enumerate(records)]
    for part in ("train", "heldout"):
        tars.write_tar(tmp_path / "tars" / f"{part}-00000.tar", [*pairs, ("broken", {"jpg": b"", "txt": b"x"})])
    data = open_dataset("emoji", tmp_path / "tars")
    assert [data.train.read(i)[1] for i in range(data.train.size)] == [1, 0]
    assert "5 samples whose records have no 'category' are left out" in data.notes[1]
    assert "1 faults in its tars" in data.notes[0]


def test_probes_see_images_upright_and_in_eight_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    shown = Image.open(BytesIO(tars.image_bytes(24, 16)))
    buffer = BytesIO()
    shown.save(buffer, "JPEG", exif=exif)
    for split in ("train", "test"):
        save(
            tmp_path / f"{split}-0.parquet",
            "image",
            [{"image": {"bytes": buffer.getvalue(), "path": None}, "label": 0}],
        )
    assert open_dataset("pets", tmp_path).test.read(0)[0].shape == (3, 24, 16)
    grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    known = replace(KNOWN["pets"], torchvision=lambda root: ([(shown, 0), (grey, 1)], [(None, 0), (grey, 1)]))
    data = classification_datasets._torchvision("pets", known, tmp_path)
    assert data is not None
    assert int(data.train.read(1)[0].max()) == 0x80
    assert data.test.read(0)[1] == 1, "what torchvision cannot open is broken, too"


def test_fashion_mnist_as_torchvision_lays_it_out(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 5), ("t10k", 3)):
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(range(28)) * 28 * count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], ">i4").tobytes() + bytes(range(count))
        )
    data = open_dataset("fashion_mnist", tmp_path)
    assert (data.train.size, data.test.size, data.num_classes) == (5, 3, 10)
    pixels, label = data.test.read(2)
    assert label == 2
    assert pixels.shape == (3, 28, 28)
    assert pixels[1, 0].tolist() == list(range(28))


def test_tars_of_this_toolkit(tmp_path: Path) -> None:
    for split, categories in (("train", ["food", "animals"]), ("heldout", ["food", "unheard of"])):
        pairs = [
            (str(i), tars.pair(i) | {"json": json.dumps({"category": c}).encode()}) for i, c in enumerate(categories)
        ]
        tars.write_tar(tmp_path / f"{split}-00000.tar", pairs)
    data = open_dataset("emoji", tmp_path)
    assert data.num_classes == 2
    assert [data.train.read(i)[1] for i in range(2)] == [1, 0]
    assert data.test.size == 1  # of a class that training has not shown, nothing can be said
    torch.testing.assert_close(data.test.read(0)[0], data.train.read(0)[0])


def rewrite(path: Path) -> None:
    """An image of another size, at the same instant as far as the file says."""
    before = path.stat()
    path.write_bytes(tars.image_bytes(48, 48, seed=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_set_is_known_by_its_files_names_sizes_and_times(tmp_path: Path) -> None:
    deep = "train/dog/at/any/depth.jpg"
    for path in ("train/cat/1.jpg", "train/dog/2.png", deep, "val/dog/3.jpg", "notes/of-mine.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(tars.image_bytes())
    seen = [open_dataset("folder", tmp_path).identity]
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    (moved / "notes" / "of-mine.txt").write_text("what is beside the images does not count")
    assert open_dataset("folder", moved).identity == seen[0]
    changes = [
        lambda: (moved / "train" / "ant").mkdir(),  # every label is another now
        lambda: (moved / "train" / "dog" / "2.png").rename(moved / "train" / "cat" / "2.png"),
        lambda: os.utime(moved / "val" / "dog" / "3.jpg", ns=(1, 1)),
        lambda: (moved / "val" / "dog" / "3.jpg").write_bytes(tars.image_bytes(seed=1)),
        lambda: rewrite(moved / "val" / "dog" / "3.jpg"),
        lambda: rewrite(moved / deep),
        lambda: (moved / "train" / "dog" / "4.jpg").write_bytes(tars.image_bytes()),
    ]
    for change in changes:
        change()
        seen.append(open_dataset("folder", moved).identity)
    assert len({*seen}) == len(seen)


def test_parquet_files_with_other_labels_are_another_set(tmp_path: Path) -> None:
    seen = []
    for first in (0, 1):
        for part in ("train", "test"):
            save(tmp_path / f"{part}-0.parquet", "img", rows(3, "img", "label", first))
        seen.append(open_dataset("cifar10", tmp_path).identity)
    assert seen[0] != seen[1]
    assert seen[1] == open_dataset("cifar10", tmp_path).identity
