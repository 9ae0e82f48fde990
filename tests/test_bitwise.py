"""A run in two parts equals the run in one, bit for bit, under every engine: weights, losses, samples, random state.

And the memory that one stage held is free when the next begins.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch

from hive_scale import presets, train
from hive_scale.callbacks import Callback
from hive_scale.checkpoint.stage_files import WEIGHTS
from hive_scale.checkpoint.weights import read_weights
from hive_scale.config import Config, EngineConfig, PartConfig
from hive_scale.distributed import World
from hive_scale.engine import StepOutput
from hive_scale.exit_codes import Stopped
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.strict_json import dumps, loads
from hive_scale.train import StageRun

JSONS = Path(__file__).resolve().parents[1] / "ds_configs"
ENGINES = {
    "ddp": EngineConfig(shard_size=1),
    "fsdp": EngineConfig(),
    "fsdp, offload": EngineConfig(cpu_offload=True),
    "ddp, bf16": EngineConfig("bf16", shard_size=1),
    "fsdp, bf16": EngineConfig("bf16"),
    **{name: EngineConfig(ds_config=str(JSONS / f"{name}.json")) for name in ("zero1", "zero2", "zero2_offload")},
    "zero2, bf16": EngineConfig("bf16", ds_config=str(JSONS / "zero2.json")),
}
# those that share no code with another; the rest is run apart
FEW = {name: ENGINES[name] for name in ("ddp", "fsdp", "ddp, bf16", "zero2")}
REST = {name: engine for name, engine in ENGINES.items() if name not in FEW}
ZERO_3, OFFLOADED = ({name: EngineConfig(ds_config=str(JSONS / f"{name}.json"))} for name in ("zero3", "zero3_offload"))
STEPS = 6
few_or_all = pytest.mark.parametrize(
    "engines",
    [FEW, *(pytest.param(engines, marks=pytest.mark.slow) for engines in (ZERO_3, REST, OFFLOADED))],
    ids=["few", "zero3", "rest", "zero3_offload"],
)
either = pytest.mark.parametrize(
    "engines",
    [FEW, ZERO_3, *(pytest.param(engines, marks=pytest.mark.slow) for engines in (REST, OFFLOADED))],
    ids=["few", "zero3", "rest", "zero3_offload"],
)


def small(output: Path, engine: EngineConfig) -> Config:
    """A stage that trains everything, with dropout, so that random numbers matter."""
    run = presets.load("debug", None, [f"output={output}", "data.heldout=[sample:heldout]"])
    language = PartConfig(config=tiny.language(vocab_size=259, attention_dropout=0.3))
    model = replace(run.model, vision=PartConfig(config=tiny.SIGLIP), language=language)
    joint = replace(run.stages["joint"], max_steps=STEPS, global_batch=8, micro_batch=2)
    return replace(run, model=model, stages={"joint": joint}, engine=engine, save_interval=100)


class NotEvaluated(Callback):
    """Leaves out the held-out samples, which take longer than all else here."""

    def on_stage(self, stage: StageRun) -> None:
        stage.heldout = ()


def both(world: World, engines: dict[str, EngineConfig], folder: str) -> dict[str, list[Any]]:
    """Of each engine: what is left of the run in one part, and in two."""
    seen: list[Any] = []
    half = False

    class WatchAndStop(NotEvaluated):
        def on_step(self, stage: StageRun, _: StepOutput) -> None:
            seen.append((stage.at.step, world.timer.keys, torch.get_rng_state().numpy().tobytes()))
            if half and stage.at.step == STEPS // 2 - 1:
                stage.preemption.request()

    found: dict[str, list[Any]] = {}
    for name, engine in engines.items():
        for parts in (1, 2):
            seen.clear()
            config, half = small(Path(folder, f"{name}_{parts}"), engine), parts == 2
            if half:
                try:
                    run_pipeline(config, world, callbacks=[WatchAndStop()])
                    raise AssertionError("not stopped")
                except Stopped:
                    half = False
                torch.manual_seed(parts)  # what was drawn before must not matter
            run_pipeline(config, world, callbacks=[WatchAndStop()])
            weights = read_weights(config.run_dir / "joint" / WEIGHTS)
            losses = [line["loss"] for line in read_metrics(config.run_dir / "joint" / "metrics.jsonl")]
            found.setdefault(name, []).append((weights.identity, losses, list(seen)))
    return found


@either
def test_a_run_in_two_parts_is_the_run_in_one(engines: dict[str, EngineConfig], tmp_path: Path) -> None:
    for found in ranks.run(both, 2, engines, str(tmp_path)):
        for name, (whole, parts) in found.items():
            assert len(whole[1]) == len(whole[2]) == STEPS
            assert whole == parts, name


@pytest.mark.slow  # three stages, and two runs
def test_so_is_one_with_zeros_second_copy_of_the_weights(tmp_path: Path) -> None:
    path, settings = tmp_path / "second.json", loads((JSONS / "zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    path.write_text(dumps(settings))
    engines = {"second": EngineConfig(ds_config=str(path))}
    for found in ranks.run(both, 2, engines, str(tmp_path)):
        whole, parts = found["second"]
        assert whole == parts
    for held in ranks.run(held_at_openings, 2, engines, str(tmp_path / "stages")):
        first, *others = held["second"]
        assert all(one - first < 10_000 for one in others), (first, others)


def held_at_openings(world: World, engines: dict[str, EngineConfig], folder: str) -> dict[str, list[int]]:
    """Of each engine: bytes of tensors alive when each of three stages opens its own."""
    held: dict[str, list[int]] = {}
    opening = train.open_engine
    found: list[int] = []

    def watched(*arguments: Any) -> Any:
        tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta]
        found.append(sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values()))
        return opening(*arguments)

    train.open_engine = watched
    for name, engine in engines.items():
        held[name] = found = []
        run = small(Path(folder, name), engine)
        stages = presets.load("debug", None, []).stages
        stages = {stage: replace(one, max_steps=2, global_batch=8, micro_batch=2) for stage, one in stages.items()}
        run_pipeline(replace(run, stages=stages), world, callbacks=[NotEvaluated()])
    return held


@few_or_all
def test_a_stage_leaves_nothing_behind(engines: dict[str, EngineConfig], tmp_path: Path) -> None:
    for held in ranks.run(held_at_openings, 2, engines, str(tmp_path)):
        for name, (first, *others) in held.items():
            assert all(one - first < 10_000 for one in others), (name, first, others)  # a stage's states: some 1 MB
