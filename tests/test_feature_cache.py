"""Cached features train a stage to the losses of images, are computed once, and serve only their own encoder."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
import tars
import tiny
import torch

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.checkpoint.weights import Weights, read_weights
from hive_scale.config import Config, EngineConfig, PartConfig
from hive_scale.data import feature_store as kept_module
from hive_scale.data.feature_store import (
    DiskError,
    FeatureStore,
    open_feature_store,
    parts,
    record_size,
    settle,
    size_of,
)
from hive_scale.distributed import World, session
from hive_scale.feature_cache import cached_features, check_disk
from hive_scale.model import build
from hive_scale.observability.metrics import read_metrics
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.pipeline import run_pipeline
from hive_scale.preflight import open_data

JSONS = Path(__file__).resolve().parents[1] / "ds_configs"
ENGINES = {
    "fsdp, bf16": EngineConfig("bf16"),
    "zero2, bf16": EngineConfig("bf16", ds_config=str(JSONS / "zero2.json")),
}
ZERO_3 = {"zero3": EngineConfig(ds_config=str(JSONS / "zero3.json"))}
BOUND = {"fp32": 1e-6, "bf16": 1e-3}  # relative: products of other micro-batches round otherwise
IMAGES = 40


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs, of which one image is cut short, behind the header that the index has read."""
    pairs = [(f"{i:03d}", tars.pair(i)) for i in range(IMAGES)]
    pairs[7][1]["jpg"] = pairs[7][1]["jpg"][:-20]
    return tars.write_tar(tmp_path_factory.mktemp("pairs") / "pairs.tar", pairs)


def recipe(output: Path, shard: str, **changes: Any) -> Config:
    run = presets.load("debug", None, [f"output={output}"])
    vision, language = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=259))
    stages = {
        name: replace(stage, max_steps=4, global_batch=8, micro_batch=2, seed=seed)
        for seed, (name, stage) in enumerate(run.stages.items())
    }
    data = replace(run.data, train=[shard], heldout=[shard])
    model = replace(run.model, vision=vision, language=language, encoder_layer_ratio=0.5)
    return replace(run, model=model, stages=stages, data=data, blank_image_control=False, **changes)


def losses(config: Config) -> list[float]:
    return [line["loss"] for stage in config.stages for line in read_metrics(config.run_dir / stage / "metrics.jsonl")]


def both(world: World, engines: dict[str, EngineConfig], shard: str, folder: str) -> dict[str, Any]:
    """Of each engine: the losses of a run on images and of one on features."""
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        plain = recipe(Path(folder, name), shard, engine=engine)
        plain = replace(plain, stages={stage: plain.stages[stage] for stage in ("projector", "language")})
        kept = replace(plain, output=f"{plain.output}, kept", feature_cache=str(Path(folder, "cache")))
        for config in (plain, kept):
            run_pipeline(config, world)
        found[name] = engine.precision, losses(plain), losses(kept)
    return found


@pytest.mark.parametrize("engines", [ENGINES, pytest.param(ZERO_3, marks=pytest.mark.slow)], ids=["others", "zero3"])
def test_a_run_on_kept_features_has_the_losses_of_one_on_images(
    engines: dict[str, EngineConfig], shard: str, tmp_path: Path
) -> None:
    for name, (precision, plain, kept) in ranks.run(both, 2, engines, shard, str(tmp_path))[0].items():
        assert len(plain) == 8
        worst = max(abs(a / b - 1) for a, b in zip(plain, kept, strict=True))
        assert worst < BOUND[precision], (name, worst)
        said = [Path(tmp_path, run, "bad_samples.jsonl").read_text() for run in (name, f"{name}, kept")]
        assert "007" in said[0]
        assert "007" in said[1], "the broken sample is named all the same"
    made = {engine.precision for engine in engines.values()}
    assert len(list((tmp_path / "cache").glob("*.features"))) == len(made), "once for all stages, engines and ranks"


@pytest.fixture(scope="module")
def world() -> Any:
    with session() as world:
        yield world


def opened(config: Config, world: World, stage: str, weights: Weights, stop: Any = lambda: False) -> Any:
    model = build.meta_model(config.model)
    apply_trainable_groups(model, config.stages[stage], model.unused_parameters())
    return cached_features(config, model, open_data(config).train, weights, world, stop)


def missing_of(kept: Any) -> list[int]:
    return np.flatnonzero(kept.missing(np.arange(IMAGES))).tolist()


def test_what_was_made_stays_and_only_for_its_own_encoder(shard: str, tmp_path: Path, world: World) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    run_pipeline(config, world)
    first, last = (read_weights(config.run_dir / stage) for stage in ("projector", "joint"))
    assert opened(config, world, "joint", first) is None, "the encoder learns"
    [file] = (tmp_path / "cache").glob("*.features")
    made = opened(config, world, "language", first)
    assert not len(missing_of(made))
    assert made.get(7) is None
    assert made.get(8).shape == (2, 16, 32)
    stopped = opened(config, world, "language", last, stop=lambda: True)
    assert len(missing_of(stopped)) == IMAGES, "the joint stage has changed the encoder"
    made.put([0], torch.zeros(1, *made.shape))  # as only one who does not make it again would find it
    assert not opened(config, world, "language", first).get(0).any()
    assert file.stat().st_size <= size_of(IMAGES, made.shape, made.dtype)
    with file.open("r+b") as values:
        values.truncate(1000)
    assert opened(config, world, "language", first).get(0).any(), "a file that was cut is made again"


def heads(config: Config) -> Config:
    vision = PartConfig(config=tiny.SIGLIP | {"num_attention_heads": 4})
    return replace(config, model=replace(config.model, vision=vision))


def depths(config: Config) -> Config:
    return replace(config, model=replace(config.model, encoder_layers="later"))


def precision(config: Config) -> Config:
    return replace(config, engine=EngineConfig("bf16"))


def transform(config: Config) -> Config:
    return replace(config, data=replace(config.data, image_transform="pad"))


def limit(config: Config) -> Config:
    """Above which an image counts as broken, and stays so where its features are kept."""
    return replace(config, data=replace(config.data, max_pixels=10**6))


@pytest.mark.parametrize("change", [heads, depths, precision, transform, limit])
def test_features_of_the_same_weights_are_made_anew_for_anything_else_that_changes(
    shard: str, tmp_path: Path, world: World, change: Any
) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
    assert len(missing_of(opened(config, world, "language", weights))) == 0
    stopped = opened(change(config), world, "language", weights, stop=lambda: True)
    assert len(missing_of(stopped)) == IMAGES
    assert len(missing_of(opened(config, world, "language", weights, stop=lambda: True))) == 0


def test_a_set_of_the_same_sizes_with_other_images_is_another(tmp_path: Path, world: World) -> None:
    """Every member has its place and size, and the index knows by its digest that the shard is another."""
    lengths = [max(len(tars.image_bytes(seed=s + i)) for s in (0, 100)) for i in range(8)]
    found = []
    for name, seed in (("one", 0), ("other", 100)):
        pairs = [(f"{i:03d}", tars.pair(i)) for i in range(8)]
        for i, (_, members) in enumerate(pairs):
            members["jpg"] = tars.image_bytes(seed=seed + i).ljust(lengths[i], b"\0")
        shard = tars.write_tar(tmp_path / name / "pairs.tar", pairs)
        config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
        weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
        found.append((open_data(config).train.fingerprint, opened(config, world, "language", weights).get(5)))
    assert found[0][0] != found[1][0]
    assert not torch.equal(found[0][1], found[1][1])


def test_a_set_that_differs_in_a_single_image_is_another(shard: str, tmp_path: Path, world: World) -> None:
    """One that is not among those that are looked at: its size tells it."""
    found = []
    for seed in (1, 77):
        pairs = [(f"{i:03d}", tars.pair(i)) for i in range(IMAGES)]
        pairs[1][1]["jpg"] = tars.image_bytes(seed=seed)
        config = recipe(tmp_path / "run", tars.write_tar(tmp_path / f"{seed}" / "pairs.tar", pairs))
        config = replace(config, feature_cache=str(tmp_path / "cache"))
        weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
        found.append(opened(config, world, "language", weights).get(1))
    assert not torch.equal(*found)


def test_weights_that_no_depth_reads_do_not_count(shard: str, tmp_path: Path, world: World) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
    opened(config, world, "language", weights)
    for name in ("vision.encoder.layers.3.mlp.fc1.weight", "vision.post_layernorm.weight", "projector.0.up.weight"):
        weights[name] = weights[name] + 1
    assert not len(missing_of(opened(config, world, "language", weights, stop=lambda: True)))
    weights["vision.encoder.layers.2.mlp.fc1.weight"] = weights["vision.encoder.layers.2.mlp.fc1.weight"] + 1
    assert len(missing_of(opened(config, world, "language", weights, stop=lambda: True))) == IMAGES


def test_features_whose_file_was_deleted_are_made_again(shard: str, tmp_path: Path, world: World) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
    before = opened(config, world, "language", weights).get(8)
    [file] = (tmp_path / "cache").glob("*.features")
    file.unlink()
    assert torch.equal(opened(config, world, "language", weights).get(8), before)


def test_a_disk_without_room_is_met_before_the_first_image(tmp_path: Path, world: World) -> None:
    some, shape = np.arange(10**6), (6, 576, 1024)
    with pytest.raises(DiskError, match=r" GB of features are still to be made, .* GB are free"):
        open_feature_store(world, tmp_path / "large", some, len(some), shape, torch.bfloat16)
    _, missing = open_feature_store(world, tmp_path / "large", some[:3], len(some), shape, torch.bfloat16)
    assert missing.tolist() == [0, 1, 2]


def test_features_beyond_the_disk_are_refused_before_the_run(shard: str, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "not" / "yet"))
    loader = copy(open_data(config).train)
    model = build.meta_model(config.model)
    apply_trainable_groups(model, config.stages["projector"])
    check_disk(config, model, loader)
    loader.index = replace(loader.index, arrays={"caption_bytes": np.broadcast_to(np.int8(0), 10**12)})
    with pytest.raises(ValueError, match=r"1,000,000,000,000 images are 4224000.0 GB, .* name another disk"):
        check_disk(config, model, loader)
    check_disk(replace(config, feature_cache=""), model, loader)
    apply_trainable_groups(model, config.stages["joint"])
    check_disk(config, model, loader)  # whose encoder trains: nothing is kept


def test_a_run_that_has_begun_is_not_refused_for_a_disk_that_has_filled_up(shard: str, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    loader = copy(open_data(config).train)
    loader.index = replace(loader.index, arrays={"caption_bytes": np.broadcast_to(np.int8(0), 10**12)})
    model = build.meta_model(config.model)
    apply_trainable_groups(model, config.stages["projector"])
    with pytest.raises(ValueError, match="name another disk"):
        check_disk(config, model, loader)
    configs.save(config, config.run_dir / "config.yaml")
    check_disk(config, model, loader)


SHAPE = 2, 16, 32
RECORD = record_size(SHAPE, torch.float32)


def kept_of(path: Path, count: int = 70) -> tuple[FeatureStore, torch.Tensor]:
    kept = FeatureStore(path, count, SHAPE, torch.float32)
    features = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    kept.put(list(range(count)), features)
    return kept, features


def test_what_is_missing_is_made_again_in_the_company_it_was_made_in() -> None:
    """A batch of other images rounds otherwise: what is made again would differ in its last bits."""
    wanted = np.arange(100)
    first = [part.tolist() for part in parts(wanted, wanted, 32)]
    assert [number for part in first for number in part] == wanted.tolist()
    assert [part.tolist() for part in parts(wanted, np.array([5, 64, 99]), 32)] == [first[0], first[2], first[3]]
    assert parts(wanted, np.array([], dtype=int), 32) == []


def test_no_damage_of_a_file_is_read_as_features(tmp_path: Path) -> None:
    """Whichever byte of a record is another, that record alone is not believed."""
    kept, features = kept_of(tmp_path / "some")
    whole = kept.file.read_bytes()
    random = np.random.default_rng(0)
    places = [5 * RECORD - 1 - place for place in range(40)]  # all of what is behind the features of number 4
    places += random.integers(4 * RECORD, 5 * RECORD - 40, 40).tolist()
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << random.integers(8)
        kept.file.write_bytes(data)
        found = [kept.get(number) for number in (3, 4, 5, 69)]
        assert found[1] is None, place
        for number, one in zip((3, 5, 69), (found[0], *found[2:]), strict=True):
            assert torch.equal(one, features[number])  # type: ignore[arg-type]
    for damaged in (b"", whole[:100], whole[: 4 * RECORD + 10], bytes(len(whole)), whole[RECORD:]):
        kept.file.write_bytes(damaged)
        assert kept.get(4) is None
    kept.file.write_bytes(whole)
    other = kept.file.rename(tmp_path / "other.features")
    assert FeatureStore(other.with_suffix(""), 70, SHAPE, torch.float32).get(4) is None, "it is of another set"


def test_a_link_or_a_pipe_in_the_place_of_features_is_not_used(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("everything")
    (tmp_path / "key.features").symlink_to(precious)
    with pytest.raises(DiskError, match="name another disk"):
        open_feature_store(
            World(0, 1, torch.device("cpu")), tmp_path / "key", np.arange(4), 4, (1, 2, 3), torch.float32
        )
    assert precious.read_text() == "everything"
    (tmp_path / "key.features").unlink()
    os.mkfifo(tmp_path / "key.features")
    kept = FeatureStore(tmp_path / "key", 4, (1, 2, 3), torch.float32)
    with pytest.raises(OSError, match="seek"):
        kept.put([0], torch.zeros(1, 1, 2, 3))


def test_neighbours_lie_on_pages_that_no_other_part_touches(tmp_path: Path) -> None:
    kept = FeatureStore(tmp_path / "some", 100, SHAPE, torch.float32)
    kept.put(list(range(32, 64)), torch.ones(32, *SHAPE))
    data = np.frombuffer(kept.file.read_bytes(), np.uint8)
    first = size_of(32, SHAPE, torch.float32)
    assert first % 4096 == 0
    assert not data[:first].any()
    assert len(data) <= 2 * first
    assert kept.missing(np.arange(100)).tolist() == [True] * 32 + [False] * 32 + [True] * 36


def flipped(file: Path, every: int) -> None:
    """Damage every so many bytes."""
    data = bytearray(file.read_bytes())
    for place in range(every // 2, len(data), every):
        data[place] ^= 64
    file.write_bytes(data)


def zeroed(file: Path) -> None:
    """The features alone, while what is behind them stays: as a disk that lost the one and not the other."""
    data = bytearray(file.read_bytes())
    group = size_of(32, SHAPE, torch.float32)
    for number in range(IMAGES):
        place = number // 32 * group + number % 32 * RECORD
        data[place : place + RECORD - 32] = bytes(RECORD - 32)
    file.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_that_are_damaged_are_made_again_while_a_stage_trains(
    shard: str, tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """In the place of each image; the losses are those of sound ones."""
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    config = replace(config, data=replace(config.data, workers=workers))
    weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
    train = open_data(config).train

    def batches(kept: Any) -> list[Any]:
        steps = train.with_features(kept).steps(global_batch=8, accumulation=2, seed=0, start=0, world=world)
        return [batch for _ in range(6) for batch in next(steps)]

    sound = batches(opened(config, world, "language", weights))
    assert not caplog.records
    for damage in (partial(flipped, every=RECORD * 3), zeroed):
        kept = opened(config, world, "language", weights)
        damage(kept.file)
        for found, wanted in zip(batches(kept), sound, strict=True):
            assert found.keys == wanted.keys
            assert found.pixels.flatten(1).any(1).all()
            torch.testing.assert_close(found.pixels, wanted.pixels)
        assert "the encoder makes them again" in caplog.text
        told = {Path(str(record.args[0])).name for record in caplog.records if record.args}
        assert kept.file.name in told
        caplog.clear()
        assert all(kept.get(n) is not None for n in range(IMAGES) if n != 7), "and they are kept"


def full_disk(folder: Path, megabytes: int) -> bool:
    folder.mkdir()
    return os.system(f"mount -t tmpfs -o size={megabytes}m tmpfs {folder} 2>/dev/null") == 0


def test_a_disk_that_fills_up_in_the_pass_leaves_the_stage_its_images(
    shard: str, tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Others fill it meanwhile: the room that was there at the beginning is there no more."""
    disk = tmp_path / "disk"
    if not full_disk(disk, 1):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        config = recipe(tmp_path / "run", shard, feature_cache=str(disk / "cache"))
        weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
        calls = iter(range(100))

        def fill() -> bool:
            if next(calls) == 1:  # after the first part
                with (disk / "others").open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(4096))
            return False

        assert opened(config, world, "language", weights, stop=fill) is None
        assert "No space left" in caplog.text
        assert "trains on images" in caplog.text
        assert not list((disk / "cache").iterdir()), "what it had made is no use, and checkpoints may need the room"
    finally:
        os.system(f"umount -l {disk}")


def test_a_disk_that_goes_away_does_not_stop_a_run(
    shard: str, tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """And gives the losses of images."""
    found = []
    for name, cache in (("plain", ""), ("lost", str(tmp_path / "file" / "cache"))):
        (tmp_path / "file").touch()
        config = recipe(tmp_path / name, shard, feature_cache=cache)
        run_pipeline(replace(config, stages={"projector": config.stages["projector"]}), world)
        found.append(losses(replace(config, stages={"projector": config.stages["projector"]})))
    assert found[0] == found[1]
    assert "trains on images" in caplog.text


def half_full(world: World, folder: str, shard: str) -> tuple[bool, bool]:
    """Whether each rank got features where one alone cannot write, and after that where all can."""
    config = recipe(Path(folder, "run"), shard, feature_cache=str(Path(folder, "cache")))
    weights: Any = {name: p.detach() for name, p in build.init_model(config.model, 0).named_parameters()}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    first = opened(config, world, "language", weights)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    second = opened(config, world, "language", weights)
    return first is not None, second is not None and len(missing_of(second)) == 0


def test_a_rank_that_cannot_write_takes_the_others_with_it_to_the_images(shard: str, tmp_path: Path) -> None:
    assert ranks.run(half_full, 2, str(tmp_path), shard) == [(False, True)] * 2


class Pages:
    """`os`, as a client of NFS has it: a descriptor has copies of the pages it has read, and of the file's length.

    It writes whole pages when it is synced or closed, and looks at the server's again only once it is opened anew.
    """

    SIZE = 4096

    def __init__(self) -> None:
        self.copies: dict[int, dict[int, bytearray]] = {}
        self.changed: dict[int, set[int]] = {}
        self.lengths: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, *arguments: Any) -> int:
        descriptor = os.open(*arguments)
        self.copies[descriptor], self.changed[descriptor] = {}, set()
        self.lengths[descriptor] = os.fstat(descriptor).st_size
        return descriptor

    def close(self, descriptor: int) -> None:
        self.fsync(descriptor)
        os.close(descriptor)

    def fsync(self, descriptor: int) -> None:
        for number in sorted(self.changed[descriptor]):
            end = self.lengths[descriptor] - number * self.SIZE
            os.pwrite(descriptor, self.copies[descriptor][number][:end], number * self.SIZE)
        self.changed[descriptor].clear()

    def fstat(self, descriptor: int) -> Any:
        return SimpleNamespace(st_size=self.lengths[descriptor])

    def page(self, descriptor: int, number: int) -> bytearray:
        copies = self.copies[descriptor]
        if number not in copies:
            copies[number] = bytearray(os.pread(descriptor, self.SIZE, number * self.SIZE).ljust(self.SIZE, b"\0"))
        return copies[number]

    def pwritev(self, descriptor: int, parts: Any, place: int) -> int:
        data = b"".join(bytes(part) for part in parts)
        self.lengths[descriptor] = max(self.lengths[descriptor], place + len(data))
        for at, byte in enumerate(data, place):
            self.page(descriptor, at // self.SIZE)[at % self.SIZE] = byte
        self.changed[descriptor] |= set(range(place // self.SIZE, (place + len(data) - 1) // self.SIZE + 1))
        return len(data)

    def pread(self, descriptor: int, size: int, place: int) -> bytes:
        end = min(place + size, self.lengths[descriptor])
        return bytes(self.page(descriptor, at // self.SIZE)[at % self.SIZE] for at in range(place, end))

    def preadv(self, descriptor: int, buffers: Any, place: int) -> int:
        [buffer] = buffers
        data = self.pread(descriptor, len(buffer), place)
        buffer[: len(data)] = data
        return len(data)


PAGED = 2, 4, 16  # the shape of small features, several records of which lie on a page
NODES = 96  # images


def features_of(number: int) -> torch.Tensor:
    return torch.full((1, *PAGED), float(number + 1))


def on_two_nodes(world: World, path: str) -> list[float]:
    """What a rank reads of what both have made, the second a second later."""
    kept_module.os = Pages()  # type: ignore[attr-defined]
    kept, missing = open_feature_store(world, Path(path), np.arange(NODES), NODES, PAGED, torch.float32)
    assert kept.missing(np.arange(NODES)).all(), "and so each has pages, and a length, of the file as it is now"
    time.sleep(world.rank)
    for part in parts(np.arange(NODES), missing, 32)[world.rank :: world.size]:
        for number in part.tolist():
            kept.put([number], features_of(number))
    settle(world, kept, None)
    found = [kept.get(number) for number in range(NODES)]
    return [0.0 if one is None else float(one.mean()) for one in found]


def test_nodes_that_keep_pages_of_a_network_file_system_read_what_others_made(tmp_path: Path) -> None:
    wanted = [float(number + 1) for number in range(NODES)]
    assert ranks.run(on_two_nodes, 2, str(tmp_path / "some")) == [wanted, wanted]


def test_the_stand_in_for_a_network_file_system_loses_what_shares_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test before this one could not fail."""
    monkeypatch.setattr(kept_module, "os", Pages())
    nodes = [FeatureStore(tmp_path / "some", NODES, PAGED, torch.float32) for _ in range(2)]
    for number in range(NODES):  # one by one, not in parts
        nodes[number % 2].put([number], features_of(number))
    assert nodes[0].get(1) is None, "nothing is seen before it is synced"
    for node in nodes:
        node.sync()
    assert nodes[0].get(1) is None, "nor before it is opened again"
    for node in nodes:
        node.reopen()
    assert sum(nodes[0].get(number) is None for number in range(NODES)) > NODES / 4
