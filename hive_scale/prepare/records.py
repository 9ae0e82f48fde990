"""Write records as WebDataset tars, split by concept; the bytes depend on the records alone."""

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
OWNER = "hive"  # owner of every tar member, by which shards made here are recognised


@dataclass(frozen=True)
class Record:
    """One image with its text, as produced by a source. `image` is encoded (PNG, WebP or JPEG)."""

    key: str  # unique in its set, no dots: it becomes a file name in the tar
    image: bytes
    caption: str
    concept: str  # records of one concept stay on one side of the split
    metadata: dict[str, str]


@dataclass
class Summary:
    """Samples and bytes written per split, and every skipped record with the reason."""

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

    Samples are in a pseudo-random order that depends on their keys alone. Unusable images are skipped and listed.
    `advance` is called once per record. Raises ValueError if `output` already holds shards and `overwrite` is not set,
    or `shard_size` is below 1.
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
    """Return the shards that `write` would replace. Raises ValueError if there are any and `overwrite` is not set."""
    old = [path for split in SPLITS for path in output.glob(f"{split}-*.tar")]
    if old and not overwrite:
        raise ValueError(f"{output} holds shards already: choose another --output, or say --overwrite")
    check_made_here(old)
    return old


def check_made_here(shards: Iterable[Path]) -> None:
    """Raise ValueError if any of `shards`, which are about to be replaced, was not written by `write_shard`."""
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
    """Write `samples` as a tar at `path`, with bytes that depend on them alone. Returns its size in bytes."""
    part = path.with_suffix(".part")  # renamed when complete, so that no partial shard appears
    with part.open("wb") as stream:
        # fixed owner, time and format (ustar) keep machine and date out of the bytes
        with webdataset.TarWriter(stream, user=OWNER, group=OWNER, mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        size = stream.tell()
    os.replace(part, path)
    return size
