"""Classification datasets by name, in the layouts in which they are published.

A folder holds parquet files (from the hub), a folder per class under train/ and test/ (or val/), torchvision's
downloads, or tars of this toolkit whose records carry the label.

An image that cannot be decoded is replaced by the next one that can, with that one's label.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from hive_scale.config import DataConfig
from hive_scale.data.class_folders import ENDINGS, class_files, class_folders
from hive_scale.data.images import read_image, upright_rgb
from hive_scale.data.index import Index, open_index
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import ShardReader, all_shards, expand
from hive_scale.data.transform import decode
from hive_scale.evaluate.readers import missing_files_error, rows
from hive_scale.model.identity import key_of
from hive_scale.strangers import printable
from hive_scale.strict_json import LARGEST_LINE, loads

MAX_PIXELS = DataConfig().max_pixels
TRIES = 100  # consecutive undecodable images after which the set counts as damaged, or its disk as gone
Read = Callable[[int], tuple[Tensor, int]]


@dataclass(frozen=True)
class Split:
    """Images with labels, by number: `read(i)` returns uint8 (3, H, W) and the label.

    `broken`, uint8 (size,), is 1 for each image found broken by this process or one forked from it.
    """

    name: str
    size: int
    read: Read
    broken: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8), compare=False, repr=False)


@dataclass(frozen=True)
class ClassificationDataset:
    """A dataset for classification. If it has no validation split, part of `train` is held back to choose settings."""

    name: str
    num_classes: int
    train: Split
    test: Split
    validation: Split | None
    where: str = ""  # the folder it was read from
    identity: str = ""  # identifies its images and labels, by names, sizes and times of its files
    notes: tuple[str, ...] = ()  # files and rows that were left out, and why

    @property
    def num_broken(self) -> int:
        """Number of undecodable images met so far."""
        return sum(int(one.broken.sum()) for one in (self.train, self.test, self.validation) if one)


@dataclass(frozen=True)
class DatasetSpec:
    """Columns, labels and splits of a published dataset."""

    num_classes: int = 0  # 0: as many as the files have
    image_column: str = "image"
    label: str = "label"
    first: int = 0  # the lowest label
    torchvision: Callable[[Path], tuple[Any, Any]] | None = None  # (train, test)
    # names of the test split; the first that exists is used
    tests: tuple[str, ...] = ("test", "validation", "valid", "val")
    source: str = ""


def _pair(name: str, first: dict[str, Any], second: dict[str, Any], root: Path) -> tuple[Any, Any]:
    made: Any = getattr(torchvision.datasets, name)
    return made(root, **first), made(root, **second)


def _tv(name: str, key: str = "split", train: Any = "train", test: Any = "test") -> Any:
    return partial(_pair, name, {key: train}, {key: test})


KNOWN = {
    "cifar10": DatasetSpec(10, "img", torchvision=_tv("CIFAR10", "train", True, False), source="uoft-cs/cifar10"),
    "cifar100": DatasetSpec(
        100, "img", "fine_label", torchvision=_tv("CIFAR100", "train", True, False), source="uoft-cs/cifar100"
    ),
    # the hub's test split has no labels, so validation serves as test
    "imagenet": DatasetSpec(
        1000, torchvision=_tv("ImageNet", test="val"), tests=("validation", "val"), source="ILSVRC/imagenet-1k"
    ),
    "tiny_imagenet": DatasetSpec(200, source="zh-plus/tiny-imagenet", tests=("valid", "validation", "val")),
    "food101": DatasetSpec(101, torchvision=_tv("Food101"), tests=("validation", "test"), source="ethz/food101"),
    "stanford_cars": DatasetSpec(196, torchvision=_tv("StanfordCars"), source="tanganke/stanford_cars"),
    "pets": DatasetSpec(37, torchvision=_tv("OxfordIIITPet", train="trainval"), source="timm/oxford-iiit-pet"),
    "caltech256": DatasetSpec(257, first=1, source="ilee0022/Caltech-256"),
    "fashion_mnist": DatasetSpec(
        10, torchvision=_tv("FashionMNIST", "train", True, False), source="launchers/prepare_data.py fashion_mnist"
    ),
    "emoji": DatasetSpec(label="category", source="launchers/prepare_data.py emoji --styles all"),
    "folder": DatasetSpec(source="a folder per class, under train/ and test/"),
}


def open_dataset(name: str, root: Path) -> ClassificationDataset:
    """Open the dataset `name` from the folder `root`.

    Raises ValueError for an unknown name, missing files, labels out of range, and a split without images.
    """
    if name not in KNOWN:
        near = get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KNOWN)}"
        raise ValueError(f"there is no data set '{name}': {hint}")
    known = KNOWN[name]
    layouts: dict[Callable[[str, DatasetSpec, Path], ClassificationDataset | None], tuple[str, ...]] = {
        _parquet: ("**/*.parquet",),
        # class folders without images count as well
        _folders: tuple(f"{part}/{files}" for part in ("train", *known.tests) for files in ("*", "*/**/*")),
        _tars: ("*.tar",),
        _torchvision: ("*", "*/*", "*/*/*", "*/*/*/*"),
    }
    for layout, files in layouts.items():
        if found := layout(name, known, root):
            _check_size(found, root)
            return replace(found, where=str(root.resolve()), identity=_identity(name, root, files))
    raise missing_files_error(root, "parquet files, class folders, tars or torchvision's files", known.source)


def _check_size(found: ClassificationDataset, root: Path) -> None:
    """Raise ValueError for an empty split or fewer than two classes, which would still yield a score."""
    for split in (found.train, found.test, found.validation):
        if split and not split.size:
            raise ValueError(f"{found.name}, {split.name} split: there is no labelled image in {root}")
    if found.num_classes < 2:
        raise ValueError(f"{found.name} has {found.num_classes} class in {root}: to tell classes apart takes two")


def _identity(name: str, root: Path, patterns: Sequence[str]) -> str:
    """Hash of names, sizes and times of the dataset's files; reading all contents would take as long as an epoch."""
    held = {str(path.relative_to(root)): path for pattern in patterns for path in root.glob(pattern)}
    files = {file: path.stat() for file, path in held.items() if path.is_file()}
    return key_of(name, sorted(held), {file: [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()})


def _parquet(name: str, known: DatasetSpec, root: Path) -> ClassificationDataset | None:
    def split(part: str) -> Split | None:
        files = sorted(root.rglob(f"{part}-*.parquet"))
        if not files:
            return None
        found = rows(files, known.image_column, [known.label])
        labels = _labels(name, part, [row[known.label] for row in found], known)
        whole = [i for i, row in enumerate(found) if row["image"] is not None and labels[i] is not None]
        if len(whole) < len(found):
            notes.append(f"{part}: {len(found) - len(whole):,} rows without an image or a label are left out")

        def read(i: int) -> tuple[Tensor, int]:
            return decode(found[whole[i]]["image"].read(), MAX_PIXELS), labels[whole[i]]

        return _split(name, part, len(whole), read)

    notes: list[str] = []
    return _assemble(name, known, split, known.num_classes, notes)


def _folders(name: str, known: DatasetSpec, root: Path) -> ClassificationDataset | None:
    if not (root / "train").is_dir():
        return None
    classes = [path.name for path in class_folders(root / "train")]

    def split(part: str) -> Split | None:
        if not (root / part).is_dir():
            return None
        if new := {path.name for path in class_folders(root / part)} - set(classes):
            raise ValueError(f"{root / part} has the class '{min(new)}', which {root / 'train'} does not have")
        found = [class_files(root / part / one) for one in classes]
        paths = [(path, label) for label, (images, _) in enumerate(found) for path in images]
        if others := [path for _, rest in found for path in rest]:
            notes.append(f"{part}: {len(others):,} files that are no {', '.join(ENDINGS)}, such as {str(others[0])!r}")

        def read(i: int) -> tuple[Tensor, int]:
            path, label = paths[i]
            return decode(read_image(path), MAX_PIXELS), label

        return _split(name, part, len(paths), read)

    if known.num_classes and len(classes) != known.num_classes:
        raise ValueError(f"{root / 'train'} has {len(classes)} classes, {name} has {known.num_classes}")
    notes: list[str] = []
    return _assemble(name, known, split, len(classes), notes)


def _tars(name: str, known: DatasetSpec, root: Path) -> ClassificationDataset | None:
    if not sorted(root.glob("train-*.tar")):
        return None
    cache = ShardCache(round(DataConfig().cache_gb * 1e9))
    names: list[str] = []  # class names, from the training images
    notes: list[str] = []

    def split(part: str) -> Split | None:
        files = sorted(root.glob(f"{part}-*.tar"))
        if not files:
            return None
        index = open_index(all_shards(expand([str(path) for path in files])), cache)
        reader = ShardReader(index.shards, index.stamps, cache)

        told = [_label(_member(index, reader, i, 2), known.label) for i in range(len(index))]
        if not any(told):
            raise ValueError(f"{files[0].parent}: the records of {part}-*.tar have no '{known.label}'")
        if part == "train":
            names.extend(sorted({one for one in told if one}))
        usable = [(i, names.index(one)) for i, one in enumerate(told) if one in names]
        if index.faults:
            notes.append(f"{part}: {len(index.faults):,} faults in its tars, such as {index.faults[0].describe()}")
        if unlabelled := told.count(""):
            notes.append(f"{part}: {unlabelled:,} samples whose records have no '{known.label}' are left out")

        def read(i: int) -> tuple[Tensor, int]:
            number, label = usable[i]
            return decode(_member(index, reader, number, 0), MAX_PIXELS), label

        return _split(name, part, len(usable), read)

    train, test = split("train"), split("heldout")
    if train is None or test is None:
        raise ValueError(f"{root} has no heldout-*.tar: prepare the set again")
    return ClassificationDataset(name, len(names), train, test, None, notes=tuple(notes))


def _member(index: Index, reader: ShardReader, i: int, which: int) -> bytes:
    start, length = index.members[i, which].tolist()
    return reader.read(index.shard_of(i), start, length)


def _label(record: bytes, name: str) -> str:
    """Return the label called `name` in a sample's record, or ""."""
    try:
        label = loads(record, LARGEST_LINE)[name]
    except (ValueError, TypeError, LookupError):  # no JSON, no object, or no such key
        return ""
    return str(label) if isinstance(label, str | int) else ""


def _torchvision(name: str, known: DatasetSpec, root: Path) -> ClassificationDataset | None:
    if known.torchvision is None:
        return None
    try:
        train, test = known.torchvision(root)
    except (RuntimeError, FileNotFoundError):  # raised by torchvision for missing or damaged files
        return None

    def split(part: str, found: Any) -> Split:
        def read(i: int) -> tuple[Tensor, int]:
            try:
                image, label = found[i]
                return vision.pil_to_tensor(upright_rgb(image)), int(label)
            except Exception as error:  # PIL's decoders raise any exception on broken input
                raise ValueError(f"image {i} cannot be decoded: {error}") from None

        return _split(name, part, len(found), read)

    return ClassificationDataset(name, known.num_classes, split("train", train), split("test", test), None)


def _split(name: str, part: str, size: int, read: Read) -> Split:
    """Return a split whose `read` skips broken images to the next sound one, and reports each broken one once."""
    # shared with forked data workers, so that an image reported in one epoch is not reported again in the next
    broken = np.frombuffer(mmap(-1, max(1, size)), np.uint8)[:size]

    def sound(i: int) -> tuple[Tensor, int]:
        reason = ""
        for place in islice(chain(range(i, size), range(i)), TRIES):
            try:
                return read(place)
            except ValueError as error:
                reason = str(error)
                if not broken[place]:
                    broken[place] = 1
                    told = f"{name}, {part} split: image {place} is left out ({reason})"
                    print(printable(told), file=sys.stderr)
        raise ValueError(f"{name}, {part} split: no image from number {i} on can be decoded; the last: {reason}")

    return Split(part, size, sound, broken)


def _assemble(
    name: str, known: DatasetSpec, split: Callable[[str], Split | None], num_classes: int, notes: Sequence[str]
) -> ClassificationDataset | None:
    train = split("train")
    if train is None:
        return None
    found = [one for part in known.tests if (one := split(part))]
    if not found:
        raise ValueError(f"{name}: there is a train split, but none of {', '.join(known.tests)}; see {known.source}")
    return ClassificationDataset(
        name, num_classes, train, found[0], found[1] if len(found) > 1 else None, notes=tuple(notes)
    )


def _labels(name: str, part: str, found: Sequence[Any], known: DatasetSpec) -> list[Any]:
    """Return labels from 0, None where missing. Raises ValueError for one out of range: it is another dataset."""
    for place, label in enumerate(found):
        if label is not None and not (isinstance(label, int) and 0 <= label - known.first < known.num_classes):
            wrong = f"label {label} is not below {known.num_classes + known.first}, or below {known.first}"
            raise ValueError(f"{name}, {part} split, row {place}: {wrong}")
    return [label if label is None else label - known.first for label in found]
