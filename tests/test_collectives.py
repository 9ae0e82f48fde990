"""The number of times that ranks wait for each other in a step is counted, since one machine would not show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from test_parity import Cell, engine_config, model_of, my_batches, small_jsons, stage_of, weights_of
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from hive_scale.config import EngineConfig
from hive_scale.distributed import World
from hive_scale.engine import open_engine
from hive_scale.engine.activation_checkpointing import blocks_of
from hive_scale.model.build import meta_model
from hive_scale.param_groups import apply_trainable_groups


@dataclass(frozen=True)
class Counts:
    step: dict[str, int]  # collectives of one step, by kind: those that torch's dispatcher sees, and so not DDP's own
    over_host: int  # of which these add up Python's numbers
    look: dict[str, int]  # of a look at three held-out batches
    units: int  # that are sharded
    trained: int  # of these, those with something to learn


def counted(do: Callable[[], Any]) -> dict[str, int]:
    with CommDebugMode() as mode:
        do()
    found: Counter[str] = Counter()
    for operator, number in mode.get_comm_counts().items():
        name = str(operator).replace("_", "")
        found[next(kind for kind in ("reducescatter", "allgather", "allreduce", "broadcast") if kind in name)] += number
    return dict(found)


def collectives(world: World, cells: list[tuple[str, dict[str, Any]]], folder: str) -> list[Counts]:
    """Of each engine, with what it is told beside its name, in its second step: all is there then."""
    results, sums, add = list[Counts](), list[int](), World.sum

    def noted(self: World, *values: float) -> list[float]:
        sums.append(len(values))
        return add(self, *values)

    World.sum = noted  # type: ignore[method-assign]
    for engine_name, changes in cells:
        cell = Cell(engine_name, precision=changes.pop("precision", "fp32"))
        model, stage = meta_model(model_of(cell.fusion)), stage_of(3, cell.fusion, world.size)
        groups = apply_trainable_groups(model, stage, model.unused_parameters())
        config = replace(engine_config(cell, folder), **changes)
        engine = open_engine(model, groups, stage, config, world, weights_of(cell.fusion))
        batches = my_batches(cell, 0, world)
        assert len(batches) > 1
        engine.step(batches, 1.0)
        sums.clear()
        step = counted(lambda: engine.step(batches, 1.0, votes=lambda: (1.0, 2.0)))  # noqa: B023
        over_host = len(sums)
        look = counted(lambda: engine.evaluate(iter([*batches, *batches])))  # noqa: B023
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        inner = [set(unit.parameters()) for unit in units[1:]]
        own = [set(model.parameters()).difference(*inner), *inner]
        trained = sum(any(parameter.requires_grad for parameter in parameters) for parameters in own)
        results.append(Counts(step, over_host, look, len(units), trained))
    return results


def test_fsdp_waits_as_often_as_it_must(tmp_path: Path) -> None:
    cells: list[tuple[str, dict[str, Any]]] = [
        ("fsdp", {}),
        ("fsdp", {"precision": "bf16"}),
        ("fsdp", {"reshard_after_backward": False}),
        ("fsdp", {"sync_each_micro_batch": True}),
    ]
    for plain, half, kept, synced in ranks.run(collectives, 2, cells, str(tmp_path)):
        for one in (plain, half, kept, synced):
            assert one.step["allreduce"] == 2, "the gradient's norm, and losses with votes; none of units"
            assert one.over_host == 1
            assert one.look.get("allreduce") == 1, "held-out losses are added up once"
        assert plain.step["reducescatter"] == half.step["reducescatter"] == kept.step["reducescatter"] == plain.trained
        assert synced.step["reducescatter"] == 2 * plain.trained, "after each of two micro-batches"
        assert synced.step["allgather"] == plain.step["allgather"]
        saved = plain.step["allgather"] - kept.step["allgather"]
        assert saved == plain.trained, "what the second micro-batch's forward reads is there: all that learns"
        assert kept.look == plain.look, "and has gone after the step"


class Gathers(TorchDispatchMode):
    """Counts the gathers of weights that were begun."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "c10d::_allgather_base_"
        return func(*args, **(kwargs or {}))


def begun(world: World, fusion: str, is_cached: bool) -> dict[str, list[int]]:
    """How many gathers were begun when the work of each sharded block began in a micro-batch, by pass, in its order.

    With `is_cached`, the images are features of a frozen encoder, whose blocks are sharded, too, and never reached.
    """
    cell = Cell("fsdp", 1 if is_cached else 3, fusion)
    model, stage = meta_model(model_of(fusion)), stage_of(cell.stage, fusion, world.size)
    groups = apply_trainable_groups(model, stage, model.unused_parameters())
    config = EngineConfig(frozen="shard", reshard_after_backward=True)
    engine = open_engine(model, groups, stage, config, world, weights_of(fusion))
    batches = my_batches(cell, 0, world)
    if is_cached:
        features = torch.zeros(len(batches[0]), *model.features_shape)
        batches = [replace(batch, pixels=features) for batch in batches]
    engine.step(batches, 1.0)
    found: dict[str, list[int]] = {"forward": [], "backward": [], "all": []}
    with Gathers() as mode:
        for block in blocks_of(model):
            work = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
            work.register_forward_pre_hook(lambda *_: found["forward"].append(mode.count))
            work.register_full_backward_pre_hook(lambda *_: found["backward"].append(mode.count))
        engine.step(batches[-1:], 1.0)
        found["all"].append(mode.count)
    return found


@pytest.mark.parametrize(
    "fusion", ["cross_attention", *(pytest.param(one, marks=pytest.mark.slow) for one in ("joint_attention", "concat"))]
)
def test_the_next_block_is_gathered_while_this_one_works(fusion: str) -> None:
    for found in ranks.run(begun, 2, fusion, False):
        units = len(found["forward"])
        assert units >= 6
        # the root's comes first, and stays for the backward; then each block's own, and the next one's
        assert found["forward"] == [1 + min(unit + 2, units) for unit in range(units)]
        assert found["backward"] == [1 + units + min(unit + 2, units) for unit in range(units)]
        assert found["all"] == [1 + 2 * units], "and none twice"


def test_blocks_that_are_never_reached_are_not_gathered() -> None:
    for found in ranks.run(begun, 2, "cross_attention", True):
        units = len(found["forward"])
        assert found["forward"][-1] == 1 + units


def test_copies_of_shards_are_reduced_over_once_a_step(tmp_path: Path) -> None:
    cells: list[tuple[str, dict[str, Any]]] = [("hsdp", {}), ("hsdp", {"sync_each_micro_batch": True})]
    for plain, synced in ranks.run(collectives, 4, cells, str(tmp_path)):
        assert plain.step["allreduce"] == synced.step["allreduce"] == plain.trained + 2
        assert plain.step["reducescatter"] == plain.trained
        assert synced.step["reducescatter"] == 3 * plain.trained


def test_no_engine_goes_over_the_host_twice(tmp_path: Path) -> None:
    small_jsons(tmp_path)
    cells: list[tuple[str, dict[str, Any]]] = [("ddp", {}), ("zero1", {}), ("zero2", {}), ("zero2_offload", {})]
    cells.append(("ddp", {"precision": "bf16"}))
    for found in ranks.run(collectives, 2, cells, str(tmp_path)):
        assert [one.over_host for one in found] == [1] * len(cells)
        assert [one.look.get("allreduce") for one in found] == [1] * len(cells)
        assert found[-1].step == {"allreduce": 2}, "all gradients at once, and losses with votes"
