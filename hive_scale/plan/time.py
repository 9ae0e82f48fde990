"""Time of an optimizer step: a roofline of the traced operators, overlapped with alpha-beta communication.

An estimate, not a measurement. It assumes matrix products at 60 % of peak, everything else at 80 % of memory
bandwidth, and 50 microseconds of host time per operator (with FSDP2, 53 to 73 were measured next to an H100, which
waits for its host if micro-batches are small). Collectives, and reads of stored features, are hidden behind
computation as far as it lasts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Any

from hive_scale.config import EngineConfig
from hive_scale.engine.masters import aligned
from hive_scale.plan.devices import Gpu
from hive_scale.plan.memory import StageProfile, offloaded
from hive_scale.plan.zero_memory import Zero3, second_copy
from hive_scale.precision import DTYPES

PRODUCTS, MEMORY, LAUNCH, LATENCY = 0.6, 0.8, 5e-5, 2e-5
DISK = 1e9  # bytes/s of a shared file system, per node


@dataclass(frozen=True)
class Volume:
    """Bytes that one process sends per step, and the number of collectives."""

    sent: float  # in all
    collectives: int
    copies: float = 0.0  # of them, those that leave the group of ranks that share a copy (HSDP, ZeRO-3's second copy)

    def seconds(self, shard: int, gpu: Gpu, world: int) -> float:
        """Seconds on the wire, alpha-beta: copies, and shards that span nodes, use the network, others the link.

        `shard` is the number of ranks that share one copy. On one node there is no network.
        """
        if world == 1:
            return 0.0
        between = gpu.link if world <= gpu.per_node else gpu.network
        within = gpu.link if shard <= gpu.per_node else gpu.network
        sharing = (self.sent - self.copies) / (within if shard > 1 else between)
        return sharing + self.copies / between + self.collectives * LATENCY * log2(max(2, world))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    computing: float
    communicating: float
    updating: float
    reading: float  # stored features, from the node's disk; images are small enough to ignore
    volume: Volume

    @property
    def total(self) -> float:
        """Seconds of the step; overlapping parts count once."""
        return max(max(self.computing, self.communicating) + self.updating, self.reading)


def step_time(
    facts: StageProfile,
    engine: EngineConfig,
    zero: Mapping[str, Any],
    gpu: Gpu,
    world: int,
    micro_batch: int,
    accumulation: int,
) -> StepTime:
    """Return the time of a step of `accumulation` micro-batches on each of `world` GPUs."""
    work = facts.trace
    peak = gpu.peak(engine.precision) * PRODUCTS
    products = micro_batch * sum(work.flops.values()) / peak
    other = micro_batch * work.traffic / (gpu.bandwidth * MEMORY)
    computing = accumulation * max(products + other, work.kernels * LAUNCH)
    sent = volume(facts, engine, zero, world, accumulation)
    shard = world if zero else engine.shard_size or world
    communicating = sent.seconds(second_copy(zero, world) if zero else shard, gpu, world)
    trained = facts.numel(True) / shard
    traffic = 4 + 8 * (1 + facts.states)  # bytes per trained element: gradient in, master and states in and out
    updating = trained * traffic / (gpu.bandwidth * MEMORY)
    updating += facts.update_flops / shard / (gpu.peak("bf16") * PRODUCTS)
    if offloads(engine, zero):
        updating = trained * (8 / gpu.host + traffic / 50e9)  # gradients out, parameters in; host memory at 50 GB/s
    node = min(world, gpu.per_node) * accumulation * micro_batch
    reading = node * work.input_bytes / DISK if facts.seeing else 0.0
    return StepTime(computing, communicating, updating, reading, sent)


def offloads(engine: EngineConfig, zero: Mapping[str, Any]) -> bool:
    """True if optimizer states or parameters are in host memory."""
    return engine.cpu_offload or offloaded(zero, "offload_optimizer") or offloaded(zero, "offload_param")


def volume(facts: StageProfile, engine: EngineConfig, zero: Mapping[str, Any], world: int, accumulation: int) -> Volume:
    """Return the traffic of one step with ring collectives.

    A gather or scatter of n bytes over r ranks sends n (r - 1) / r, an all-reduce twice that.
    """
    if world == 1:
        return Volume(0.0, 0)
    itemsize = DTYPES[engine.precision].itemsize
    trained = facts.numel(True)
    share = (world - 1) / world
    if not zero:
        return _native(facts, engine, world, itemsize, accumulation)
    buckets = max(1, round(trained / int(zero["reduce_bucket_size"])))
    reduced = DTYPES[zero.get("communication_data_type", "fp32")].itemsize * trained
    if zero["stage"] == 3:
        run = Zero3(facts.trace, facts.params, facts.modules, world, itemsize, zero)
        # small parameters stay gathered, and are gathered anew after each update
        small = sum(param.numel for param in facts.params if param.numel <= run.threshold)
        group = second_copy(zero, world)
        # after an update a trained parameter is gathered from all ranks once, and then from its second copy
        near = accumulation * run.gathered - run.first_gathers if group < world else 0.0
        far = share * (accumulation * (run.gathered + reduced) - near + itemsize * small)
        collectives = accumulation * (run.gathers + buckets) + 1
        return Volume(near * (group - 1) / group + far, collectives, far if near else 0.0)
    reductions = accumulation if zero["stage"] == 2 else 1
    return Volume(share * (reductions * 2 * reduced + itemsize * trained), reductions * buckets + 1)


def _native(facts: StageProfile, engine: EngineConfig, world: int, itemsize: int, accumulation: int) -> Volume:
    shard = engine.shard_size or world
    units = facts.units.trained_alone() if engine.frozen == "replicate" else facts.units
    cut, copies = (shard - 1) / shard, world // shard
    if shard == 1 and not engine.cpu_offload:
        # in bf16 all gradients are reduced at once; DDP reduces buckets, about as many as there are units
        numels = [param.numel for param in facts.params if param.trained]
        elements = sum(map(aligned, numels)) if itemsize < 4 else sum(numels)
        return Volume(2 * 4 * elements * (world - 1) / world, 1 if itemsize < 4 else len(units.members))
    gathered = {unit: itemsize * units.gathered(unit, shard) for unit in units.members}
    forwards = accumulation if engine.reshard_after_backward else 1  # later ones find units gathered
    backwards = accumulation if engine.reshard_after_forward else 0
    reductions = accumulation if engine.sync_each_micro_batch else 1
    every, blocks = sum(gathered.values()), sum(gathered.values()) - gathered[""]  # the root stays after its forward
    trained = sum(units.trained(unit, shard) for unit in units.members)
    sent = (forwards * every + backwards * blocks + reductions * 4 * trained) * cut
    between = 2 * 4 * trained / shard * (copies - 1) / copies
    collectives = len(gathered) * (forwards + reductions) + (len(gathered) - 1) * backwards
    return Volume(sent + between, collectives if shard > 1 else len(gathered) * reductions, between)


def checkpoint_bytes(facts: StageProfile) -> float:
    """Bytes of one step checkpoint, over all ranks."""
    return 4.0 * (1 + facts.states) * facts.numel(True)  # float32 master and optimizer states
