"""Convert items to shards with several processes; shards appear whole, and an interrupted run resumes.

The items of each shard depend on the source alone, so that a repeated run knows what is done.
"""

from __future__ import annotations

import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from hive_scale.data.images import FORMATS
from hive_scale.prepare.concepts import split_of
from hive_scale.prepare.items import Item, Source
from hive_scale.prepare.records import check_made_here, write_shard
from hive_scale.shared_files import locked
from hive_scale.strict_json import dumps, loads

JOURNAL = "conversion.jsonl"
# MPO is a phone's JPEG with further images behind it.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
SPLITS = ("train", "heldout")

Numbered = tuple[int, Item]


@dataclass(frozen=True)
class Shard:
    """Result of writing one shard; also a line of the journal."""

    name: str
    samples: int
    num_bytes: int
    skipped: list[tuple[str, ...]] = field(default_factory=list)  # (number of the record, reason, file and row)
    further: int = 0  # captions besides the one of each sample: in its record
    conversations: int = 0  # samples whose record has a conversation

    def __post_init__(self) -> None:
        """Raises TypeError for what no shard of ours is: a journal may be anyone's."""
        if not isinstance(self.name, str) or Path(self.name).name != self.name:
            raise TypeError(f"{self.name!r} is no file's name")
        numbers = (self.samples, self.num_bytes, self.further, self.conversations)
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError(f"{self.name} has no number of samples or bytes")


@dataclass(frozen=True)
class ShardLayout:
    """Layout of a set: samples per shard, and the share `heldout` of groups (see `Item.group`) that are held out."""

    shard_size: int = 1000
    heldout: float = 0.002

    def __post_init__(self) -> None:
        if self.shard_size < 1 or not 0 <= self.heldout < 1:
            raise ValueError(
                f"shard size {self.shard_size}, held out {self.heldout}: use a size of 1 or more and a share below 1"
            )


def convert(
    source: Source,
    output: Path,
    layout: ShardLayout,
    workers: int,
    overwrite: bool = False,
    advance: Callable[[int, int], object] = lambda done, samples: None,
) -> list[Shard]:
    """Write `source` as ``train-00000.tar ...`` and ``heldout-00000.tar ...`` into `output`; return the shards.

    Images keep their bytes. Records with an unusable image or text are skipped, and listed in ``conversion.jsonl``.
    The same call resumes after the complete shards. `advance` receives the position in the source and the number of
    samples written. Raises ValueError if `output` holds another set, if the source has no record, if the first shard
    is empty, or if a worker dies.
    """
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock"):
        journal = _Journal(output, {**source.identity, **asdict(layout)}, overwrite)
        waiting: deque[tuple[int, Future[Shard]]] = deque()
        with ProcessPoolExecutor(workers, get_context("fork"), _leave_signals) as pool:
            try:
                for name, items in _cut(source.items(), layout):
                    if name in journal.done:
                        advance(items[-1][1].done, journal.samples)
                        continue
                    waiting.append((items[-1][1].done, pool.submit(_write, output / name, items)))
                    while len(waiting) > 2 * workers:  # just enough in memory to keep all workers busy
                        advance(_finish(waiting, journal), journal.samples)
                while waiting:
                    advance(_finish(waiting, journal), journal.samples)
            except BrokenProcessPool:
                raise ValueError(
                    "a worker process died, for want of memory perhaps: use fewer --workers; the same command again "
                    "goes on after the shards that are done"
                ) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                for _, future in waiting:  # shards in progress are complete by now
                    if not future.cancelled() and not future.exception():
                        journal.add(future.result())
                raise
        if not journal.done:
            raise ValueError(f"there is no record in {source.name}: is it empty, or cut behind its header?")
        return list(journal.done.values())


def _finish(waiting: deque[tuple[int, Future[Shard]]], journal: _Journal) -> int:
    done, future = waiting.popleft()
    journal.add(future.result())
    return done


def _cut(items: Iterable[Item], layout: ShardLayout) -> Iterator[tuple[str, list[Numbered]]]:
    """Yield (shard name, its items), in the order in which shards fill up."""
    full, open_ = Counter[str](), dict[str, list[Numbered]]({split: [] for split in SPLITS})
    for number, item in enumerate(items):
        split = split_of(item.group, layout.heldout)
        open_[split].append((number, item))
        if len(open_[split]) == layout.shard_size:
            yield f"{split}-{full[split]:05d}.tar", open_[split]
            open_[split] = []
            full[split] += 1
    for split, rest in open_.items():
        if rest:
            yield f"{split}-{full[split]:05d}.tar", rest


def _write(path: Path, items: list[Numbered]) -> Shard:
    skipped: list[tuple[str, ...]] = []
    samples = _samples(items, skipped)
    num_bytes = write_shard(samples, path)
    if len(skipped) == len(items):
        path.unlink()
    lost = {int(number) for number, *_ in skipped}
    kept = [item for number, item in items if number not in lost]
    conversations = sum(bool(item.record.get("conversations") or item.record.get("messages")) for item in kept)
    return Shard(path.name, len(kept), num_bytes, skipped, sum(item.further for item in kept), conversations)


def _samples(items: list[Numbered], skipped: list[tuple[str, ...]]) -> Iterator[dict[str, str | bytes]]:
    for number, item in items:
        try:
            if item.place is None:
                raise ValueError(item.reason or "no image")
            content = item.place.read()
            yield {
                "__key__": f"{number:09d}",
                _extension(content): content,
                "txt": item.caption.encode(),
                # write lone surrogates as escapes, which JSON allows
                "json": dumps(item.record, ensure_ascii=False, default=str).encode(errors="backslashreplace"),
            }
        except (ValueError, RecursionError) as error:
            skipped.append((f"{number:09d}", str(error), item.where))


def _extension(content: bytes) -> str:
    """Return the extension by content, ignoring the name. Raises ValueError for what training cannot open."""
    # PIL raises any exception on broken input
    with suppress(Exception), Image.open(BytesIO(content), formats=FORMATS) as image:
        return EXTENSIONS[image.format or ""]
    raise ValueError("the image is no JPEG, PNG or WebP, or is damaged")


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C


class _Journal:
    """File of the finished shards, one line each, written after its tar is in place."""

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool) -> None:
        self.path = output / JOURNAL
        for split in SPLITS:
            for part in output.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].part"):  # left by a killed run
                part.unlink()
        old = [path for split in SPLITS for path in output.glob(f"{split}-*.tar")]
        identity, lines = json.loads(dumps(identity)), self._read()
        if overwrite or not (old or lines[1:]):
            check_made_here(old)
            for path in old:
                path.unlink()
            lines = [identity]
        if not lines:
            raise ValueError(f"{output} holds other shards: choose another --output, or say --overwrite")
        if lines[0] != identity:
            changed = ", ".join(key for key in identity if lines[0].get(key) != identity[key])
            raise ValueError(f"{output} holds a set made with other {changed}: choose another --output, or --overwrite")
        try:
            shards = [Shard(**line) for line in lines[1:]]
        except TypeError as error:
            raise ValueError(
                f"{self.path} is not what was written ({error}): choose another --output, or --overwrite"
            ) from None
        self.done = {one.name: one for one in shards if not one.samples or (output / one.name).is_file()}
        text = "".join(dumps(line) + "\n" for line in (identity, *map(asdict, self.done.values())))
        self.path.write_text(text, encoding="utf-8")

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.done.values())

    def add(self, shard: Shard) -> None:
        if not self.samples + shard.samples:
            _, reason, *where = shard.skipped[0]
            named = f"{where[0]}: " if where and where[0] else ""
            raise ValueError(f"none of the first {len(shard.skipped)} records can be used: {named}{reason}")
        self.done[shard.name] = shard
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dumps(asdict(shard)) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open("rb") as file:
                for text in file:
                    with suppress(ValueError):  # cut in its middle by a kill
                        lines.append(loads(text))
        return [line for line in lines if isinstance(line, dict)]
