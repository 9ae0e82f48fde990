"""Labelled sets as they are published: a set read wrongly gives figures that look like any others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tars
import torch
from test_tasks import picture, write

from hive_scale.evaluate.labelled import open_labelled


def rows(count: int, image: str, label: str, first: int = 0) -> list[dict[str, Any]]:
    return [{image: picture(i), label: first + i} for i in range(count)]


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
    data = open_labelled(name, tmp_path)
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
        open_labelled("pets", tmp_path)


def test_a_set_without_test_pictures_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "train-0.parquet", "image", rows(3, "image", "label"))
    with pytest.raises(ValueError, match="none of test, validation, valid, val; see timm/oxford-iiit-pet"):
        open_labelled("pets", tmp_path)
    with pytest.raises(ValueError, match="the files are at ethz/food101"):
        open_labelled("food101", tmp_path / "nowhere")


def test_class_folders(tmp_path: Path) -> None:
    for path in ("train/cat/1.jpg", "train/dog/2.png", "val/dog/3.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(tars.picture_bytes())
    data = open_labelled("folder", tmp_path)
    assert data.num_classes == 2
    assert data.test.read(0)[1] == 1
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match="the class 'cow', which"):
        open_labelled("folder", tmp_path)


def test_fashion_mnist_as_torchvision_lays_it_out(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 5), ("t10k", 3)):
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(range(28)) * 28 * count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], ">i4").tobytes() + bytes(range(count))
        )
    data = open_labelled("fashion_mnist", tmp_path)
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
    data = open_labelled("emoji", tmp_path)
    assert data.num_classes == 2
    assert [data.train.read(i)[1] for i in range(2)] == [1, 0]
    assert data.test.size == 1  # of a class that training has not shown, nothing can be said
    torch.testing.assert_close(data.test.read(0)[0], data.train.read(0)[0])


def rewrite(path: Path) -> None:
    """A picture of another size, at the same instant as far as the file says."""
    before = path.stat()
    path.write_bytes(tars.picture_bytes(48, 48, seed=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_set_is_known_by_its_files_names_sizes_and_times(tmp_path: Path) -> None:
    for path in ("train/cat/1.jpg", "train/dog/2.png", "val/dog/3.jpg", "notes/of-mine.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(tars.picture_bytes())
    seen = [open_labelled("folder", tmp_path).identity]
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    (moved / "notes" / "of-mine.txt").write_text("what is beside the pictures does not count")
    assert open_labelled("folder", moved).identity == seen[0]
    changes = [
        lambda: (moved / "train" / "ant").mkdir(),  # every label is another now
        lambda: (moved / "train" / "dog" / "2.png").rename(moved / "train" / "cat" / "2.png"),
        lambda: os.utime(moved / "val" / "dog" / "3.jpg", ns=(1, 1)),
        lambda: (moved / "val" / "dog" / "3.jpg").write_bytes(tars.picture_bytes(seed=1)),
        lambda: rewrite(moved / "val" / "dog" / "3.jpg"),
        lambda: (moved / "train" / "dog" / "4.jpg").write_bytes(tars.picture_bytes()),
    ]
    for change in changes:
        change()
        seen.append(open_labelled("folder", moved).identity)
    assert len({*seen}) == len(seen)


def test_parquet_files_with_other_labels_are_another_set(tmp_path: Path) -> None:
    seen = []
    for first in (0, 1):
        for part in ("train", "test"):
            save(tmp_path / f"{part}-0.parquet", "img", rows(3, "img", "label", first))
        seen.append(open_labelled("cifar10", tmp_path).identity)
    assert seen[0] != seen[1]
    assert seen[1] == open_labelled("cifar10", tmp_path).identity
