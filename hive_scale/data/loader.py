"""Entry point of data loading: numbered global batches, split among ranks, read, decoded and collated.

`sampler` decides which samples a step sees and how ranks share them; `workers` reads them, in worker processes if
`data.workers` is not 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from hive_scale.batch import Batch
from hive_scale.config import DataConfig
from hive_scale.data.bad_samples import BadSampleLog, Share
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
    """A set of image-caption pairs, served as batches.

    `shards` are patterns as in `shards.expand`, `split` says what a folder among them stands for. Unusable samples are
    logged in the file `bad_samples`. Raises ValueError if a shard is missing, or if more samples are bad than
    `config.max_bad_samples` and `config.max_bad_share` allow.
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
        split: str = "train",
    ) -> None:
        self.sets = expand(shards, split)
        cache = ShardCache(round(config.cache_gb * 1e9), config.retry_seconds)
        super().__init__(config, open_index(all_shards(self.sets), cache), cache, tokenizer, image_size, pad_colour)
        self.stream(0)  # raises ValueError if one of the sets is empty
        self.fingerprint, self.layout = self.index.fingerprint, self.index.layout
        of_set = Share(config.max_bad_share, frozenset(self.index.shards), len(self.index) + len(self.index.faults))
        self._ledger = BadSampleLog(bad_samples, config.max_bad_samples, of_set)
        self._ledger.add(self.index.faults)

    @property
    def num_samples(self) -> int:
        """Samples per epoch, with repeats."""
        return self.stream(0).num_samples

    def steps(
        self, *, global_batch: int, accumulation: int, seed: int, start: int, world: World
    ) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each optimizer step, endlessly, starting after `start` consumed samples.

        All ranks and micro-batches hold the same number of samples. Step s covers the stream positions [start + s *
        global_batch, start + (s + 1) * global_batch) for any world size; `sampler.split_by_length` assigns them to
        ranks.
        """
        order = self.stream(seed)
        slots = self._dealt(order, global_batch, accumulation, start, world)
        size = global_batch // (world.size * accumulation)
        micro_batches = iter(Passes(self, slots, order, size, held=accumulation + 1, world=world))
        while True:
            yield [next(micro_batches) for _ in range(accumulation)]

    def note(self, bad: Sequence[SampleError]) -> None:
        """Log unusable samples. Raises ValueError if they exceed the budget."""
        self._ledger.add(bad)

    def with_features(self, features: FeatureStore | None) -> Loader:
        """Return the same set, whose batches carry `features` in place of images."""
        loader = copy(self)
        loader.features = features
        return loader

    def split(self, share: float) -> tuple[Loader, Loader]:
        """Return (the set without a held-out `share` of it, that share); at least one sample is held out.

        A sample's hash decides, which depends on its key alone: not on the order of the shards, nor on other samples.
        Raises ValueError if no sample is left to train on, in all sets or in one of them.
        """
        hashes = self.index.key_hashes
        heldout = hashes < np.uint64(share * 2**64)
        heldout |= hashes == hashes.min()
        if heldout.all():
            raise ValueError(f"all {len(hashes)} samples of data.train would be held out: give a smaller share")
        rest = self._part(~heldout, f"all but {share:g}")
        rest.stream(0)  # raises ValueError if one of the sets is empty
        return rest, self._part(heldout, f"{share:g}")

    def _part(self, chosen: NDArray[np.bool_], name: str) -> Loader:
        loader = copy(self)
        loader.numbers = np.flatnonzero(chosen)
        loader.fingerprint = loader.layout = f"{self.fingerprint}:{name}"
        return loader

    def at_most(self, count: int) -> Loader:
        """Return the same set, which serves `count` of its samples, or all if it has no more; 0 stands for all.

        Which ones depends on their keys alone.
        """
        numbers = np.asarray(self.numbers)
        if not 0 < count < len(numbers):
            return self
        loader = copy(self)
        loader.numbers = np.sort(numbers[np.argsort(self.index.key_hashes[numbers], kind="stable")[:count]])
        return loader

    def keys(self, seed: int, start: int, count: int) -> list[str]:
        """Return the keys of the samples at the stream positions [start, start + count)."""
        return [self.index.key(int(sample)) for sample in self.stream(seed).ids(start, count)]

    def once(self, *, batch_size: int, world: World) -> Iterator[Batch]:
        """One pass over `every`."""
        return iter(self.every(batch_size=batch_size, world=world))

    def every(self, *, batch_size: int, world: World) -> Passes:
        """Batches of at most `batch_size` that cover every sample exactly once over all ranks; bad samples are left
        out.

        All ranks get the same number of batches, so that collectives match. A rank that has run out of samples, or
        whose whole batch is bad, gets a batch without images and targets, which contributes 0 to every sum.
        """
        numbers = np.asarray(self.numbers)
        slots: list[Slots] = [
            [(-1, int(sample)) for sample in numbers[batch]]
            for batch in eval_batches(self.text_bytes[numbers], batch_size)
        ]
        slots += [[] for _ in range(-len(slots) % world.size)]
        return Passes(self, slots[world.rank :: world.size], None, batch_size, held=2, world=world)

    def stream(self, seed: int) -> SampleStream:
        """The endless order of samples for `seed`. Raises ValueError if one of the sets has no usable sample."""
        ends = np.cumsum(self.index.shard_sizes)
        is_whole = len(self.numbers) == len(self.index)
        numbers = None if is_whole else np.asarray(self.numbers)
        of_shards = np.diff(ends if numbers is None else np.searchsorted(numbers, ends), prepend=0)
        sizes = np.split(of_shards, np.cumsum([len(one.shards) for one in self.sets])[:-1])
        for one, size in zip(self.sets, sizes, strict=True):
            if not size.sum():
                left = "" if is_whole else " is left to train on"
                raise ValueError(f"no usable sample{left} in '{one.pattern}': leave it out, or repair it")
        repeats = [one.repeats for one in self.sets]
        if all(repeat == 1 for repeat in repeats):
            return ShuffledSampler(of_shards, seed, self.config.shuffle_window, numbers)
        return MixtureSampler(sizes, repeats, seed, self.config.shuffle_window, numbers)

    def _dealt(
        self, order: SampleStream, global_batch: int, accumulation: int, start: int, world: World
    ) -> Iterator[Slots]:
        while True:
            ids = order.ids(start, global_batch)
            for places in split_by_length(self.text_bytes[ids], world.size, accumulation)[world.rank]:
                yield list(zip((start + places).tolist(), ids[places].tolist(), strict=True))
            start += global_batch


class Passes(Iterable[Batch]):
    """Iterable over batches. It can be iterated again if its slots are a list, but only one pass at a time.

    The first pass starts the workers. They persist between passes and end with this object.
    """

    def __init__(
        self, loader: Loader, slots: Iterable[Slots], order: SampleStream | None, size: int, held: int, world: World
    ) -> None:
        self.note, self.features, self._slots = loader.note, loader.features, slots
        self._batches = MicroBatchDataset(loader, order, size, held)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._batches.requests(slots),
            pin_memory=pins_memory(world.device),
            generator=torch.Generator(),  # separate, so that loading does not advance the model's random state
            **worker_options(loader.config.workers),
        )

    def __len__(self) -> int:
        """Number of batches of a pass. Raises TypeError if the slots are endless."""
        return len(self._slots)  # type: ignore[arg-type]

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
