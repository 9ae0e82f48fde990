"""Which rank writes which range, whether ranges cover their tensors, and how two models differ: pure arithmetic.

A checkpoint is a set of logical 1-D fp32 tensors, ``<kind>/<parameter>``; ranks own ranges of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from hive_scale.distributed import Fragment

Shape = tuple[int, ...]


class Range(NamedTuple):
    """Elements [offset, offset + length) of the flattened tensor `key`."""

    key: str
    offset: int
    length: int


class Owned(NamedTuple):
    """What a rank tells the others about one fragment."""

    range: Range
    shape: Shape  # of the whole parameter


class Piece(NamedTuple):
    """A range that this rank writes: `range.length` elements from `start` of its fragment number `source`."""

    range: Range
    source: int
    start: int


def key_of(fragment: Fragment) -> str:
    return f"{fragment.kind}/{fragment.name}"


def owned(fragments: Iterable[Fragment]) -> list[Owned]:
    return [Owned(Range(key_of(f), f.offset, f.data.numel()), tuple(f.shape)) for f in fragments]


def shapes_of(tables: Iterable[Sequence[Owned]]) -> dict[str, Shape]:
    """{key: shape} over all ranks. Raises ValueError where two ranks disagree."""
    shapes: dict[str, Shape] = {}
    for table in tables:
        for row in table:
            first = shapes.setdefault(row.range.key, row.shape)
            if first != row.shape:
                raise ValueError(f"{row.range.key} has shape {first} on one rank and {row.shape} on another")
    return shapes


def divide(tables: Sequence[Sequence[Owned]], rank: int) -> list[Piece]:
    """What `rank` has to write so that all ranks together write every range once.

    `tables` has one table per rank. A range that several ranks hold (replicas) is shared among them: all
    that one set of ranks holds is laid end to end and cut evenly. Raises ValueError as `check_tiling` does.
    """
    holders: dict[Range, list[int]] = {}
    for holder, table in enumerate(tables):
        for row in table:
            if row.range.length:  # ZeRO-3 leaves some ranks without a share of a small parameter
                holders.setdefault(row.range, []).append(holder)
    check_tiling(shapes_of(tables), holders)
    together: dict[tuple[int, ...], list[Range]] = {}
    for held, ranks in holders.items():
        together.setdefault(tuple(ranks), []).append(held)
    sources = {row.range: source for source, row in enumerate(tables[rank])}
    return [
        Piece(cut, sources[held], cut.offset - held.offset)
        for ranks, ranges in together.items()
        if rank in ranks
        for held, cut in _share(ranges, ranks.index(rank), len(ranks))
    ]


def check_tiling(shapes: Mapping[str, Shape], ranges: Iterable[Range]) -> None:
    """Raises ValueError naming the key if the ranges leave a hole, overlap or overhang."""
    reached = dict.fromkeys(shapes, 0)
    for key, offset, length in sorted(ranges):
        if offset != reached[key]:
            raise ValueError(f"{key} has {'a hole' if offset > reached[key] else 'an overlap'} at {reached[key]}")
        reached[key] += length
    for key, end in reached.items():
        if end != prod(shapes[key]):
            raise ValueError(f"{key} has {end} elements where its shape {shapes[key]} has {prod(shapes[key])}")


def difference(stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    """How two sets of named shapes differ, in words; empty if they do not."""
    both = stored.keys() & wanted.keys()
    findings = {
        "missing": wanted.keys() - stored.keys(),
        "unexpected": stored.keys() - wanted.keys(),
        "of another shape": {f"{k} {stored[k]} instead of {wanted[k]}" for k in both if stored[k] != wanted[k]},
    }
    return "; ".join(f"{what}: {_some(sorted(names))}" for what, names in findings.items() if names)


def by_parameter(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """{parameter: shape} of {kind/parameter: shape}."""
    return {key.split("/", 1)[1]: shape for key, shape in shapes.items()}


def _share(ranges: Sequence[Range], index: int, num: int) -> Iterable[tuple[Range, Range]]:
    """(range, the part of it) for the `index`-th of `num` even cuts of `ranges` laid end to end."""
    total = sum(held.length for held in ranges)
    low, high = total * index // num, total * (index + 1) // num
    at = 0
    for held in ranges:
        begin, end = max(low - at, 0), min(high - at, held.length)
        if begin < end:
            yield held, Range(held.key, held.offset + begin, end - begin)
        at += held.length


def _some(names: Sequence[str], limit: int = 10) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
