"""Which sample comes when: a pure function of (shard sizes, seed, epoch), so that resuming is a seek.

The stream of an epoch is the shards in shuffled order, cut into windows of so many samples, each window shuffled.
Reads stay within the few shards of a window, memory within one window, and any position is found in constant time.
The state of a stream is one integer, the number of samples consumed; global batch b is the stream's positions
[b * B, (b + 1) * B) whatever the number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


class Order:
    """The endless stream of sample numbers, epoch after epoch, each sample once in each.

    `shard_sizes` are the samples per shard; `window` is how many samples are mixed at once. The object holds
    nothing but memory of what it computed last.
    """

    def __init__(self, shard_sizes: ArrayLike, seed: int, window: int) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.sizes.sum())
        self.seed = seed
        self.window = window
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._epoch: tuple[int, Ints, Ints] = (-1, self.sizes, self.sizes)
        self._window: tuple[int, int, Ints] = (-1, -1, self.sizes)

    def ids(self, start: int, count: int) -> Ints:
        """Sample numbers at the stream positions [start, start + count): int64 (count,)."""
        pieces: list[Ints] = []
        while count > 0:
            epoch, within = divmod(start, self.num_samples)
            window, first = divmod(within, self.window)
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
        if self._window[:2] != (epoch, window):
            shards, ends = self._shards(epoch)
            low = window * self.window
            places = np.arange(low, min(low + self.window, self.num_samples))
            slots = np.searchsorted(ends, places, side="right")
            ids = self._starts[shards[slots]] + places - (ends[slots] - self.sizes[shards[slots]])
            self._window = (epoch, window, ids[_shuffle(len(ids), self.seed, epoch, window)])
        return self._window[2]

    def _shards(self, epoch: int) -> tuple[Ints, Ints]:
        """(shards in this epoch's order, where each ends in the epoch's unshuffled stream)."""
        if self._epoch[0] != epoch:
            shards = _shuffle(len(self.sizes), self.seed, epoch)
            self._epoch = (epoch, shards, np.cumsum(self.sizes[shards]))
        return self._epoch[1:]


def deal(lengths: ArrayLike, world_size: int, micro_batches: int) -> Ints:
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
    turns[1::2] = turns[1::2, ::-1].copy()
    return turns.transpose(1, 0, 2)


def cut(lengths: ArrayLike, batch_size: int) -> list[Ints]:
    """All samples once, longest first, in the fewest batches of at most `batch_size`, as equal as can be."""
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    return np.array_split(by_length, max(1, -(-len(by_length) // batch_size)))


def _shuffle(count: int, *key: int) -> Ints:
    """The numbers below `count` in an order that `key` decides, in this version of numpy and the next.

    numpy promises the raw bits of its generators for good, but not what `Generator.permutation` makes of them.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
