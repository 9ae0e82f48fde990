"""Records -> WebDataset tars whose bytes depend on the records alone, split by concept."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import webdataset

from hive_scale.prepare.concepts import fraction, split_of
from hive_scale.prepare.jpeg import Jpeg, to_jpeg

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
OWNER = "hive"  # of every member of a shard that is written here


@dataclass(frozen=True)
class Record:
    """One image with its text, as a source yields it. `image` is encoded (PNG, WebP or JPEG)."""

    key: str  # unique in its set, no dots: it becomes a file name in the tar
    image: bytes
    caption: str
    concept: str  # records of one concept stay on one side of the split
    metadata: dict[str, str]


@dataclass
class Summary:
    """What was written: samples and bytes per split, and every record left out, with the reason."""

    samples: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    num_bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    skipped: list[str] = field(default_factory=list)


def write(
    records: Iterable[Record],
    output: Path,
    recipe: Jpeg,
    shard_size: int = 500,
    overwrite: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> Summary:
    """Write ``train-00000.tar ...`` and ``heldout-00000.tar ...`` of `shard_size` samples into `output`.

    Samples lie in an order that looks random but depends on their keys alone. An image that cannot be used is
    skipped and named. `advance` is called once a record. Raises ValueError if `output` holds shards already.
    """
    old = shards_in(output, overwrite)
    if shard_size < 1:
        raise ValueError(f"shard size {shard_size} must be at least 1")
    output.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    ordered = sorted(records, key=lambda record: (fraction(record.key), record.key))
    assert len({record.key for record in ordered}) == len(ordered), "a key twice in one set"
    new = []
    for split in SPLITS:
        samples = _samples((r for r in ordered if split_of(r.concept) == split), recipe, summary, advance)
        while shard := list(islice(samples, shard_size)):
            path = output / f"{split}-{summary.samples[split] // shard_size:05d}.tar"
            summary.samples[split] += len(shard)
            summary.num_bytes[split] += write_shard(shard, path)
            new.append(path)
    for path in set(old) - set(new):
        path.unlink()
    return summary


def shards_in(output: Path, overwrite: bool) -> list[Path]:
    """The shards that `write` would replace. Raises ValueError if there are any and `overwrite` is not set."""
    old = [path for split in SPLITS for path in output.glob(f"{split}-*.tar")]
    if old and not overwrite:
        raise ValueError(f"{output} holds shards already: choose another --output, or say --overwrite")
    check_made_here(old)
    return old


def check_made_here(shards: Iterable[Path]) -> None:
    """Raises ValueError if one of `shards`, which are to be replaced, was not written by `write_shard`."""
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                first = tar.next()
        except (OSError, tarfile.TarError):
            first = None
        if first is None or first.uname != OWNER:
            raise ValueError(
                f"{shard} was not made by this command, and --overwrite replaces its own shards alone: choose another "
                "--output, or move that file away"
            )


def _samples(
    records: Iterable[Record], recipe: Jpeg, summary: Summary, advance: Callable[[], object]
) -> Iterator[dict[str, str | bytes]]:
    for record in records:
        advance()
        try:
            image = to_jpeg(record.image, recipe)
        except ValueError as error:
            summary.skipped.append(f"{record.key}: {error}")
            continue
        facts = record.metadata | {"concept": record.concept}
        yield {
            "__key__": record.key,
            "jpg": image,
            "txt": record.caption.encode(),
            "json": json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False).encode(),
        }


def write_shard(samples: Iterable[dict[str, str | bytes]], path: Path) -> int:
    """Write `samples` as a tar at `path`; its bytes depend on them alone. Returns its size."""
    part = path.with_suffix(".part")  # a shard is there whole or not at all
    with part.open("wb") as stream:
        # owner and time are fixed, the format is ustar: nothing of this machine or day gets in
        with webdataset.TarWriter(stream, user=OWNER, group=OWNER, mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        size = stream.tell()
    os.replace(part, path)
    return size
