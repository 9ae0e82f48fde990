"""Which sample comes when: a pure function of (shard sizes, seed, epoch), so that resuming is a seek.

The stream of an epoch is the shards in shuffled order, cut into windows of so many samples, each window shuffled.
Reads stay within the few shards of a window, memory within one window, and any position is found in constant time.
The state of a stream is one integer, the number of samples consumed; global batch b is the stream's positions
[b * B, (b + 1) * B) whatever the number of ranks and workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

CLOCK = 2**40  # ticks of an epoch, by which mixtures are timed: integers, since floats would round


class SampleStream(ABC):
    """Sample numbers, endlessly, epoch after epoch; holds nothing but memory of what it computed last."""

    def __init__(self, num_samples: int, seed: int, window: int) -> None:
        self.num_samples = num_samples  # in an epoch
        self.seed = seed
        self.window = window
        self._last: tuple[int, int, Ints] = (-1, -1, np.empty(0, np.int64))

    def ids(self, start: int, count: int) -> Ints:
        """Sample numbers at the stream positions [start, start + count): int64 (count,)."""
        pieces: list[Ints] = []
        while count > 0:
            epoch, within = divmod(start, self.num_samples)
            window, first = divmod(within, self.window)
            # to the window's end at most: the next one has an order of its own
            piece = self._shuffled(epoch, window)[first : first + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def substitutes(self, position: int) -> Iterator[int]:
        """What stands in, in this order, if the sample at stream `position` cannot be used.

        Others of its window (so that reads stay near) in an order that only the position decides: no rank needs
        to tell another, a resumed run finds the same, and nothing else in the stream moves.
        """
        epoch, within = divmod(position, self.num_samples)
        window, first = divmod(within, self.window)
        others = np.delete(self._shuffled(epoch, window), first)
        yield from others[_shuffle(len(others), self.seed, epoch, window, first)].tolist()

    def _shuffled(self, epoch: int, window: int) -> Ints:
        if self._last[:2] != (epoch, window):
            low = window * self.window
            ids = self._between(epoch, low, min(low + self.window, self.num_samples))
            self._last = (epoch, window, ids[_shuffle(len(ids), self.seed, epoch, window)])
        return self._last[2]

    @abstractmethod
    def _between(self, epoch: int, low: int, high: int) -> Ints:
        """What lies at the places [low, high) of an epoch before its windows are shuffled."""


class ShuffledSampler(SampleStream):
    """One set: each sample once in each epoch. `shard_sizes` are the samples per shard."""

    def __init__(self, shard_sizes: ArrayLike, seed: int, window: int) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        super().__init__(int(self.sizes.sum()), seed, window)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._epoch: tuple[int, Ints, Ints] = (-1, self.sizes, self.sizes)

    def _between(self, epoch: int, low: int, high: int) -> Ints:
        shards, ends = self._shards(epoch)
        places = np.arange(low, high)
        # the shard in which each place falls, and how far into it
        slots = np.searchsorted(ends, places, side="right")
        ids: Ints = self._starts[shards[slots]] + places - (ends[slots] - self.sizes[shards[slots]])
        return ids

    def _shards(self, epoch: int) -> tuple[Ints, Ints]:
        """(shards in this epoch's order, where each ends in the epoch's unshuffled stream)."""
        if self._epoch[0] != epoch:
            shards = _shuffle(len(self.sizes), self.seed, epoch)
            self._epoch = (epoch, shards, np.cumsum(self.sizes[shards]))
        return self._epoch[1:]


class MixtureSampler(SampleStream):
    """Several sets: an epoch has exactly `repeats` epochs of each, evenly spread.

    `sets` are their shard sizes; sample numbers run on from set to set. Each set keeps an order of its own, so
    half an epoch of a set is followed by the other half.
    """

    def __init__(self, sets: Sequence[ArrayLike], repeats: Sequence[float], seed: int, window: int) -> None:
        self.orders = [ShuffledSampler(sizes, seed, window) for sizes in sets]
        sizes = [order.num_samples for order in self.orders]
        self.counts = [max(1, round(repeat * size)) for repeat, size in zip(repeats, sizes, strict=True)]
        super().__init__(sum(self.counts), seed, window)
        self._starts = np.cumsum(sizes) - sizes

    def _between(self, epoch: int, low: int, high: int) -> Ints:
        pieces = []
        for i, (first, last) in enumerate(zip(self._before(low), self._before(high), strict=True)):
            done = epoch * self.counts[i]
            pieces.append(self._starts[i] + self.orders[i].ids(done + first, last - first))
        return np.concatenate(pieces)

    def _before(self, place: int) -> list[int]:
        """How many samples of each set come before `place` of an epoch.

        Sample j of the c that a set has in an epoch is due at time (j + 1/2) / c; the samples of all sets come as
        they are due. The time at `place` is found by bisection; those due at once come in the order of the sets.
        """
        # due(time) never falls, so that the place's tick is found in 40 halvings, whatever the size of the sets
        low = bisect_right(range(CLOCK), place, key=lambda time: sum(self._due(time))) - 1
        due, later = self._due(low), self._due(low + 1)
        for i in range(len(due)):
            more = min(later[i] - due[i], place - sum(due))
            due[i] += more
        return due

    def _due(self, time: int) -> list[int]:
        return [(2 * time * count + CLOCK) // (2 * CLOCK) for count in self.counts]


def split_by_length(lengths: ArrayLike, world_size: int, micro_batches: int) -> Ints:
    """Deal a global batch of B samples by length: int64 (world_size, micro_batches, B / both), indices into it.

    Every micro-batch holds as many samples, of lengths as alike as can be, so little is padded. At each turn the
    ranks hold neighbouring lengths, so that none waits long for the others, and whoever had the longest of one
    turn gets the shortest of the next. The longest come first: memory peaks at once. Since the loss is a sum over
    tokens, dealing does not change the gradient. Raises ValueError if B does not divide.
    """
    lengths = np.asarray(lengths)
    if len(lengths) % (world_size * micro_batches):
        raise ValueError(
            f"a global batch of {len(lengths)} does not divide among {world_size} ranks x {micro_batches} "
            f"micro-batches: use a multiple of {world_size * micro_batches}"
        )
    by_length = np.argsort(-lengths, kind="stable")
    turns = by_length.reshape(micro_batches, world_size, -1)
    # there and back, as a plough turns: whoever had the longest texts has the shortest next
    turns[1::2] = turns[1::2, ::-1].copy()
    return turns.transpose(1, 0, 2)


def eval_batches(lengths: ArrayLike, batch_size: int) -> list[Ints]:
    """All samples once, longest first, in the fewest batches of at most `batch_size`, as equal as can be."""
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    return np.array_split(by_length, max(1, -(-len(by_length) // batch_size)))


def _shuffle(count: int, *key: int) -> Ints:
    """The numbers below `count` in an order that `key` decides, in this version of numpy and the next.

    numpy promises the raw bits of its generators for good, but not what `Generator.permutation` makes of them.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
