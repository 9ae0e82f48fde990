"""The data room's front: global batches by number, dealt to this rank, read, decoded and collated.

Which samples a step sees, and how they are dealt, is `sampler`'s matter; `workers` reads them, in worker processes if
there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from hive_scale.batch import Batch
from hive_scale.config import DataConfig
from hive_scale.data.bad_samples import BadSampleLog
from hive_scale.data.dataset import SampleReader
from hive_scale.data.feature_store import FeatureStore
from hive_scale.data.index import open_index
from hive_scale.data.sampler import MixtureSampler, SampleStream, ShuffledSampler, eval_batches, split_by_length
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import all_shards, expand
from hive_scale.data.tar_scan import SampleError
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.data.transform import GREY, Colour
from hive_scale.data.workers import MicroBatchDataset, Slots, worker_options
from hive_scale.device import pins_memory
from hive_scale.distributed import World


class Loader(SampleReader):
    """A set of image-caption pairs as batches.

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
        pad_colour: Colour = GREY,
        bad_samples: Path | None = None,
    ) -> None:
        self.sets = expand(shards)
        cache = ShardCache(round(config.cache_gb * 1e9), config.retry_seconds)
        super().__init__(config, open_index(all_shards(self.sets), cache), cache, tokenizer, image_size, pad_colour)
        self.num_samples = self.stream(0).num_samples  # in an epoch
        self.fingerprint, self.layout = self.index.fingerprint, self.index.layout
        self._ledger = BadSampleLog(bad_samples, config.max_bad_samples)
        self._ledger.add(self.index.faults)

    def steps(
        self, *, global_batch: int, accumulation: int, seed: int, start: int, world: World
    ) -> Iterator[list[Batch]]:
        """This rank's micro-batches for each optimizer step, endlessly, after `start` samples consumed.

        All ranks and micro-batches have equally many samples. Step s holds the stream's positions
        [start + s * global_batch, ...) whatever the world; see `sampler.split_by_length` for who gets which.
        """
        order = self.stream(seed)
        slots = self._dealt(order, global_batch, accumulation, start, world)
        size = global_batch // (world.size * accumulation)
        micro_batches = iter(Passes(self, slots, order, size, held=accumulation + 1, world=world))
        while True:
            yield [next(micro_batches) for _ in range(accumulation)]

    def note(self, bad: Sequence[SampleError]) -> None:
        """List samples that cannot be used. Raises ValueError if they are too many."""
        self._ledger.add(bad)

    def with_features(self, features: FeatureStore | None) -> Loader:
        """The same set, whose batches have `features` in place of images."""
        loader = copy(self)
        loader.features = features
        return loader

    def keys(self, seed: int, start: int, count: int) -> list[str]:
        """Keys of the samples at the stream's positions [start, start + count)."""
        return [self.index.key(int(sample)) for sample in self.stream(seed).ids(start, count)]

    def once(self, *, batch_size: int, world: World) -> Iterator[Batch]:
        """One pass of `every`."""
        return iter(self.every(batch_size=batch_size, world=world))

    def every(self, *, batch_size: int, world: World) -> Passes:
        """Every sample exactly once over all ranks, in batches of at most `batch_size`; bad ones are left out.

        All ranks see equally many batches, so that collectives match: one that has run out, or whose whole batch
        is bad, gets a batch without images and targets, which adds nothing to any sum.
        """
        slots: list[Slots] = [
            [(-1, int(sample)) for sample in batch] for batch in eval_batches(self.text_bytes, batch_size)
        ]
        slots += [[] for _ in range(-len(slots) % world.size)]
        return Passes(self, slots[world.rank :: world.size], None, batch_size, held=2, world=world)

    def stream(self, seed: int) -> SampleStream:
        """The order of the samples, endlessly. Raises ValueError if one of the sets has no usable sample."""
        sizes = np.split(self.index.shard_sizes, np.cumsum([len(one.shards) for one in self.sets])[:-1])
        for one, size in zip(self.sets, sizes, strict=True):
            if not size.sum():
                raise ValueError(f"no usable sample in '{one.pattern}': leave it out, or repair it")
        repeats = [one.repeats for one in self.sets]
        if all(repeat == 1 for repeat in repeats):
            return ShuffledSampler(self.index.shard_sizes, seed, self.config.shuffle_window)
        return MixtureSampler(sizes, repeats, seed, self.config.shuffle_window)

    def _dealt(
        self, order: SampleStream, global_batch: int, accumulation: int, start: int, world: World
    ) -> Iterator[Slots]:
        while True:
            ids = order.ids(start, global_batch)
            for places in split_by_length(self.text_bytes[ids], world.size, accumulation)[world.rank]:
                yield list(zip((start + places).tolist(), ids[places].tolist(), strict=True))
            start += global_batch


class Passes(Iterable[Batch]):
    """Batches to go through, again and again where their slots are a list, but one pass at a time.

    Workers are started by the first pass, wait for the next, and end with this object.
    """

    def __init__(
        self, loader: Loader, slots: Iterable[Slots], order: SampleStream | None, size: int, held: int, world: World
    ) -> None:
        self.note, self.features = loader.note, loader.features
        self._batches = MicroBatchDataset(loader, order, size, held)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._batches.requests(slots),
            pin_memory=pins_memory(world.device),
            generator=torch.Generator(),  # its own, so that loading does not move the model's random numbers
            **worker_options(loader.config.workers),
        )

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self._batches.watch(self._loader):
            self.note(loaded.bad)
            if loaded.error is not None:
                raise loaded.error
            if loaded.batch is None:
                raise ValueError(f"no sample near {loaded.bad[0].describe()} can be used: repair the shards")
            if loaded.lost and self.features:
                rows, numbers, images = map(list, zip(*loaded.lost, strict=True))
                made = self.features.make(numbers, torch.from_numpy(np.stack(images)))
                loaded.batch.pixels[rows] = made.to(loaded.batch.pixels)
            yield loaded.batch
