"""A run begins with what it was told to begin with: any part from any source, and every difference is named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hive_scale import config as configs
from hive_scale.checkpoint.handoff import find_weights, write_weights
from hive_scale.config import Config, ModelConfig, PartConfig
from hive_scale.initial import assemble
from hive_scale.model.build import skeleton
from hive_scale.model.hive import Hive

PARTS = {"vision": ("vision.",), "language": ("language.",), "connector": ("projector.", "fusion.")}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Hive]:
    """A run whose first stage is done, its directory and its model."""
    model = assemble(tiny.model_config(), seed=9)
    run, stages = tmp_path_factory.mktemp("run"), {name: tiny_stage() for name in ("first", "second")}
    configs.save(Config(model=tiny.model_config(), stages=stages), run / "config.yaml")
    weights = dict(model.named_parameters())
    write_weights(run / "initial" / "weights.safetensors", {name: torch.zeros_like(w) for name, w in weights.items()})
    write_weights(run / "first" / "weights.safetensors", weights)
    write_weights(run / "sharded" / "weights.safetensors", weights, max_shard_bytes=50_000)
    tower = {name.removeprefix("vision."): w for name, w in weights.items() if name.startswith("vision.")}
    write_weights(run / "alone" / "tower.safetensors", {f"vision_model.{name}": w for name, w in tower.items()})
    return run, model


def tiny_stage() -> configs.StageConfig:
    return configs.StageConfig({"all": configs.GroupConfig(["*"], 1e-3)})


def same(ours: Hive, theirs: Hive, part: str) -> list[bool]:
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    return [torch.equal(a, b) for (name, a), (_, b) in pairs if name.startswith(PARTS[part]) and b.any()]


def begun(path: Path, **changes: Any) -> ModelConfig:
    """Every part from `path`, the shapes spelled out."""
    base = tiny.model_config(**changes)
    vision, language = (replace(part, path=str(path)) for part in (base.vision, base.language))
    return replace(base, vision=vision, language=language, connector=str(path))


def test_every_part_from_a_run_its_stage_and_safetensors(donor: tuple[Path, Hive]) -> None:
    run, theirs = donor
    index = find_weights(run / "sharded" / "weights.safetensors")
    assert index is not None
    for path in (run, run / "first", run / "first" / "weights.safetensors", run / "sharded", index):
        ours = assemble(begun(path), seed=0)
        assert all(all(same(ours, theirs, part)) for part in PARTS), path


def test_one_part_alone_and_the_shape_from_the_run(donor: tuple[Path, Hive]) -> None:
    run, theirs = donor
    for part in PARTS:
        base = tiny.model_config()
        change: Any = str(run) if part == "connector" else PartConfig(str(run))  # no config: it is the run's
        ours = assemble(replace(base, **{part: change}), seed=0)
        assert {name: all(same(ours, theirs, name)) for name in PARTS if name != "connector"} == {
            name: name == part for name in PARTS if name != "connector"
        }
        if part == "connector":
            assert all(same(ours, theirs, part))


def test_an_encoder_alone_under_its_published_names(donor: tuple[Path, Hive]) -> None:
    run, theirs = donor
    base = tiny.model_config()
    ours = assemble(replace(base, vision=replace(base.vision, path=str(run / "alone" / "tower.safetensors"))), seed=0)
    assert all(same(ours, theirs, "vision"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision": tiny.SIGLIP | {"num_hidden_layers": 6, "intermediate_size": 48}},
            r"missing: encoder.layers.4.layer_norm1.bias, .* and 27 more; of another shape: "
            r"encoder.layers.0.mlp.fc1.bias \(64,\) instead of \(48,\), .* and ",
        ),
        ({"language": tiny.language(num_hidden_layers=5)}, r"missing: model.layers.4.input_layernorm.weight, .* and 4"),
        ({"connector": {"density": 0.75}}, r"missing: fusion.layers.2.gate, .* and 8 more"),
    ],
)
def test_what_does_not_fit_is_named(donor: tuple[Path, Hive], change: dict[str, Any], message: str) -> None:
    ((part, fields),) = change.items()
    base = tiny.model_config(**(fields if part == "connector" else {}))
    value: Any = str(donor[0]) if part == "connector" else PartConfig(str(donor[0]), fields)
    with pytest.raises(ValueError, match=message):
        assemble(replace(base, **{part: value}), seed=0)


def test_what_has_no_place_is_left_out_and_said(donor: tuple[Path, Hive], caplog: pytest.LogCaptureFixture) -> None:
    shallower = PartConfig(str(donor[0]), tiny.SIGLIP | {"num_hidden_layers": 3})
    with caplog.at_level(logging.WARNING):
        assemble(replace(tiny.model_config(), vision=shallower, density=0.67), seed=0)
    assert "left out: unexpected: encoder.layers.3." in caplog.text


def test_a_path_without_weights_or_without_shapes_says_so() -> None:
    base, path = tiny.model_config(), "/nowhere/tower.safetensors"
    with pytest.raises(ValueError, match=r"model.vision: /nowhere.* there are no weights"):
        assemble(replace(base, vision=replace(base.vision, path=path)), seed=0)
    with pytest.raises(ValueError, match=r"holds weights alone: give model.vision.config, too"):
        skeleton(replace(base, vision=PartConfig(path)))


def test_an_unfinished_run_has_nothing_to_begin_with(tmp_path: Path) -> None:
    configs.save(Config(model=tiny.model_config(), stages={"first": tiny_stage()}), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"every stage of .* is still to be done"):
        assemble(begun(tmp_path), seed=0)
