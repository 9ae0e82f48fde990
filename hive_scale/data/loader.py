"""The data room's front: global batches by number, dealt to this rank, read, decoded and collated.

Which samples a step sees, and how they are dealt, is `order`'s matter; here they become batches, in worker
processes if there are any. A broken sample is skipped and named, and its slot filled by a fixed rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hive_scale.batch import Batch, Sample, collate
from hive_scale.config import DataConfig
from hive_scale.data.cache import ShardCache
from hive_scale.data.index import open_index
from hive_scale.data.ledger import Ledger
from hive_scale.data.order import Mixture, Order, Stream, cut, deal
from hive_scale.data.scan import Fault
from hive_scale.data.shards import ShardReader, all_shards, expand
from hive_scale.data.transform import Tokenizer, blank, caption_sample, check_size, picture
from hive_scale.distributed import World

Slots = list[tuple[int, int]]  # (stream position, sample) of one micro-batch


class Loader:
    """A set of picture-caption pairs as batches.

    `shards` are patterns as in `shards.expand`. Samples that cannot be used are listed in `bad_samples`.
    Raises ValueError if a shard is missing or more than `config.max_bad_samples` samples are bad.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: Sequence[str],
        tokenizer: Tokenizer,
        *,
        image_size: int,
        bad_samples: Path | None = None,
    ) -> None:
        self.config = config
        cache = ShardCache(round(config.cache_gb * 1e9))
        self.sets = expand(shards)
        self.index = open_index(all_shards(self.sets), cache)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_samples = self._stream(0).num_samples  # in an epoch
        self.fingerprint = self.index.fingerprint
        self._reader = ShardReader(self.index.shards, cache)
        self._ledger = Ledger(bad_samples, config.max_bad_samples)
        self._ledger.add(self.index.faults)

    def steps(
        self, *, global_batch: int, accumulation: int, seed: int, start: int, world: World
    ) -> Iterator[list[Batch]]:
        """This rank's micro-batches for each optimizer step, endlessly, after `start` samples consumed.

        All ranks and micro-batches have equally many samples. Step s holds the stream's positions
        [start + s * global_batch, ...) whatever the world; see `order.deal` for who gets which.
        """
        order = self._stream(seed)
        micro_batches = self._load(self._dealt(order, global_batch, accumulation, start, world), order)
        while True:
            yield [next(micro_batches) for _ in range(accumulation)]

    def once(self, *, batch_size: int, world: World) -> Iterator[Batch]:
        """Every sample exactly once over all ranks, in batches of at most `batch_size`; bad ones are left out.

        All ranks see equally many batches, so that collectives match: one that has run out, or whose whole batch
        is bad, gets a batch without pictures and targets, which adds nothing to any sum.
        """
        slots: list[Slots] = [
            [(-1, int(sample)) for sample in batch] for batch in cut(self.index.caption_bytes, batch_size)
        ]
        slots += [[] for _ in range(-len(slots) % world.size)]
        return self._load(slots[world.rank :: world.size], None)

    def sample(self, i: int) -> Sample:
        """Sample number i, ready for the model. Raises ValueError if it is broken."""
        width, height = self.index.picture_sizes[i].tolist()
        check_size(width, height, self.config.max_pixels)
        text = self.caption(i)
        if self.config.blank:
            pixels = blank(self.image_size)
        else:
            pixels = picture(self._read(i, 0), self.image_size, self.config.image, self.config.max_pixels)
        return caption_sample(self.index.key(i), pixels, text, self.tokenizer, self.config.max_tokens)

    def caption(self, i: int) -> str:
        return self._read(i, 1).decode().strip()

    def record(self, i: int) -> dict[str, Any]:
        """What else is known of sample i: its .json member, or nothing."""
        record: dict[str, Any] = json.loads(self._read(i, 2) or b"{}")
        return record

    def _stream(self, seed: int) -> Stream:
        sizes = np.split(self.index.shard_sizes, np.cumsum([len(one.shards) for one in self.sets])[:-1])
        for one, size in zip(self.sets, sizes, strict=True):
            if not size.sum():
                raise ValueError(f"no usable sample in '{one.pattern}': leave it out, or repair it")
        repeats = [one.repeats for one in self.sets]
        if all(repeat == 1 for repeat in repeats):
            return Order(self.index.shard_sizes, seed, self.config.window)
        return Mixture(sizes, repeats, seed, self.config.window)

    def _read(self, i: int, member: int) -> bytes:
        start, length = self.index.members[i, member].tolist()
        return self._reader.read(self.index.shard_of(i), start, length)

    def _dealt(self, order: Stream, global_batch: int, accumulation: int, start: int, world: World) -> Iterator[Slots]:
        while True:
            ids = order.ids(start, global_batch)
            for places in deal(self.index.caption_bytes[ids], world.size, accumulation)[world.rank]:
                yield [(start + int(place), int(ids[place])) for place in places]
            start += global_batch

    def _load(self, slots: Iterable[Slots], order: Stream | None) -> Iterator[Batch]:
        batches = _Batches(self, order)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=slots,
            num_workers=self.config.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that loading does not move the model's random numbers
        )
        for loaded in batches.watch(loader):
            self._ledger.add(loaded.bad)
            if loaded.batch is None:
                raise ValueError(f"no sample near {loaded.bad[0].describe()} can be used: repair the shards")
            yield loaded.batch


@dataclass(frozen=True)
class _Loaded:
    """What a worker sends: a batch, or none if it could not be filled, and the samples that cannot be used."""

    batch: Batch | None
    bad: list[Fault]

    def pin_memory(self) -> _Loaded:
        return _Loaded(self.batch and self.batch.pin(), self.bad)


class _Batches(Dataset[_Loaded]):
    """Micro-batches by their slots. With an order, broken samples are substituted; without, left out."""

    def __init__(self, loader: Loader, order: Stream | None) -> None:
        self.loader = loader
        self.order = order
        # (process, sample) that each worker is at, in shared memory: what is left of one that dies
        self.reading = torch.zeros(max(1, loader.config.workers), 2, dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]

    def watch(self, loaded: Iterable[_Loaded]) -> Iterator[_Loaded]:
        """`loaded` by workers, whose sudden death (out of memory, a crashing decoder) is told with its sample."""
        try:
            yield from loaded
        except RuntimeError as error:
            for process, sample in self.reading.tolist():
                if process and str(process) in str(error):
                    where = f"{self.loader.index.key(sample)} of {self.loader.index.shard(sample)}"
                    raise RuntimeError(f"data worker {process} died while reading {where} ({error})") from None
            raise

    def __getitem__(self, slots: Slots) -> _Loaded:
        bad: list[Fault] = []
        samples = [sample for slot in slots if (sample := self._fill(slot, bad)) is not None]
        if self.order is not None and len(samples) < len(slots):
            return _Loaded(None, bad)  # told by the caller: an error raised in a worker arrives as a page of traceback
        tokenizer = self.loader.tokenizer
        if not samples:
            samples = [Sample("", None, [tokenizer.start_id, tokenizer.eos_id], [False, False])]
        return _Loaded(collate(samples, tokenizer.pad_id, self.loader.image_size), bad)

    def _fill(self, slot: tuple[int, int], bad: list[Fault]) -> Sample | None:
        position, first = slot
        substitutes = self.order.substitutes(position) if self.order else ()
        worker = get_worker_info()
        for i in chain([first], substitutes):
            if worker is not None:
                self.reading[worker.id] = torch.tensor([os.getpid(), i])
            try:
                return self.loader.sample(i)
            except ValueError as error:
                bad.append(Fault(self.loader.index.shard(i), self.loader.index.key(i), str(error)))
        return None
