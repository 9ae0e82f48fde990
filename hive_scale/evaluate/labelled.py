"""Labelled pictures by name, in the layouts in which they are published.

A folder holds parquet files (the hub's), a folder per class under train/ and test/ (or val/), what torchvision
downloads, or tars of this toolkit whose records carry the label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from hive_scale.config import DataConfig
from hive_scale.data.cache import ShardCache
from hive_scale.data.index import open_index
from hive_scale.data.shards import ShardReader, all_shards, expand
from hive_scale.data.transform import decode
from hive_scale.evaluate.files import nothing_in, rows
from hive_scale.model.identity import key_of

MAX_PIXELS = DataConfig().max_pixels


@dataclass(frozen=True)
class Split:
    """Pictures with labels, by number: `read(i)` gives uint8 (3, H, W) and the label."""

    name: str
    size: int
    read: Callable[[int], tuple[Tensor, int]]


@dataclass(frozen=True)
class Labelled:
    """A set for classification. Without a split to choose settings on, part of `train` must serve."""

    name: str
    num_classes: int
    train: Split
    test: Split
    validation: Split | None
    where: str = ""  # the folder it was read from
    identity: str = ""  # tells its pictures and labels from all others, as far as names, sizes and times of files do


@dataclass(frozen=True)
class Known:
    """How a published set says what it holds."""

    num_classes: int = 0  # 0: as many as are found
    picture: str = "image"
    label: str = "label"
    first: int = 0  # the lowest label
    torchvision: Callable[[Path], tuple[Any, Any]] | None = None  # (train, test)
    tests: tuple[str, ...] = ("test", "validation", "valid", "val")  # the first that is there
    source: str = ""


def _pair(name: str, first: dict[str, Any], second: dict[str, Any], root: Path) -> tuple[Any, Any]:
    made: Any = getattr(torchvision.datasets, name)
    return made(root, **first), made(root, **second)


def _tv(name: str, key: str = "split", train: Any = "train", test: Any = "test") -> Any:
    return partial(_pair, name, {key: train}, {key: test})


KNOWN = {
    "cifar10": Known(10, "img", torchvision=_tv("CIFAR10", "train", True, False), source="uoft-cs/cifar10"),
    "cifar100": Known(
        100, "img", "fine_label", torchvision=_tv("CIFAR100", "train", True, False), source="uoft-cs/cifar100"
    ),
    # the hub's test split has no labels
    "imagenet": Known(
        1000, torchvision=_tv("ImageNet", test="val"), tests=("validation", "val"), source="ILSVRC/imagenet-1k"
    ),
    "tiny_imagenet": Known(200, source="zh-plus/tiny-imagenet", tests=("valid", "validation", "val")),
    "food101": Known(101, torchvision=_tv("Food101"), tests=("validation", "test"), source="ethz/food101"),
    "stanford_cars": Known(196, torchvision=_tv("StanfordCars"), source="tanganke/stanford_cars"),
    "pets": Known(37, torchvision=_tv("OxfordIIITPet", train="trainval"), source="timm/oxford-iiit-pet"),
    "caltech256": Known(257, first=1, source="ilee0022/Caltech-256"),
    "fashion_mnist": Known(
        10, torchvision=_tv("FashionMNIST", "train", True, False), source="launchers/prepare_data.py fashion_mnist"
    ),
    "emoji": Known(label="category", source="launchers/prepare_data.py emoji --styles all"),
    "folder": Known(source="a folder per class, under train/ and test/"),
}


def open_labelled(name: str, root: Path) -> Labelled:
    """The set `name` as it lies in `root`.

    Raises ValueError for an unknown name, files that are missing, and labels out of range.
    """
    if name not in KNOWN:
        near = get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KNOWN)}"
        raise ValueError(f"there is no data set '{name}': {hint}")
    known = KNOWN[name]
    layouts: dict[Callable[[str, Known, Path], Labelled | None], tuple[str, ...]] = {
        _parquet: ("**/*.parquet",),
        # a class without pictures is counted, too
        _folders: tuple(f"{part}/{files}" for part in ("train", *known.tests) for files in ("*", "*/*")),
        _tars: ("*.tar",),
        _torchvision: ("*", "*/*", "*/*/*", "*/*/*/*"),
    }
    for layout, files in layouts.items():
        if found := layout(name, known, root):
            return replace(found, where=str(root.resolve()), identity=_identity(name, root, files))
    raise nothing_in(root, "parquet files, class folders, tars or torchvision's files", known.source)


def _identity(name: str, root: Path, patterns: Sequence[str]) -> str:
    """Of a set's files: to read them all would take as long as an epoch."""
    held = {str(path.relative_to(root)): path for pattern in patterns for path in root.glob(pattern)}
    files = {file: path.stat() for file, path in held.items() if path.is_file()}
    return key_of(name, sorted(held), {file: [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()})


def _parquet(name: str, known: Known, root: Path) -> Labelled | None:
    def split(part: str) -> Split | None:
        files = sorted(root.rglob(f"{part}-*.parquet"))
        if not files:
            return None
        found = rows(files, known.picture, [known.label])
        labels = [row[known.label] - known.first for row in found]
        _check(name, part, labels, known.num_classes)
        return Split(part, len(found), lambda i: (decode(found[i]["picture"].read(), MAX_PIXELS), labels[i]))

    return _assemble(name, known, split, known.num_classes)


def _folders(name: str, known: Known, root: Path) -> Labelled | None:
    if not (root / "train").is_dir():
        return None
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())

    def split(part: str) -> Split | None:
        if not (root / part).is_dir():
            return None
        if new := {path.name for path in (root / part).iterdir() if path.is_dir()} - set(classes):
            raise ValueError(f"{root / part} has the class '{min(new)}', which {root / 'train'} does not have")
        paths = [(path, label) for label, one in enumerate(classes) for path in sorted((root / part / one).glob("*"))]
        return Split(part, len(paths), lambda i: (decode(paths[i][0].read_bytes(), MAX_PIXELS), paths[i][1]))

    if known.num_classes and len(classes) != known.num_classes:
        raise ValueError(f"{root / 'train'} has {len(classes)} classes, {name} has {known.num_classes}")
    return _assemble(name, known, split, len(classes))


def _tars(name: str, known: Known, root: Path) -> Labelled | None:
    if not sorted(root.glob("train-*.tar")):
        return None
    cache = ShardCache(round(DataConfig().cache_gb * 1e9))
    names: list[str] = []  # classes are those of the training pictures

    def split(part: str) -> Split | None:
        files = sorted(root.glob(f"{part}-*.tar"))
        if not files:
            return None
        index = open_index(all_shards(expand([str(path) for path in files])), cache)
        reader = ShardReader(index.shards, cache)

        def member(i: int, which: int) -> bytes:
            start, length = index.members[i, which].tolist()
            return reader.read(index.shard_of(i), start, length)

        told = [json.loads(member(i, 2) or b"{}").get(known.label) for i in range(len(index))]
        if None in told:
            raise ValueError(f"{files[0].parent}: the records of {part}-*.tar have no '{known.label}'")
        if part == "train":
            names.extend(sorted(set(told)))
        usable = [i for i, one in enumerate(told) if one in names]
        return Split(
            part,
            len(usable),
            lambda i: (decode(member(usable[i], 0), MAX_PIXELS), names.index(told[usable[i]])),
        )

    train, test = split("train"), split("heldout")
    if train is None or test is None:
        raise ValueError(f"{root} has no heldout-*.tar: prepare the set again")
    return Labelled(name, len(names), train, test, None)


def _torchvision(name: str, known: Known, root: Path) -> Labelled | None:
    if known.torchvision is None:
        return None
    try:
        train, test = known.torchvision(root)
    except (RuntimeError, FileNotFoundError):  # what torchvision raises for files that are missing or damaged
        return None

    def split(part: str, found: Any) -> Split:
        def read(i: int) -> tuple[Tensor, int]:
            image, label = found[i]
            return vision.pil_to_tensor(image.convert("RGB")), int(label)

        return Split(part, len(found), read)

    return Labelled(name, known.num_classes, split("train", train), split("test", test), None)


def _assemble(name: str, known: Known, split: Callable[[str], Split | None], num_classes: int) -> Labelled | None:
    train = split("train")
    if train is None:
        return None
    found = [one for part in known.tests if (one := split(part))]
    if not found:
        raise ValueError(f"{name}: there is a train split, but none of {', '.join(known.tests)}; see {known.source}")
    return Labelled(name, num_classes, train, found[0], found[1] if len(found) > 1 else None)


def _check(name: str, part: str, labels: Sequence[int], num_classes: int) -> None:
    for place, label in enumerate(labels):
        if not 0 <= label < num_classes:
            raise ValueError(f"{name}, {part} split, row {place}: label {label} is not below {num_classes}, or below 0")
