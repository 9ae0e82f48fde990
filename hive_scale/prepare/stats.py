"""Statistics of a set of tars, to look at before training on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hive_scale.data.index import Index
from hive_scale.strangers import printable

BAR = 40  # characters of the longest bar


def describe(index: Index) -> str:
    """Return a report: counts, histogram of caption lengths, image sizes, and faults by reason with an example each."""
    total = int(index.members[:, :, 1].sum())
    areas = index.image_sizes.astype(np.int64).prod(1)
    images = [index.image_sizes[i] for i in np.argsort(areas, kind="stable")[[0, len(index) // 2, -1]]]
    smallest, middle, largest = (f"{width} x {height}" for width, height in images)
    return "\n".join(
        [
            f"{len(index):,} samples in {len(index.shards):,} shards, {total / 1e6:,.1f} MB, index {index.path}",
            f"images: {smallest} to {largest} pixels, half of them below {middle}",
            f"captions: {index.caption_bytes.min()} to {index.caption_bytes.max()} bytes, "
            f"{index.caption_bytes.mean():.1f} on average",
            *_histogram(index.caption_bytes),
            f"not usable: {len(index.faults):,}",
            *_faults(index),
        ]
    )


def _histogram(lengths: NDArray[np.int32]) -> Iterator[str]:
    """Yield at most twelve bars of equal width in bytes; the last one includes the longest hundredth."""
    step = max(1, -(-int(np.percentile(lengths, 99)) // 12))
    counts = np.bincount(np.minimum((lengths - 1) // step, 11))
    for i, count in enumerate(counts):
        bar = "#" * round(BAR * count / counts.max())
        until = f"{(i + 1) * step}" if i < len(counts) - 1 else "more"
        yield f"  {i * step + 1:5} to {until:>5} bytes {count / len(lengths):6.1%} {bar}"


def _faults(index: Index) -> Iterator[str]:
    for reason, count in Counter(fault.reason for fault in index.faults).most_common(10):
        first = next(fault for fault in index.faults if fault.reason == reason)
        yield printable(f"  {count:,} x {reason}; first: {first.shard}{': ' + first.key if first.key else ''}")
