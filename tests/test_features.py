"""Features that are kept train a stage to the losses of pictures, are made once, and serve their own encoder alone."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tars
import tiny
import torch

from hive_scale import presets
from hive_scale.checkpoint.handoff import Weights, read_weights
from hive_scale.config import Config, EngineConfig, PartConfig
from hive_scale.data.kept import open_kept
from hive_scale.distributed import World, session
from hive_scale.features import check_disk, kept_features
from hive_scale.model import build
from hive_scale.pipeline import run_pipeline
from hive_scale.preparation import open_data
from hive_scale.stage import freeze
from hive_scale.watch.metrics import read_metrics

JSONS = Path(__file__).resolve().parents[1] / "ds_configs"
ENGINES = {
    "fsdp": EngineConfig(),
    "fsdp, bf16": EngineConfig("bf16"),
    "zero2, bf16": EngineConfig("bf16", ds_config=str(JSONS / "zero2.json")),
}
ZERO_3 = {"zero3": EngineConfig(ds_config=str(JSONS / "zero3.json"))}
BOUND = {"fp32": 1e-6, "bf16": 1e-3}  # relative: products of other micro-batches round otherwise
PICTURES = 40


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs, of which one picture is cut short, behind the header that the index has read."""
    pairs = [(f"{i:03d}", tars.pair(i)) for i in range(PICTURES)]
    pairs[7][1]["jpg"] = pairs[7][1]["jpg"][:-20]
    return tars.write_tar(tmp_path_factory.mktemp("pairs") / "pairs.tar", pairs)


def recipe(output: Path, shard: str, **changes: Any) -> Config:
    run = presets.load("debug", None, [f"output={output}"])
    vision, language = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=259))
    stages = {
        name: replace(stage, steps=4, global_batch=8, micro_batch=2, seed=seed)
        for seed, (name, stage) in enumerate(run.stages.items())
    }
    data = replace(run.data, train=[shard], heldout=[shard])
    model = replace(run.model, vision=vision, language=language, density=0.5)
    return replace(run, model=model, stages=stages, data=data, evidence=False, **changes)


def losses(config: Config) -> list[float]:
    return [line["loss"] for stage in config.stages for line in read_metrics(config.run_dir / stage / "metrics.jsonl")]


def both(world: World, engines: dict[str, EngineConfig], shard: str, folder: str) -> dict[str, Any]:
    """Of each engine: the losses of a run on pictures and of one on features."""
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        plain = recipe(Path(folder, name), shard, engine=engine)
        plain = replace(plain, stages={stage: plain.stages[stage] for stage in ("projector", "language")})
        kept = replace(plain, output=f"{plain.output}, kept", feature_cache=str(Path(folder, "cache")))
        for config in (plain, kept):
            run_pipeline(config, world)
        found[name] = engine.precision, losses(plain), losses(kept)
    return found


@pytest.mark.parametrize("engines", [ENGINES, ZERO_3], ids=["others", "zero3"])
def test_a_run_on_kept_features_has_the_losses_of_one_on_pictures(
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
    model = build.skeleton(config.model)
    freeze(model, config.stages[stage], model.dormant())
    return kept_features(config, model, open_data(config).train, weights, world, stop)


def test_what_was_made_stays_and_only_for_its_own_encoder(shard: str, tmp_path: Path, world: World) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    run_pipeline(config, world)
    first, last = (read_weights(config.run_dir / stage) for stage in ("projector", "joint"))
    assert opened(config, world, "joint", first) is None, "the encoder learns"
    [file] = (tmp_path / "cache").glob("*.features")
    made = opened(config, world, "language", first)
    assert not len(made.missing())
    assert made.get(7) is None
    assert made.get(8).shape == (2, 16, 32)
    stopped = opened(config, world, "language", last, stop=lambda: True)
    assert len(stopped.missing()) == PICTURES, "the joint stage has changed the encoder"
    made.put([0], torch.zeros(1, *made.shape))  # as only one who does not make it again would find it
    assert not opened(config, world, "language", first).get(0).any()
    with file.open("r+b") as values:
        values.truncate(1000)
    assert opened(config, world, "language", first).get(0).any(), "a file that was cut is made again"


def heads(config: Config) -> Config:
    vision = PartConfig(config=tiny.SIGLIP | {"num_attention_heads": 4})
    return replace(config, model=replace(config.model, vision=vision))


def depths(config: Config) -> Config:
    return replace(config, model=replace(config.model, depths="later"))


def precision(config: Config) -> Config:
    return replace(config, engine=EngineConfig("bf16"))


def transform(config: Config) -> Config:
    return replace(config, data=replace(config.data, image="pad"))


def limit(config: Config) -> Config:
    """Above which a picture counts as broken, and stays so where its features are kept."""
    return replace(config, data=replace(config.data, max_pixels=10**6))


@pytest.mark.parametrize("change", [heads, depths, precision, transform, limit])
def test_features_of_the_same_weights_are_made_anew_for_anything_else_that_changes(
    shard: str, tmp_path: Path, world: World, change: Any
) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    weights: Any = {name: p.detach() for name, p in build.assemble(config.model, 0).named_parameters()}
    assert len(opened(config, world, "language", weights).missing()) == 0
    stopped = opened(change(config), world, "language", weights, stop=lambda: True)
    assert len(stopped.missing()) == PICTURES
    assert len(opened(config, world, "language", weights, stop=lambda: True).missing()) == 0


def test_a_set_of_the_same_sizes_with_other_pictures_is_another(tmp_path: Path, world: World) -> None:
    """Every member has its place and size, and the index knows by its digest that the shard is another."""
    lengths = [max(len(tars.picture_bytes(seed=s + i)) for s in (0, 100)) for i in range(8)]
    found = []
    for name, seed in (("one", 0), ("other", 100)):
        pairs = [(f"{i:03d}", tars.pair(i)) for i in range(8)]
        for i, (_, members) in enumerate(pairs):
            members["jpg"] = tars.picture_bytes(seed=seed + i).ljust(lengths[i], b"\0")
        shard = tars.write_tar(tmp_path / name / "pairs.tar", pairs)
        config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
        weights: Any = {name: p.detach() for name, p in build.assemble(config.model, 0).named_parameters()}
        found.append((open_data(config).train.fingerprint, opened(config, world, "language", weights).get(5)))
    assert found[0][0] != found[1][0]
    assert not torch.equal(found[0][1], found[1][1])


def test_a_set_that_differs_in_a_single_picture_is_another(shard: str, tmp_path: Path, world: World) -> None:
    """One that is not among those that are looked at: its size tells it."""
    found = []
    for seed in (1, 77):
        pairs = [(f"{i:03d}", tars.pair(i)) for i in range(PICTURES)]
        pairs[1][1]["jpg"] = tars.picture_bytes(seed=seed)
        config = recipe(tmp_path / "run", tars.write_tar(tmp_path / f"{seed}" / "pairs.tar", pairs))
        config = replace(config, feature_cache=str(tmp_path / "cache"))
        weights: Any = {name: p.detach() for name, p in build.assemble(config.model, 0).named_parameters()}
        found.append(opened(config, world, "language", weights).get(1))
    assert not torch.equal(*found)


def test_weights_that_no_depth_reads_do_not_count(shard: str, tmp_path: Path, world: World) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    weights: Any = {name: p.detach() for name, p in build.assemble(config.model, 0).named_parameters()}
    opened(config, world, "language", weights)
    for name in ("vision.encoder.layers.3.mlp.fc1.weight", "vision.post_layernorm.weight", "projector.0.up.weight"):
        weights[name] = weights[name] + 1
    assert not len(opened(config, world, "language", weights, stop=lambda: True).missing())
    weights["vision.encoder.layers.2.mlp.fc1.weight"] = weights["vision.encoder.layers.2.mlp.fc1.weight"] + 1
    assert len(opened(config, world, "language", weights, stop=lambda: True).missing()) == PICTURES


def test_features_whose_file_was_deleted_are_made_again(shard: str, tmp_path: Path, world: World) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "cache"))
    weights: Any = {name: p.detach() for name, p in build.assemble(config.model, 0).named_parameters()}
    before = opened(config, world, "language", weights).get(8)
    [file] = (tmp_path / "cache").glob("*.features")
    file.unlink()
    assert torch.equal(opened(config, world, "language", weights).get(8), before)


def test_a_disk_without_room_is_met_before_the_first_picture(tmp_path: Path, world: World) -> None:
    some, shape = np.arange(10**6), (6, 576, 1024)
    with pytest.raises(ValueError, match=r" GB of features are still to be made, .* GB are free"):
        open_kept(world, tmp_path / "large", some, len(some), shape, torch.bfloat16)
    _, missing = open_kept(world, tmp_path / "large", some[:3], len(some), shape, torch.bfloat16)
    assert missing.tolist() == [0, 1, 2]


def test_features_beyond_the_disk_are_refused_before_the_run(shard: str, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", shard, feature_cache=str(tmp_path / "not" / "yet"))
    loader = copy(open_data(config).train)
    model = build.skeleton(config.model)
    freeze(model, config.stages["projector"])
    check_disk(config, model, loader)
    loader.index = replace(loader.index, arrays={"caption_bytes": np.broadcast_to(np.int8(0), 10**12)})
    with pytest.raises(ValueError, match=r"1,000,000,000,000 pictures are 4096000.0 GB, .* name another disk"):
        check_disk(config, model, loader)
    check_disk(replace(config, feature_cache=""), model, loader)
    freeze(model, config.stages["joint"])
    check_disk(config, model, loader)  # whose encoder trains: nothing is kept
