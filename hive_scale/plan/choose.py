"""Options of FSDP2 that are left to the plan: over which ranks a model is sharded, and what stays gathered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, groupby
from typing import NamedTuple

from hive_scale import device
from hive_scale.config import Config, EngineConfig
from hive_scale.distributed import World
from hive_scale.engine.compilation import is_compiled
from hive_scale.node import node_id
from hive_scale.phase_timer import tick
from hive_scale.plan.devices import usable
from hive_scale.plan.memory import StageProfile, examine, measure

logger = logging.getLogger(__name__)
_calls = count()  # each exchange between ranks needs a name of its own


class Ranks(NamedTuple):
    """The ranks of a job, as far as the choice depends on them."""

    world: int
    per_node: int  # ranks of each node; all, if nodes have different numbers, or their ranks do not follow each other
    capacity: float  # bytes of each device that are available to tensors


class Chosen(NamedTuple):
    """A stage's engine without open options."""

    engine: EngineConfig
    facts: StageProfile | None = None  # what it was chosen by, on rank 0; None: nothing was open


def choose(
    engine: EngineConfig, facts: StageProfile, ranks: Ranks, micro_batch: int, accumulation: int
) -> EngineConfig:
    """`engine` with its open options decided: the one that sends fewest bytes, if its planned memory fits.

    First the sharding, which saves bytes on the slow network between nodes, then what stays gathered.
    """

    def fits(candidate: EngineConfig) -> bool:
        return measure(facts, candidate, {}, ranks.world, micro_batch, accumulation).peak <= ranks.capacity

    if _is_shard_open(engine, ranks):
        within = replace(engine, shard_size=ranks.per_node)
        engine = within if fits(within) else replace(engine, shard_size=ranks.world)
    if _is_reshard_open(engine, ranks, accumulation):
        kept = replace(engine, reshard_after_backward=False)
        engine = kept if fits(kept) else replace(engine, reshard_after_backward=True)
    return engine


def _is_shard_open(engine: EngineConfig, ranks: Ranks) -> bool:
    # offloaded states fill the memory of hosts, of which nothing is known
    return not (engine.ds_config or engine.shard_size or engine.cpu_offload) and ranks.per_node < ranks.world


def _is_reshard_open(engine: EngineConfig, ranks: Ranks, accumulation: int) -> bool:
    is_sharded = (engine.shard_size or ranks.world) > 1 and not engine.ds_config
    return is_sharded and accumulation > 1 and engine.reshard_after_backward == "auto"


def choose_all(config: Config, names: Sequence[str], world: World) -> dict[str, Chosen]:
    """The engine of each stage in `names`, on the devices of `world`. A collective; rank 0 makes the plans.

    Without knowledge of the devices' memory, as on a CPU, options stay open: engines then take what needs the least.
    """
    undecided = {name: Chosen(config.engine) for name in names}
    if world.size == 1 or config.engine.ds_config:
        return undecided
    own = device.memory_of(world.device)[1] if device.pins_memory(world.device) else 0
    found = world.exchange(f"choice/{next(_calls)}", [node_id(), own])
    if not all(memory for _, memory in found):
        return undecided
    ranks = Ranks(world.size, ranks_per_node([node for node, _ in found]), usable(min(memory for _, memory in found)))
    compiled = is_compiled(config.engine, world.device.type)
    made = {name: _of_stage(config, name, ranks, compiled) for name in names} if world.is_main else undecided
    engines = world.of_main({name: one.engine for name, one in made.items()})
    return {name: Chosen(engines[name], made[name].facts) for name in names}


def _of_stage(config: Config, name: str, ranks: Ranks, compiled: bool) -> Chosen:
    stage, engine = config.stages[name], config.engine
    accumulation = stage.accumulation(ranks.world)
    if not (_is_shard_open(engine, ranks) or _is_reshard_open(engine, ranks, accumulation)):
        return Chosen(engine)
    tick()
    try:
        facts = examine(config, stage, config.data_of(name).max_tokens, compiled=compiled)
        micro_batch = stage.global_batch // ranks.world // accumulation
        return Chosen(choose(engine, facts, ranks, micro_batch, accumulation), facts)
    except Exception as error:  # a registered model may raise anything here, and training needs no plan
        logger.warning("stage %s is sharded over all ranks, since no plan can be made of it: %r", name, error)
        return Chosen(engine)


def ranks_per_node(nodes: Sequence[str]) -> int:
    """Number of ranks of each node, given each rank's; all ranks if that differs, or they do not follow each other."""
    runs = [len(list(run)) for _, run in groupby(nodes)]
    return runs[0] if len(runs) == len(set(nodes)) and len(set(runs)) == 1 else len(nodes)


def told(asked: EngineConfig, chosen: EngineConfig, world: int) -> str:
    """What was chosen where `asked` left it open, in words; "" if nothing was."""
    parts = []
    if not asked.shard_size and chosen.shard_size == world:
        parts.append(f"sharded over all {world} processes, since a copy in each node is not planned to fit")
    elif not asked.shard_size and chosen.shard_size:
        of_node = f"over the {chosen.shard_size} processes of a node" if chosen.shard_size > 1 else "over none"
        parts.append(f"sharded {of_node}, {world // chosen.shard_size} replicas")
    if asked.reshard_after_backward == "auto" and chosen.reshard_after_backward is False:
        parts.append("weights stay gathered between micro-batches")
    return "; ".join(parts)
