"""Plan of a run: memory, work and time of each stage on a world of GPUs that need not exist here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hive_scale.config import Config, EngineConfig, StageConfig
from hive_scale.engine.compilation import would_compile
from hive_scale.plan.choose import Ranks, choose
from hive_scale.plan.devices import Gpu, usable
from hive_scale.plan.memory import Memory, StageProfile, examine, measure
from hive_scale.plan.time import DISK, PRODUCTS, StepTime, checkpoint_bytes, offloads, step_time
from hive_scale.precision import DTYPES


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage for one of `world` processes. Bytes, FLOPs and seconds."""

    stage: str
    engine: EngineConfig  # without open options
    components: Mapping[str, tuple[int, int]]  # component -> (trained, frozen) elements
    micro_batch: int
    accumulation: int
    steps: int
    samples: int  # per optimizer step
    memory: Memory
    capacity: float  # bytes of a GPU that are available to tensors
    flops: Mapping[str, float]  # per sample: forward, backward, recompute
    time: StepTime
    mfu: float
    checkpoint: float  # bytes of one checkpoint, over all processes
    features: float  # bytes that `feature_cache` would take; 0 if the encoder trains
    seeing: float  # seconds to fill `feature_cache`, once for all stages that use it

    @property
    def spare(self) -> float:
        """Free bytes on the device at the peak; negative if the stage does not fit."""
        return self.capacity - self.memory.peak

    @property
    def fits(self) -> bool:
        """True if the device has enough memory."""
        return self.spare >= 0

    @property
    def hours(self) -> float:
        """Hours of the whole stage."""
        return self.steps * self.time.total / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready fields, derived values included."""
        extra = {"spare": self.spare, "fits": self.fits, "hours": self.hours, "peak": self.memory.peak}
        return asdict(self) | extra | {"samples_per_second": self.samples / self.time.total}


@dataclass(frozen=True)
class Machine:
    """The GPUs and host memory on which a run is planned."""

    gpu: Gpu
    world: int
    host_memory: float | None = None  # bytes per process for offloaded states; None: unknown

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"--world {self.world}: give at least 1 process")
        if self.world > self.gpu.per_node and self.world % self.gpu.per_node:
            raise ValueError(
                f"--world {self.world} does not fill nodes of {self.gpu.per_node} GPUs: use a multiple, such as "
                f"{self.world - self.world % self.gpu.per_node}"
            )

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.world // self.gpu.per_node)

    @property
    def capacity(self) -> float:
        """Bytes of one device that are available to tensors."""
        return usable(self.gpu.memory)

    @property
    def ranks(self) -> Ranks:
        """One rank per GPU."""
        return Ranks(self.world, min(self.world, self.gpu.per_node), self.capacity)


def zero_of(config: Config, stage: StageConfig, world: int) -> dict[str, Any]:
    """Return the complete ``zero_optimization`` section of the config's DeepSpeed JSON; empty without one.

    It has the type in which gradients are reduced, too: "communication_data_type".
    """
    if not config.engine.ds_config:
        return {}
    from hive_scale.engine.deepspeed_config import resolve  # imported late: DeepSpeed takes seconds to import

    settings = resolve(Path(config.engine.ds_config), stage, config.engine, world, here=False)
    zero: dict[str, Any] = settings["zero_optimization"]
    return zero | {"communication_data_type": settings["communication_data_type"]}


def check_engine(engine: EngineConfig, zero: Mapping[str, Any], machine: Machine) -> None:
    if engine.shard_size and machine.world % engine.shard_size:
        raise ValueError(
            f"engine.shard_size={engine.shard_size} does not divide --world {machine.world}: use a divisor of it"
        )
    if offloads(engine, zero) and machine.host_memory is None:
        raise ValueError(
            "the engine offloads to host memory, of which nothing is known: give --host_gb, per GPU, or no offload"
        )


def plan_stage(
    config: Config, name: str, facts: StageProfile, zero: Mapping[str, Any], machine: Machine, num_samples: int
) -> StagePlan:
    """Return the plan of one stage.

    Raises ValueError as training would: if the batch does not divide, or the set is smaller than a batch.
    """
    stage = config.stages[name]
    accumulation = stage.accumulation(machine.world)
    micro_batch = stage.global_batch // machine.world // accumulation
    engine = choose(config.engine, facts, machine.ranks, micro_batch, accumulation)
    memory = measure(facts, engine, zero, machine.world, micro_batch, accumulation)
    time = step_time(facts, engine, zero, machine.gpu, machine.world, micro_batch, accumulation)
    kept = num_samples * facts.features * DTYPES[engine.precision].itemsize
    useful = stage.global_batch * (facts.trace.flops["forward"] + facts.trace.flops["backward"])
    return StagePlan(
        stage=name,
        engine=engine,
        components=facts.components(),
        micro_batch=micro_batch,
        accumulation=accumulation,
        steps=stage.num_steps(num_samples - round(num_samples * config.data_of(name).heldout_share)),
        samples=stage.global_batch,
        memory=memory,
        capacity=machine.capacity,
        flops={part: facts.trace.flops[part] for part in ("forward", "backward", "recompute")},
        time=time,
        mfu=useful / machine.world / time.total / machine.gpu.peak(engine.precision),
        checkpoint=checkpoint_bytes(facts),
        features=kept,
        seeing=_seeing(facts, engine, machine, num_samples, kept) if facts.seeing else 0.0,
    )


def _seeing(facts: StageProfile, engine: EngineConfig, machine: Machine, num_samples: int, kept: float) -> float:
    """Seconds to encode all images, or to write their features if that takes longer."""
    computing = num_samples * facts.seeing / (machine.world * machine.gpu.peak(engine.precision) * PRODUCTS)
    return max(computing, kept / machine.nodes / DISK)


def plan_run(config: Config, machine: Machine, num_samples: int) -> list[StagePlan]:
    """Return the plan of every stage. Takes seconds per stage, since each is traced at full size."""
    plans = []
    for name, stage in config.stages.items():
        zero = zero_of(config, stage, machine.world)
        check_engine(config.engine, zero, machine)
        compiled = would_compile(config.engine, machine.gpu.compiles)
        facts = examine(config, stage, config.data_of(name).max_tokens, zero.get("stage") == 3, compiled)
        if why := facts.refusal(stage, config.engine, machine.world):
            raise ValueError(f"stages.{name}: {why}")
        plans.append(plan_stage(config, name, facts, zero, machine, num_samples))
    return plans


def checkpoint_seconds(plan: StagePlan, machine: Machine) -> float:
    """Seconds to write one checkpoint in the background, all nodes in parallel."""
    return plan.checkpoint / machine.nodes / DISK
