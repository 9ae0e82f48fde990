"""Why: the model must see the same samples for any ranks, workers, stops and broken images."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import image_bytes, pair, write_set, write_tar

from hive_scale.batch import Batch
from hive_scale.config import DataConfig, TokenizerConfig
from hive_scale.data.dataset import Read
from hive_scale.data.loader import Loader
from hive_scale.data.sampler import ShuffledSampler
from hive_scale.data.tokenizer import Tokenizer, open_tokenizer
from hive_scale.distributed import World
from hive_scale.exit_codes import TryAgain

CPU = torch.device("cpu")
BROKEN = {"0-3", "1-1", "2-0"}  # their headers are well, so that only decoding finds out


def worlds(size: int) -> Iterator[World]:
    return (World(rank, size, CPU) for rank in range(size))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(TokenizerConfig())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_set(tmp_path_factory.mktemp("whole"), [7, 11, 5])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("broken")
    shards = []
    for s, size in enumerate([7, 11, 5]):
        samples = [(f"{s}-{i}", pair(100 * s + i)) for i in range(size)]
        for key, members in samples:
            if key in BROKEN:
                members["jpg"] = members["jpg"][:-80]
        shards.append(write_tar(directory / f"set-{s:04d}.tar", samples))
    return shards


def _loader(shards: list[str], tokenizer: Tokenizer, bad: Path | None = None, **config: object) -> Loader:
    return Loader(
        DataConfig(**{"shuffle_window": 9, "max_bad_share": 1.0} | config),
        shards,
        tokenizer,
        image_size=16,
        bad_samples=bad,
    )


def _steps(loader: Loader, world_size: int, accumulation: int, start: int, count: int) -> list[list[Batch]]:
    """`count` global batches of 12, each as its micro-batches over all ranks."""
    ranks = [
        loader.steps(global_batch=12, accumulation=accumulation, seed=3, start=start, world=world)
        for world in worlds(world_size)
    ]
    return [[batch for rank in ranks for batch in next(rank)] for _ in range(count)]


def _keys(steps: list[list[Batch]]) -> list[list[str]]:
    return [sorted(key for batch in step for key in batch.keys) for step in steps]


# (ranks, micro-batches, workers); each rank of a part opens a loader of its own, with workers of its own
PARTS = [(1, 1, 0), (1, 1, 2), (1, 4, 0), (2, 3, 0), (2, 3, 1), (3, 1, 0), (4, 1, 0), (6, 2, 0)]


@pytest.mark.parametrize("which", ["shards", "broken"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 3)), max_size=4),
    some=st.sets(st.integers(0, 2), min_size=1),
    window=st.sampled_from([4, 9, 64]),
)
def test_any_worlds_workers_and_stops_see_the_uninterrupted_stream(
    which: str,
    parts: list[tuple[tuple[int, int, int], int]],
    some: set[int],
    window: int,
    request: pytest.FixtureRequest,
    tokenizer: Tokenizer,
) -> None:
    shards = [request.getfixturevalue(which)[i] for i in some]
    whole = _steps(_loader(shards, tokenizer, shuffle_window=window), 1, 1, 0, sum(count for _, count in parts))
    start, seen = 0, []
    for (world_size, accumulation, workers), count in parts:  # each a fresh start, as after an interruption
        loader = _loader(shards, tokenizer, shuffle_window=window, workers=workers)
        part = _steps(loader, world_size, accumulation, start * 12, count)
        assert {len(batch) for step in part for batch in step} == {12 // world_size // accumulation}
        start, seen = start + count, seen + part
    assert _keys(seen) == _keys(whole)


@pytest.mark.parametrize(("workers", "threads"), [(2, 1), (0, 3), (1, 2)])
def test_workers_and_threads_bring_the_same_batches_in_the_same_order(
    broken: list[str], tokenizer: Tokenizer, workers: int, threads: int
) -> None:
    alone = _steps(_loader(broken, tokenizer), 1, 3, 12, 4)
    loader = _loader(broken, tokenizer, workers=workers, decode_threads=threads)
    for one, other in zip(alone, _steps(loader, 1, 3, 12, 4), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.keys == b.keys
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.target_ids, b.target_ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_of_images_is_used_again_only_when_nobody_holds_it(
    broken: list[str], tokenizer: Tokenizer, workers: int
) -> None:
    loader = _loader(broken, tokenizer, workers=workers)
    [world] = worlds(1)

    def images(count: int) -> Iterator[torch.Tensor]:
        steps = loader.steps(global_batch=6, accumulation=1, seed=3, start=0, world=world)
        return (batch.pixels for [batch] in islice(steps, count))

    held = list(images(24))  # more than there are buffers for
    own = [pixels.clone() for pixels in images(24)]
    assert all(torch.equal(one, other) for one, other in zip(held, own, strict=True))
    assert len({pixels.data_ptr() for pixels in held}) == 24
    assert len({pixels.data_ptr() for pixels in images(24)}) <= 2 + 2 * workers
    last = [pixels[-1:] for pixels in images(24)]  # a part of a batch holds it all
    assert all(torch.equal(one, other[-1:]) for one, other in zip(last, own, strict=True))
    once = {batch.keys: batch.pixels for batch in loader.once(batch_size=4, world=world)}
    for keys, pixels in once.items():  # those behind a broken one have moved up
        for key, image in zip(keys, pixels, strict=True):
            [i] = [i for i in range(len(loader.index)) if loader.index.key(i) == key]
            assert torch.equal(image, loader.pixels(i)), key


def nested(depth: int) -> bytes:
    return b'{"conversations": ' + b"[" * depth + b"]" * depth + b"}"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a<image>\ud83d/s\x00", max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "image"]), inner, max_size=4)
    ),
    max_leaves=8,
)
turns = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "owl"]), "value": values})
records = st.dictionaries(st.sampled_from(["conversations", "messages", "image"]), values | st.lists(turns, max_size=4))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    record=st.binary(max_size=20)
    | (values | records).map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b"null", b"[]", b"1" * 5000, nested(900), nested(100_000)])
)
def test_any_json_beside_an_image_is_a_sample_or_a_bad_one(tmp_path: Path, tokenizer: Tokenizer, record: bytes) -> None:
    sound = b'{"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]}'
    samples = [(str(i), pair(i) | {"json": record if i == 1 else sound}) for i in range(3)]
    (tmp_path / "bad.jsonl").unlink(missing_ok=True)
    loader = _loader(
        [write_tar(tmp_path / "a.tar", samples)],
        tokenizer,
        tmp_path / "bad.jsonl",
        format="conversation",
        max_tokens=200,
    )
    [step] = _steps(loader, 1, 1, 0, 1)
    reason = ""
    try:
        loader.sample(1)
    except ValueError as error:
        reason = str(error)
    assert {key for batch in step for key in batch.keys} == ({"0", "2"} if reason else {"0", "1", "2"})
    told = (tmp_path / "bad.jsonl").read_text() if reason else ""
    assert [(line["key"], line["reason"]) for line in map(json.loads, told.splitlines())] == [("1", reason)] * bool(
        reason
    )


def test_loading_leaves_the_random_state_alone(shards: list[str], tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    _steps(_loader(shards, tokenizer), 1, 1, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_broken_slot_is_filled_by_rule_and_nothing_else_moves(
    shards: list[str], broken: list[str], tokenizer: Tokenizer
) -> None:
    whole, loader = _loader(shards, tokenizer), _loader(broken, tokenizer)
    order = ShuffledSampler(loader.index.shard_sizes, 3, 9)
    for step, (a, b) in enumerate(zip(_steps(whole, 1, 1, 0, 6), _steps(loader, 1, 1, 0, 6), strict=True)):
        ids = order.ids(12 * step, 12).tolist()
        for key, filled in zip(a[0].keys, b[0].keys, strict=True):
            if key in BROKEN:
                position = 12 * step + [loader.index.key(i) for i in ids].index(key)
                substitutes = [loader.index.key(i) for i in order.substitutes(position)]
                assert filled == next(key for key in substitutes if key not in BROKEN)
            else:
                assert filled == key


def test_broken_samples_are_listed_once_for_all_ranks_and_restarts(
    broken: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    for workers in (0, 2):  # two passes over the set each, by two ranks
        _steps(_loader(broken, tokenizer, path, workers=workers), 2, 1, 0, 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(BROKEN)
    assert all("cannot be decoded" in line["reason"] for line in lines)
    assert {Path(line["shard"]).name for line in lines} == {"set-0000.tar", "set-0001.tar", "set-0002.tar"}


def test_the_budget_stops_a_run_and_its_continuation(broken: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^bad samples: 3, more than data\.max_bad_samples=2 \(3 x the image"):
            _steps(_loader(broken, tokenizer, path, max_bad_samples=2), 1, 1, 0, 4)
    _steps(_loader(broken, tokenizer, path, max_bad_samples=3), 1, 1, 0, 4)


def test_faults_of_the_index_are_listed_from_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [("good", pair(1)), ("mute", {"jpg": image_bytes()}), ("good", pair(2))]
    path = tmp_path / "bad_samples.jsonl"
    loader = _loader([write_tar(tmp_path / "a.tar", samples)], tokenizer, path)
    assert loader.num_samples == 1
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["mute", "good"]


def test_an_oversize_image_is_refused_by_its_header(tmp_path: Path, tokenizer: Tokenizer) -> None:
    large = {**pair(1), "jpg": image_bytes(200, 100)}
    loader = _loader(
        [write_tar(tmp_path / "a.tar", [("large", large), ("small", pair(2))])], tokenizer, max_pixels=10_000
    )
    loader._reader.shards = ["/nowhere"]  # the index knows without reading
    with pytest.raises(ValueError, match="200 x 100"):
        loader.sample(0)


def test_the_conversation_view_reads_the_records_of_the_same_tars(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def talk(*said: str) -> bytes:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        return json.dumps({"image": "a.jpg", "conversations": turns}).encode()

    talks = [talk(f"<image>\nWhat is image {i}?", "x" * (i + 1), "Sure?", "yes") for i in range(6)]
    samples = [(str(i), {**pair(i), "json": one}) for i, one in enumerate(talks)]
    samples += [("mute", {k: v for k, v in pair(6).items() if k != "json"}), ("two", {**pair(7), "json": talk("q")})]
    path = tmp_path / "bad_samples.jsonl"
    shards = [write_tar(tmp_path / "a.tar", samples)]
    loader = _loader(shards, tokenizer, path, format="conversation", max_tokens=400, image_transform="pad")
    [batch] = list(loader.once(batch_size=8, world=World(0, 1, CPU)))
    assert list(batch.keys) == sorted("012345", reverse=True), "longest record first"
    answers = tokenizer.decode(batch.target_ids.tolist()).split()
    assert answers == [answer for i in range(5, -1, -1) for answer in ("x" * (i + 1), "yes")]
    reasons = {line["key"]: line["reason"] for line in map(json.loads, path.read_text().splitlines())}
    assert reasons.keys() == {"mute", "two"}
    assert "no conversation in its .json" in reasons["mute"]
    assert "does not alternate" in reasons["two"]
    assert len(next(_loader(shards, tokenizer).once(batch_size=8, world=World(0, 1, CPU)))) == 8, "captions need none"


def test_a_set_without_one_readable_sample_stops_in_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [(str(i), {**pair(i), "jpg": pair(i)["jpg"][:-80]}) for i in range(4)]
    shard = write_tar(tmp_path / "a.tar", samples)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^no sample near .*a\.tar: \d: .* can be used"):
            _steps(_loader([shard], tokenizer, workers=workers), 1, 1, 0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("which", ["shards", "broken"])
def test_once_sees_each_good_sample_once_on_equally_many_batches(
    which: str, world_size: int, request: pytest.FixtureRequest, tokenizer: Tokenizer
) -> None:
    loader = _loader(request.getfixturevalue(which), tokenizer)
    ranks = [list(loader.once(batch_size=6, world=world)) for world in worlds(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    expected = {loader.index.key(i) for i in range(loader.num_samples)} - (BROKEN if which == "broken" else set())
    assert sorted(key for batch in batches if batch.num_tokens for key in batch.keys) == sorted(expected)
    for batch in batches:
        assert len(batch) <= 6
        if not batch.num_tokens:
            assert not batch.all_images
            assert batch.keys == ("",)


def test_a_sample_can_be_asked_for_by_number(shards: list[str], tokenizer: Tokenizer) -> None:
    loader = _loader(shards, tokenizer)
    assert loader.num_samples == 23
    sample = loader.sample(7)
    assert sample.key == "1-0"
    assert sample.pixels is not None
    assert sample.pixels.shape == (3, 16, 16)
    assert loader.record(7) == {"seed": 100}
    assert loader.caption(7) == tokenizer.decode(sample.tokens)


def test_blank_images_keep_everything_but_the_image(shards: list[str], tokenizer: Tokenizer) -> None:
    seen, blank = (_steps(_loader(shards, tokenizer, blank_images=flag), 1, 1, 0, 1)[0][0] for flag in (False, True))
    assert seen.keys == blank.keys
    assert torch.equal(seen.tokens, blank.tokens)
    assert blank.all_images
    assert (blank.pixels == 127).all()
    assert not (seen.pixels == 127).all()


def test_dealing_by_length_shortens_what_the_model_computes(shards: list[str], tokenizer: Tokenizer) -> None:
    loader = _loader(shards, tokenizer, max_tokens=200)
    [step] = _steps(loader, 2, 3, 0, 1)
    [whole] = _steps(loader, 1, 1, 0, 1)
    assert sum(batch.tokens.numel() for batch in step) < 0.8 * whole[0].tokens.numel()
    assert sum(batch.num_tokens for batch in step) == whole[0].num_tokens


@pytest.mark.parametrize("threads", [1, 2])
def test_a_dead_worker_names_the_sample(
    shards: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    decode = Loader.decoded

    def die(loader: Loader, read: Read, out: torch.Tensor) -> object:
        if read.key == "1-4":
            os._exit(1)
        return decode(loader, read, out)

    monkeypatch.setattr(Loader, "decoded", die)
    with pytest.raises(TryAgain, match=r"while reading .*1-4"):
        _steps(_loader(shards, tokenizer, workers=2, decode_threads=threads), 1, 1, 0, 2)


def test_a_missing_shard_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="is missing"):
        _loader([str(tmp_path / "none.tar")], tokenizer)


def test_the_default_window_mixes_shards(shards: list[str], tokenizer: Tokenizer) -> None:
    config = replace(DataConfig(), train=shards)
    loader = Loader(config, config.train, tokenizer, image_size=16)
    steps = loader.steps(global_batch=12, accumulation=1, seed=0, start=0, world=World(0, 1, CPU))
    shards_seen = [{key.split("-")[0] for key in step[0].keys} for step in islice(steps, 4)]
    assert np.mean([len(seen) for seen in shards_seen]) > 2


def test_sets_are_mixed_as_often_as_asked(shards: list[str], tokenizer: Tokenizer) -> None:
    loader = _loader([f"2 x {shards[0]}", *shards[1:]], tokenizer)
    assert loader.num_samples == 2 * 7 + 11 + 5
    keys = [key for step in _keys(_steps(loader, 2, 3, 0, 5)) for key in step]  # two epochs
    assert sorted(Counter(keys).items()) == sorted((loader.index.key(i), 4 if i < 7 else 2) for i in range(23))
    with pytest.raises(ValueError, match="0 times"):
        _loader([f"0 x {shards[0]}"], tokenizer)


def test_signals_to_all_processes_leave_the_workers_alive(shards: list[str], tokenizer: Tokenizer) -> None:
    loader = _loader(shards, tokenizer, workers=2)
    steps = loader.steps(global_batch=4, accumulation=1, seed=0, start=0, world=World(0, 1, CPU))
    for _ in range(2):  # one from each: both have begun
        next(steps)
    workers = multiprocessing.active_children()
    for worker in workers:  # as Slurm sends them, not from the main process
        for name in ("INT", "USR1", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    for _ in range(20):  # more than was fetched ahead
        next(steps)
    steps.close()
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_workers_stay_for_the_next_pass_and_go_with_what_they_served(
    broken: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    loader = _loader(broken, tokenizer, tmp_path / "bad.jsonl", workers=2)
    passes = loader.every(batch_size=6, world=World(0, 1, CPU))
    seen, workers = [], []
    for _ in range(3):
        seen.append([(batch.keys, batch.pixels.clone()) for batch in passes])
        workers.append({worker.pid for worker in multiprocessing.active_children()})
    assert workers[0] == workers[1] == workers[2]
    assert len(workers[0]) == 2
    for one in seen[1:]:
        assert [keys for keys, _ in one] == [keys for keys, _ in seen[0]]
        assert all(torch.equal(pixels, before) for (_, pixels), (_, before) in zip(one, seen[0], strict=True))
    half = iter(passes)
    next(half)
    half.close()  # type: ignore[attr-defined]
    assert [batch.keys for batch in passes] == [keys for keys, _ in seen[0]], "one that was left is gone"
    del passes, half
    assert not multiprocessing.active_children()


ORPHANED = """
import multiprocessing, os, sys, time
import torch
from hive_scale.config import DataConfig, TokenizerConfig
from hive_scale.data import dataset
from hive_scale.data.loader import Loader
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import World

multiprocessing.set_start_method(sys.argv[1])
read, main = dataset.SampleReader.read, os.getpid()
def stuck(self, i):
    if i == 9:
        time.sleep(600)
    return read(self, i)
dataset.SampleReader.read = stuck
config = DataConfig(workers=2)
loader = Loader(config, sys.argv[2:], open_tokenizer(TokenizerConfig()), image_size=24)
steps = loader.steps(global_batch=1, accumulation=1, seed=0, start=0, world=World(0, 1, torch.device("cpu")))
next(steps)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
for _ in steps:
    pass
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_no_worker_outlives_a_main_process_that_was_killed(method: str, shards: list[str]) -> None:
    """Whatever Python's default start method is: workers are forked, and know their parent."""
    code = [sys.executable, "-c", ORPHANED, method, *shards]
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1.0)  # until one is stuck in an image
        main.kill()
        main.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(alive(pid) for pid in workers):
            time.sleep(0.1)
        assert not [pid for pid in workers if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def _served(loader: Loader) -> set[str]:
    return {loader.index.key(int(i)) for i in loader.numbers}


def test_a_share_is_held_out_by_key_whatever_the_order_of_shards(shards: list[str], tokenizer: Tokenizer) -> None:
    whole = _loader(shards, tokenizer)
    train, heldout = whole.split(0.3)
    assert (_served(train) | _served(heldout), _served(train) & _served(heldout)) == (_served(whole), set())
    assert 0 < len(heldout.numbers) < len(whole.numbers) // 2
    for other in (shards[::-1], [f"2 x {shards[1]}", shards[0], shards[2]]):
        assert _served(_loader(other, tokenizer).split(0.3)[1]) == _served(heldout)
    alone = _loader(shards[:1], tokenizer).split(0.3)  # other shards do not matter either
    assert _served(alone[1]) == {key for key in _served(heldout) if key in _served(_loader(shards[:1], tokenizer))}
    assert _served(heldout) <= _served(whole.split(0.6)[1])
    names = {one.fingerprint for one in (whole, train, heldout, *whole.split(0.6))}
    assert len(names) == 5
    assert whole.split(0.3)[0].fingerprint == train.fingerprint


def test_training_never_reads_what_is_held_out(shards: list[str], tokenizer: Tokenizer) -> None:
    for names in (shards, [f"2 x {shards[0]}", *shards[1:]]):
        train, heldout = _loader(names, tokenizer).split(0.3)
        steps = [key for step in _keys(_steps(train, 2, 3, 0, 12)) for key in step]
        assert set(steps) == _served(train)
        if names is shards:
            epochs = Counter(steps).values()
            assert max(epochs) - min(epochs) <= 1
        read = [key for world in worlds(2) for batch in heldout.once(batch_size=2, world=world) for key in batch.keys]
        assert sorted(filter(None, read)) == sorted(_served(heldout))
    order = train.stream(3)
    assert all(set(order.substitutes(position)) <= set(train.numbers) for position in range(20))


def test_some_sample_is_held_out_and_some_are_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    two = _loader([write_tar(tmp_path / "two.tar", [("a", pair(1)), ("b", pair(2))])], tokenizer)
    assert [len(part.numbers) for part in two.split(1e-9)] == [1, 1]
    one = _loader([write_tar(tmp_path / "one.tar", [("a", pair(1))])], tokenizer)
    with pytest.raises(ValueError, match=r"all 1 samples of data\.train would be held out"):
        one.split(0.5)
    write_tar(tmp_path / "three.tar", [(str(i), pair(i)) for i in range(20)])
    train, heldout = _loader([f"2 x {tmp_path}/one.tar", f"{tmp_path}/three.tar"], tokenizer).split(0.1)
    assert "a" not in _served(heldout)  # a set may have none, and yet be evaluated
    assert (train.num_samples, len(list(heldout.spread(9)))) == (2 + 20 - len(heldout.numbers), len(heldout.numbers))
    with pytest.raises(ValueError, match=r"no usable sample is left to train on in '.*one\.tar'"):
        _loader([f"2 x {tmp_path}/one.tar", f"{tmp_path}/three.tar"], tokenizer).split(0.95)


def test_a_limit_evaluates_the_same_samples_each_time(shards: list[str], tokenizer: Tokenizer) -> None:
    whole = _loader(shards, tokenizer)
    some = whole.at_most(5)
    read = [key for batch in some.once(batch_size=2, world=next(worlds(1))) for key in batch.keys]
    assert (len(read), set(read)) == (5, _served(some))
    assert _served(_loader(shards[::-1], tokenizer).at_most(5)) == _served(some)
    assert len(list(some.spread(3))) == 3
    assert all(whole.at_most(count) is whole for count in (0, 23, 99))
    assert some.fingerprint == whole.fingerprint


def test_a_set_of_which_too_large_a_share_is_broken_is_refused(
    broken: list[str], shards: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    samples = [(str(i), pair(i) if i % 2 else {"jpg": image_bytes()}) for i in range(60)]
    half = write_tar(tmp_path / "half.tar", samples)
    with pytest.raises(ValueError, match=r"^bad samples: 30, more than data\.max_bad_share=0\.05 of 60 \(30 x .*half"):
        _loader([half], tokenizer, max_bad_share=0.05)
    assert _loader([half], tokenizer, max_bad_share=0.5).num_samples == 30
    # found only when they are decoded, by two ranks; other sets of the same run do not count
    path = tmp_path / "bad_samples.jsonl"
    _loader([half], tokenizer, path)
    with pytest.raises(ValueError, match=r"^bad samples: 3, more than data\.max_bad_share=0\.1 of 23 \(3 x the image"):
        _steps(_loader(broken, tokenizer, path, max_bad_share=0.1), 2, 1, 0, 4)
    _steps(_loader(broken, tokenizer, path, max_bad_share=0.14), 2, 1, 0, 4)
