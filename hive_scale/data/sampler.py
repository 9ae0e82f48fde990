"""The order of samples, as a pure function of (shard sizes, seed, epoch): resuming is a seek.

An epoch's stream is its shards in shuffled order, cut into shuffle windows of `window` samples, each shuffled. Reads
stay within the few shards of a window, memory within one window, and any position is found in constant time. The state
of a stream is one integer, the number of samples consumed. Global batch b is the stream's positions [b * B, (b + 1) *
B) for any number of ranks and workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

CLOCK = 2**40  # ticks per epoch on which mixtures are scheduled; integers, since floats would round


class SampleStream(ABC):
    """Endless stream of sample numbers, epoch after epoch. Its only state is a cache of the last window.

    `numbers` translates the numbers that the subclass deals, from 0 on, if only some samples of a set are streamed.
    """

    def __init__(self, num_samples: int, seed: int, window: int, numbers: Ints | None = None) -> None:
        self.num_samples = num_samples  # per epoch
        self.seed = seed
        self.window = window
        self.numbers = numbers
        self._last: tuple[int, int, Ints] = (-1, -1, np.empty(0, np.int64))

    def ids(self, start: int, count: int) -> Ints:
        """Sample numbers at the stream positions [start, start + count): int64 (count,)."""
        pieces: list[Ints] = []
        while count > 0:
            epoch, within = divmod(start, self.num_samples)
            window, first = divmod(within, self.window)
            # stop at the window's end: the next window has its own order
            piece = self._shuffled(epoch, window)[first : first + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def substitutes(self, position: int) -> Iterator[int]:
        """Yield replacements, in order of preference, for an unusable sample at stream `position`.

        They are the other samples of its shuffle window, so that reads stay local, in an order that depends on the
        position alone. Ranks need not communicate, a resumed run picks the same ones, and the rest of the stream is
        unaffected.
        """
        epoch, within = divmod(position, self.num_samples)
        window, first = divmod(within, self.window)
        others = np.delete(self._shuffled(epoch, window), first)
        yield from others[_shuffle(len(others), self.seed, epoch, window, first)].tolist()

    def _shuffled(self, epoch: int, window: int) -> Ints:
        if self._last[:2] != (epoch, window):
            low = window * self.window
            ids = self._between(epoch, low, min(low + self.window, self.num_samples))
            ids = ids[_shuffle(len(ids), self.seed, epoch, window)]
            self._last = (epoch, window, ids if self.numbers is None else self.numbers[ids])
        return self._last[2]

    @abstractmethod
    def _between(self, epoch: int, low: int, high: int) -> Ints:
        """Return the sample numbers at places [low, high) of an epoch, before its windows are shuffled."""


class ShuffledSampler(SampleStream):
    """Stream over one set: each sample once per epoch. `shard_sizes` are the numbers of samples per shard."""

    def __init__(self, shard_sizes: ArrayLike, seed: int, window: int, numbers: Ints | None = None) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        super().__init__(int(self.sizes.sum()), seed, window, numbers)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._epoch: tuple[int, Ints, Ints] = (-1, self.sizes, self.sizes)

    def _between(self, epoch: int, low: int, high: int) -> Ints:
        shards, ends = self._shards(epoch)
        places = np.arange(low, high)
        # map each place to its shard and to the offset within that shard
        slots = np.searchsorted(ends, places, side="right")
        ids: Ints = self._starts[shards[slots]] + places - (ends[slots] - self.sizes[shards[slots]])
        return ids

    def _shards(self, epoch: int) -> tuple[Ints, Ints]:
        """Return (shards in this epoch's order, end of each in the epoch's unshuffled stream)."""
        if self._epoch[0] != epoch:
            shards = _shuffle(len(self.sizes), self.seed, epoch)
            self._epoch = (epoch, shards, np.cumsum(self.sizes[shards]))
        return self._epoch[1:]


class MixtureSampler(SampleStream):
    """Stream over several sets: an epoch holds exactly `repeats` epochs of each, evenly interleaved.

    `sets` are their shard sizes. Sample numbers continue from set to set. Each set keeps its own order across epochs,
    so with a repeat of 0.5 the next epoch reads the set's other half.
    """

    def __init__(
        self,
        sets: Sequence[ArrayLike],
        repeats: Sequence[float],
        seed: int,
        window: int,
        numbers: Ints | None = None,
    ) -> None:
        self.orders = [ShuffledSampler(sizes, seed, window) for sizes in sets]
        sizes = [order.num_samples for order in self.orders]
        self.counts = [max(1, round(repeat * size)) for repeat, size in zip(repeats, sizes, strict=True)]
        super().__init__(sum(self.counts), seed, window, numbers)
        self._starts = np.cumsum(sizes) - sizes

    def _between(self, epoch: int, low: int, high: int) -> Ints:
        pieces = []
        for i, (first, last) in enumerate(zip(self._before(low), self._before(high), strict=True)):
            done = epoch * self.counts[i]
            pieces.append(self._starts[i] + self.orders[i].ids(done + first, last - first))
        return np.concatenate(pieces)

    def _before(self, place: int) -> list[int]:
        """Return how many samples of each set precede `place` of an epoch.

        Sample j of the c that a set contributes to an epoch is due at time (j + 1/2) / c, and samples come in order of
        their due time. The time at `place` is found by bisection; samples due at the same tick are ordered by set.
        """
        # due(time) never decreases, so 40 bisection steps find the tick of `place`, whatever the sets' sizes
        low = bisect_right(range(CLOCK), place, key=lambda time: sum(self._due(time))) - 1
        due, later = self._due(low), self._due(low + 1)
        for i in range(len(due)):
            more = min(later[i] - due[i], place - sum(due))
            due[i] += more
        return due

    def _due(self, time: int) -> list[int]:
        return [(2 * time * count + CLOCK) // (2 * CLOCK) for count in self.counts]


def split_by_length(lengths: ArrayLike, world_size: int, micro_batches: int) -> Ints:
    """Deal a global batch of B samples by length: int64 (world_size, micro_batches, b), indices into `lengths`.

    Sorts by length, longest first; reshapes to (micro_batches, world_size, b) with b = B / (world_size *
    micro_batches); reverses the rank order of every second row (snake order). Each micro-batch thus holds samples of
    similar length, which keeps padding low, and the ranks of one micro-batch hold neighbouring lengths, so none waits
    long for another. The longest come first, so memory peaks in the first micro-batch. The loss is a sum over tokens,
    so the split does not change the gradient. Raises ValueError if B is not a multiple of world_size * micro_batches.
    """
    lengths = np.asarray(lengths)
    if len(lengths) % (world_size * micro_batches):
        raise ValueError(
            f"a global batch of {len(lengths)} does not divide among {world_size} ranks x {micro_batches} "
            f"micro-batches: use a multiple of {world_size * micro_batches}"
        )
    by_length = np.argsort(-lengths, kind="stable")
    turns = by_length.reshape(micro_batches, world_size, -1)
    # snake order: the rank with the longest texts of one micro-batch has the shortest of the next
    turns[1::2] = turns[1::2, ::-1].copy()
    return turns.transpose(1, 0, 2)


def eval_batches(lengths: ArrayLike, batch_size: int) -> list[Ints]:
    """Split all samples, longest first, into the fewest batches of at most `batch_size`, with sizes as equal as
    possible.
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    return np.array_split(by_length, max(1, -(-len(by_length) // batch_size)))


def _shuffle(count: int, *key: int) -> Ints:
    """Return a permutation of range(count) that depends on `key` alone, the same in every numpy version.

    numpy guarantees the raw bits of its generators, but not the result of `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
