"""Options that are left to the plan: the fastest that fits is taken, by every rank alike, and trains the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny
import torch.distributed as dist
from test_parity import (
    LOSS,
    Cell,
    engine_config,
    factor,
    model_of,
    my_batches,
    stage_of,
    truth,
    weights_of,
)
from test_plan import run_config
from test_wire import Wire
from torch.distributed.tensor import DTensor

from hive_scale import presets
from hive_scale.checkpoint.format import StepCheckpoint, steps_in
from hive_scale.config import CheckpointingConfig, Config, EngineConfig, PartConfig
from hive_scale.distributed import World
from hive_scale.engine import open_engine
from hive_scale.model.build import for_stage
from hive_scale.pipeline import run_pipeline
from hive_scale.plan import choose as choosing
from hive_scale.plan.choose import choose_all, ranks_per_node, told
from hive_scale.plan.devices import CONTEXT, FRAGMENTATION, GPUS
from hive_scale.plan.memory import StageProfile, examine, measure
from hive_scale.plan.run import Machine, StagePlan, plan_stage
from hive_scale.plan.time import volume

PLENTY = 80e9
# few activations, and sharded gradients: what is gathered makes the peak
CELL = Cell("fsdp, synced", 3, checkpointing="full")


def device_of(room: float) -> int:
    """Memory of a device of which `room` bytes are available to tensors."""
    return round(room / (1 - FRAGMENTATION) + CONTEXT)


def pretend(world: World, memory: float, nodes: str) -> None:
    """Let the plan take this CPU for a device of `memory` bytes, on the node that `nodes` names for its rank."""
    known = SimpleNamespace(pins_memory=lambda _: True, memory_of=lambda _: (round(memory), round(memory)))
    choosing.device = known  # type: ignore[attr-defined]
    choosing.node_id = lambda: nodes[world.rank]  # type: ignore[assignment]


def config_of(**changes: Any) -> Config:
    """Stage `joint` with few activations, and sharded gradients, so that what is gathered makes the peak."""
    full = CheckpointingConfig("full", "full", "full")
    config = run_config(precision="bf16", checkpointing=full, sync_each_micro_batch=True, **changes)
    return replace(config, stages={"joint": replace(config.stages["joint"], global_batch=64, micro_batch=1)})


@cache
def facts_of_joint() -> StageProfile:
    config = config_of()
    return examine(config, config.stages["joint"], config.data.max_tokens)


def planned(gpu_memory: float, world: int = 8, **changes: Any) -> StagePlan:
    """On nodes of four."""
    gpu = replace(GPUS["a100-40"], per_node=4, memory=round(gpu_memory))
    return plan_stage(config_of(**changes), "joint", facts_of_joint(), {}, Machine(gpu, world), 1000)


@pytest.mark.parametrize(
    ("open_", "world", "best", "least"),
    [
        ({"reshard_after_backward": True}, 8, {"shard_size": 4}, {"shard_size": 8}),
        ({"shard_size": 8}, 8, {"reshard_after_backward": False}, {"reshard_after_backward": True}),
        ({"shard_size": 4}, 8, {"reshard_after_backward": False}, {"reshard_after_backward": True}),
        ({}, 4, {"reshard_after_backward": False}, {"reshard_after_backward": True}),
    ],
)
def test_the_best_that_fits_is_chosen(
    open_: dict[str, Any], world: int, best: dict[str, Any], least: dict[str, Any]
) -> None:
    wanted, small = (planned(PLENTY, world, **(open_ | one)) for one in (best, least))
    assert wanted.memory.peak > small.memory.peak
    assert wanted.time.volume.sent < small.time.volume.sent or wanted.time.communicating < small.time.communicating
    for room, expected in ((wanted.memory.peak + 1e3, wanted), (wanted.memory.peak - 1e3, small)):
        found = planned(device_of(room), world, **open_)
        assert (found.memory, found.time) == (expected.memory, expected.time)


def test_an_option_that_is_set_stays_and_one_without_effect_is_left() -> None:
    assert planned(PLENTY, shard_size=8).engine.shard_size == 8
    assert planned(PLENTY, reshard_after_backward=True).engine.reshard_after_backward is True
    alone = planned(PLENTY, 1).engine
    assert (alone.shard_size, alone.reshard_after_backward) == (0, "auto"), "one process"
    assert planned(PLENTY, 4).engine.shard_size == 0, "one node"


@pytest.mark.parametrize(
    ("nodes", "expected"), [("aabb", 2), ("aaaa", 4), ("abab", 4), ("aaab", 4), ("abba", 4), ("abcd", 1)]
)
def test_nodes_are_told_apart_where_their_ranks_follow_each_other(nodes: str, expected: int) -> None:
    assert ranks_per_node(nodes) == expected


def trained(world: World, cases: list[tuple[float, str]]) -> list[tuple[EngineConfig, list[int], float, list[float]]]:
    """Of each (memory, nodes): the choice, who shares a copy, bytes sent in a step, and losses."""
    found = []
    for memory, nodes in cases:
        pretend(world, memory, nodes)
        cell, stage = CELL, stage_of(CELL.stage, CELL.fusion, world.size)
        asked = engine_config(cell, "")
        data = replace(Config().data, max_tokens=12)
        config = Config(model=model_of(cell.fusion), data=data, stages={"stage": stage}, engine=asked)
        engine = choose_all(config, ["stage"], world)["stage"].engine
        model, groups = for_stage(model_of(cell.fusion), stage)
        opened: Any = open_engine(model, groups, stage, engine, world, weights_of(cell.fusion))
        losses = [opened.step(my_batches(cell, step, world), factor(step)).loss for step in range(2)]
        with Wire(world.size // (engine.shard_size or world.size)) as wire:
            opened.step(my_batches(cell, 0, world), 1.0)
        parameter = next(one for one in opened.model.parameters() if isinstance(one, DTensor))
        mesh = parameter.device_mesh
        group = mesh["shard"].get_group() if mesh.ndim > 1 else mesh.get_group()
        found.append((engine, dist.get_process_group_ranks(group), wire.sent, losses))
    return found


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "whole"])
def test_ranks_on_two_nodes_shard_inside_a_node_where_that_fits(whole: bool) -> None:
    stage, asked = stage_of(CELL.stage, CELL.fusion, 4), engine_config(CELL, "")
    config = Config(model=model_of(CELL.fusion), stages={"stage": stage}, engine=asked)
    facts, accumulation = examine(config, stage, 12), stage.accumulation(4)

    def room(shard: int, reshard: bool) -> int:
        engine = replace(asked, shard_size=shard, reshard_after_backward=reshard)
        return device_of(measure(facts, engine, {}, 4, 12 // 4 // accumulation, accumulation).peak + 1e3)

    inside, kept = "sharded over the 2 processes of a node, 2 replicas", "weights stay gathered between micro-batches"
    over_all = "sharded over all 4 processes, since a copy in each node is not planned to fit"
    wanted: list[tuple[float, str, str]] = [
        (PLENTY, "aabb", f"{inside}; {kept}"),
        (room(4, False), "aabb", f"{over_all}; {kept}"),
        (room(2, True), "aabb", inside),
        (room(4, True), "aabb", over_all),
        (PLENTY, "abab", kept),
        (0, "aabb", ""),
    ][: None if whole else 2]
    results = ranks.run(trained, 4, [(memory, nodes) for memory, nodes, _ in wanted])
    assert [told(asked, engine, 4) for engine, *_ in results[0]] == [words for *_, words in wanted]
    expected = truth(*CELL.truth).losses[:2]
    for rank, result in enumerate(results):
        for (*_, words), (engine, group, sent, losses) in zip(wanted, result, strict=True):
            node = [0, 1] if rank < 2 else [2, 3]
            assert group == (node if inside in words else [0, 1, 2, 3])
            assert sent == pytest.approx(volume(facts, engine, {}, 4, accumulation).sent, rel=1e-9), engine
            assert losses == pytest.approx(expected, rel=LOSS), engine


def run(world: World, folder: Path, memory: float) -> None:
    pretend(world, memory, "aa")
    words = (f"output={folder}", "log.wandb=off", "stages.projector.max_steps=2", "stages.projector.micro_batch=2")
    config = presets.load("debug", None, words)
    parts = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=259))
    config = replace(config, model=replace(config.model, vision=parts[0], language=parts[1]))
    run_pipeline(config, world, until="projector")


@pytest.mark.parametrize(
    ("memory", "reshards"), [(PLENTY, False), pytest.param(CONTEXT + 1e4, True, marks=pytest.mark.slow)]
)
def test_a_run_trains_with_what_was_chosen_and_its_checkpoint_says_so(
    tmp_path: Path, memory: float, reshards: Any
) -> None:
    ranks.run(run, 2, tmp_path / "run", memory)
    state = StepCheckpoint(steps_in(tmp_path / "run" / "projector")[-1]).state
    assert state["config"]["engine"]["reshard_after_backward"] == reshards
