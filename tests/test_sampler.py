"""Why: exact, elastic resume relies on the order being a pure function; a repeated or lost sample gives no error."""

from __future__ import annotations

import time
import tracemalloc
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_scale.data.sampler import MixtureSampler, ShuffledSampler, eval_batches, split_by_length

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)
seeds = st.integers(0, 5)
windows = st.integers(1, 40)


@given(sizes, seeds, windows, st.integers(0, 3))
def test_every_epoch_has_every_sample_once(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    total = sum(sizes)
    ids = ShuffledSampler(sizes, seed, window).ids(epoch * total, total)
    assert sorted(ids.tolist()) == list(range(total))


@given(sizes, seeds, windows, st.integers(0, 100), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_any_seek_gives_the_uninterrupted_stream(
    sizes: list[int], seed: int, window: int, start: int, counts: list[int]
) -> None:
    whole = ShuffledSampler(sizes, seed, window).ids(0, start + sum(counts)).tolist()
    for count in counts:  # each part from a fresh object, as after an interruption
        assert ShuffledSampler(sizes, seed, window).ids(start, count).tolist() == whole[start : start + count]
        start += count


@given(sizes, seeds, windows)
def test_reads_stay_within_a_window_of_whole_shards(sizes: list[int], seed: int, window: int) -> None:
    ends = np.cumsum(sizes)
    shards = np.searchsorted(ends, ShuffledSampler(sizes, seed, window).ids(0, sum(sizes)), side="right")
    spans = [set(shards[low : low + window].tolist()) for low in range(0, len(shards), window)]
    for shard, size in enumerate(sizes):  # once the windows that it spans are over, it is not opened again
        touched = [w for w, span in enumerate(spans) if shard in span]
        assert not touched or touched[-1] - touched[0] < 2 + size // window


def test_seeds_and_epochs_differ() -> None:
    order = ShuffledSampler([50, 50], 1, 40)
    assert order.ids(0, 100).tolist() != order.ids(100, 100).tolist()
    assert order.ids(0, 100).tolist() != ShuffledSampler([50, 50], 2, 40).ids(0, 100).tolist()
    assert order.ids(0, 100).tolist() != list(range(100))


def test_the_order_of_this_version_is_the_order_for_good() -> None:
    # a run checkpointed by one version resumes under the next
    order = ShuffledSampler([5, 3, 4], 7, 6)
    assert order.ids(10, 8).tolist() == [3, 1, 6, 9, 8, 7, 10, 5]
    assert [list(order.substitutes(position)) for position in (10, 19)] == [[4, 7, 1, 0, 2], [11, 2, 0, 3, 1]]


@given(sizes.filter(lambda s: sum(s) > 1), seeds, windows, st.integers(0, 60))
def test_substitutes_are_fixed_and_never_the_sample_itself(
    sizes: list[int], seed: int, window: int, position: int
) -> None:
    first = ShuffledSampler(sizes, seed, window)
    first.ids(3, 5)  # what was asked before does not matter
    substitutes = list(first.substitutes(position))
    assert substitutes == list(ShuffledSampler(sizes, seed, window).substitutes(position))
    assert first.ids(position, 1)[0] not in substitutes
    epoch, within = divmod(position, sum(sizes))
    low = epoch * sum(sizes) + within // window * window
    high = min(low + window, (epoch + 1) * sum(sizes))
    assert {*substitutes, int(first.ids(position, 1)[0])} == set(first.ids(low, high - low).tolist())


sets = st.lists(st.tuples(sizes, st.sampled_from([0.3, 0.5, 1, 2, 2.6])), min_size=1, max_size=4)


@given(sets, seeds, windows)
def test_a_mixture_counts_exactly_and_spreads_evenly(
    sets: list[tuple[list[int], float]], seed: int, window: int
) -> None:
    mixture = MixtureSampler([sizes for sizes, _ in sets], [repeat for _, repeat in sets], seed, window)
    ends = np.cumsum([sum(sizes) for sizes, _ in sets])
    ids = mixture.ids(0, 3 * mixture.num_samples)
    of = np.searchsorted(ends, ids, side="right")
    for i, (sizes, repeat) in enumerate(sets):
        count = max(1, round(repeat * sum(sizes)))
        epochs = (of == i).reshape(3, -1)
        assert epochs.sum(1).tolist() == [count] * 3
        for done in range(window, mixture.num_samples, window):  # after each window, as near its share as can be
            assert abs(epochs[0, :done].sum() - done * count / mixture.num_samples) <= len(sets)
        seen = np.bincount(ids[of == i] - (ends[i] - sum(sizes)), minlength=sum(sizes))
        assert seen.max() - seen.min() <= 1  # no sample is ahead of another of its set


@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.3, 0.5, 1, 2, 2.6])), min_size=1, max_size=4), seeds)
def test_the_samples_of_a_mixture_come_as_they_are_due(sets: list[tuple[int, float]], seed: int) -> None:
    """Sample j of c at (j + 1/2) / c of the epoch, exactly; those due at once in the order of the sets."""
    due = []
    for number, (size, repeat) in enumerate(sets):
        count = max(1, round(repeat * size))
        due += [(Fraction(2 * j + 1, 2 * count), number) for j in range(count)]
    mixture = MixtureSampler([[size] for size, _ in sets], [repeat for _, repeat in sets], seed, window=1)
    ids = mixture.ids(0, mixture.num_samples)
    ends = np.cumsum([size for size, _ in sets])
    assert np.searchsorted(ends, ids, side="right").tolist() == [number for _, number in sorted(due)]


@given(sets, seeds, windows, st.integers(0, 100), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_any_seek_in_a_mixture_gives_the_uninterrupted_stream(
    sets: list[tuple[list[int], float]], seed: int, window: int, start: int, counts: list[int]
) -> None:
    arguments = [sizes for sizes, _ in sets], [repeat for _, repeat in sets], seed, window
    whole = MixtureSampler(*arguments).ids(0, start + sum(counts)).tolist()
    for count in counts:
        assert MixtureSampler(*arguments).ids(start, count).tolist() == whole[start : start + count]
        start += count


@pytest.mark.parametrize("mixed", [False, True])
def test_seeks_at_once_in_a_hundred_million_samples(mixed: bool) -> None:
    shards = np.full(20_000, 5_000)
    seconds = []
    tracemalloc.start()
    for _ in range(3):  # the best of three new ones, since machines that run tests are busy
        begin = time.perf_counter()
        order = (
            MixtureSampler([shards, shards[:7]], [1, 2.5], 0, 16_384) if mixed else ShuffledSampler(shards, 0, 16_384)
        )
        order.ids(99_999_000, 2_048)  # across the end of an epoch
        seconds.append(time.perf_counter() - begin)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(seconds) < 0.1
    assert peak < 8 * 2**20


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 4))
def test_dealing_gives_every_sample_once_in_equal_parts(lengths: list[int], world: int, micro: int) -> None:
    lengths = lengths * world * micro
    dealt = split_by_length(lengths, world, micro)
    assert dealt.shape == (world, micro, len(lengths) // world // micro)
    assert sorted(dealt.ravel().tolist()) == list(range(len(lengths)))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), seeds)
def test_dealing_pads_least_and_balances_ranks(world: int, micro: int, size: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 78, world * micro * size)
    longest = lengths[split_by_length(lengths, world, micro)].max(2)
    # no other cut into equal parts has a smaller sum of longest lengths than the sorted one
    assert longest.sum() == np.sort(lengths)[::-1].reshape(-1, size)[:, 0].sum()
    assert (np.diff(longest.max(0)) <= 0).all()
    if micro % 2 == 0:  # what one rank had more in a turn it has less in the next
        assert np.ptp(longest.sum(1)) <= np.ptp(longest)


def test_dealing_halves_the_padding_of_captions_like_cc3m() -> None:
    rng = np.random.default_rng(0)
    words = np.clip(rng.lognormal(np.log(9.3), 0.45, 50 * 256), 4, 60)
    tokens = np.clip(words * 1.28 + 2, 5, 77).astype(int).reshape(50, 256)
    padded = {"dealt": 0, "as they come": 0}
    for batch in tokens:
        padded["dealt"] += batch[split_by_length(batch, 2, 4)].max(2).sum() * 32
        padded["as they come"] += batch.reshape(2, 4, 32).max(2).sum() * 32
    share = {name: 1 - tokens.sum() / total for name, total in padded.items()}
    assert share["dealt"] < 0.55 * share["as they come"]


def test_dealing_what_does_not_divide_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        split_by_length(range(10), 2, 3)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 12))
def test_a_cut_has_all_samples_in_like_sized_batches(lengths: list[int], batch_size: int) -> None:
    batches = eval_batches(lengths, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert len(batches) == ceil(len(lengths) / batch_size)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_a_cut_of_nothing_is_one_empty_batch() -> None:
    assert [len(batch) for batch in eval_batches([], 4)] == [0]
