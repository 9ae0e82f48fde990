"""Find the fastest settings that fit in memory: micro-batch per stage; recompute, sharding and offload of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hive_scale.config import CheckpointingConfig, Config, Frozen, StageConfig
from hive_scale.engine.compilation import would_compile
from hive_scale.plan.devices import usable
from hive_scale.plan.memory import StageProfile, examine, measure
from hive_scale.plan.run import Machine, StagePlan, check_engine, plan_stage, zero_of

# Activation checkpointing to try, from no recomputation to all; per component where that pays.
RECOMPUTED = (
    CheckpointingConfig(),
    CheckpointingConfig("selective", "selective", "selective"),
    CheckpointingConfig(language="full", fusion="full"),
    CheckpointingConfig(vision="full"),
    CheckpointingConfig("full", "full", "full"),
)


NATIVE = ("shard_size", "frozen", "reshard_after_forward", "reshard_after_backward", "cpu_offload")
FROZEN: tuple[Frozen, ...] = ("replicate", "shard")
NEAR = 1.02  # stop searching once the time is within this factor of the lower bound


@dataclass(frozen=True)
class Fit:
    """Settings that fit, with the plan of each stage."""

    config: Config
    plans: list[StagePlan]

    @property
    def hours(self) -> float:
        return sum(plan.hours for plan in self.plans)

    def words(self) -> list[str]:
        """Return the command-line words that give these settings to a launcher."""
        engine = self.config.engine
        recompute = vars(engine.checkpointing)
        words = [f"engine.checkpointing.{name}={mode}" for name, mode in recompute.items()]
        if engine.ds_config:
            words.append(f"engine.ds_config={engine.ds_config}")
        else:
            words += [f"engine.{key}={getattr(engine, key)}".lower() for key in NATIVE]
        return words + [f"stages.{plan.stage}.micro_batch={plan.micro_batch}" for plan in self.plans]


def fit(config: Config, machine: Machine, num_samples: int, spare: float = 0.0) -> Fit:
    """Return the fastest settings that fit, leaving `spare` bytes free on each device.

    Raises ValueError if nothing fits at micro-batch 1, with the missing memory and remedies.
    """
    best: Fit | None = None
    least: StagePlan | None = None
    floor = 0.0
    if spare and config.engine.reshard_after_backward == "auto":  # a run would choose by all that there is
        config = replace(config, engine=replace(config.engine, reshard_after_backward=True))
    for checkpointing in RECOMPUTED:
        traced: dict[tuple[str, bool], StageProfile] = {}
        for candidate in _engines(replace(config, engine=replace(config.engine, checkpointing=checkpointing)), machine):
            plans = []
            profiles = {name: _facts(candidate, name, one, machine, traced) for name, one in config.stages.items()}
            whys = {n: one.refusal(config.stages[n], candidate.engine, machine.world) for n, one in profiles.items()}
            if refused := [f"stages.{name}: {why}" for name, why in whys.items() if why]:
                if candidate.engine.ds_config:  # then there is no other candidate
                    raise ValueError(refused[0])
                continue
            for name, facts in profiles.items():
                found = _largest(candidate, name, facts, machine, num_samples, spare)
                plans.append(found)
            tightest = min(plans, key=lambda plan: plan.spare)
            least = tightest if least is None or tightest.spare > least.spare else least
            if all(_fits(plan, machine, spare) for plan in plans):
                fitting = Fit(_with_batches(candidate, plans), plans)
                best = fitting if best is None or fitting.hours < best.hours else best
        floor = floor or sum(_at_once(config, name, facts, machine, num_samples) for (name, _), facts in traced.items())
        if best and best.hours <= NEAR * floor:
            break  # more recomputation could save no more than that
    if best is None:
        assert least is not None
        raise ValueError(
            f"stage {least.stage} needs {least.memory.peak / 1e9:.1f} GB at micro-batch 1 with everything recomputed, "
            f"{(spare - least.spare) / 1e9:.1f} GB more than there is: use more GPUs (--world) with sharding, "
            "a larger GPU (--gpu), or offload (--host_gb)"
        )
    return best


def too_large(
    config: Config, name: str, facts: StageProfile, zero: Mapping[str, Any], world: int, memory: float
) -> str:
    """Warning, with the remedy, that stage `name` is planned to need more than a device of `memory` bytes; or ""."""
    stage, room = config.stages[name], usable(memory)
    per_rank = stage.global_batch // world
    given = per_rank // stage.accumulation(world)

    def peak(size: int) -> float:
        return measure(facts, config.engine, zero, world, size, per_rank // size).peak

    if (planned := peak(given)) <= room:
        return ""
    fitting = next((size for size in range(given - 1, 0, -1) if per_rank % size == 0 and peak(size) <= room), 0)
    return (
        f"stages.{name}: micro_batch={given} may not fit: {planned / 1e9:.3g} GB are planned, and {room / 1e9:.3g} GB "
        f"of this device can be used: {_smaller(name, fitting)}"
    )


def _smaller(stage: str, micro_batch: int) -> str:
    if micro_batch:
        return f"set stages.{stage}.micro_batch={micro_batch}, with the same global batch"
    return (
        "nor would micro_batch=1: recompute activations (engine.checkpointing.*=full), use more GPUs, shard frozen "
        "parameters, too (engine.frozen=shard), or offload"
    )


def _engines(config: Config, machine: Machine) -> Iterator[Config]:
    """Yield `config` with every combination of sharding and offload. A DeepSpeed JSON is left as it is."""
    if config.engine.ds_config:
        yield config
        return
    node = min(machine.world, machine.gpu.per_node)
    for shard in sorted({1, node, machine.world}):
        for reshard in (False, True) if shard > 1 else (True,):
            for offload in (False, True) if machine.host_memory is not None else (False,):
                sharded = replace(config.engine, shard_size=shard, reshard_after_forward=reshard, cpu_offload=offload)
                for frozen in FROZEN if shard > 1 else FROZEN[:1]:
                    yield replace(config, engine=replace(sharded, frozen=frozen))


def _facts(
    config: Config, name: str, stage: StageConfig, machine: Machine, traced: dict[tuple[str, bool], StageProfile]
) -> StageProfile:
    zero = zero_of(config, stage, machine.world)
    check_engine(config.engine, zero, machine)
    key = name, zero.get("stage") == 3
    if key not in traced:
        compiled = would_compile(config.engine, machine.gpu.compiles)
        traced[key] = examine(config, stage, config.data_of(name).max_tokens, key[1], compiled)
    return traced[key]


def _largest(
    config: Config, name: str, facts: StageProfile, machine: Machine, num_samples: int, spare: float
) -> StagePlan:
    """Return the plan with the largest micro-batch that fits, the fastest; if none fits, with micro-batch 1."""
    stage = config.stages[name]
    zero = zero_of(config, stage, machine.world)
    per_rank = stage.global_batch // machine.world or 1
    for size in sorted((size for size in range(1, per_rank + 1) if per_rank % size == 0), reverse=True):
        plan = plan_stage(_with_batch(config, name, size), name, facts, zero, machine, num_samples)
        if _fits(plan, machine, spare):
            break
    return plan


def _fits(plan: StagePlan, machine: Machine, spare: float) -> bool:
    if machine.host_memory is None:  # host memory is unknown, so offload is ruled out
        return plan.spare >= spare and not plan.memory.host
    return plan.spare >= spare and plan.memory.on_host <= machine.host_memory


def _at_once(config: Config, name: str, facts: StageProfile, machine: Machine, num_samples: int) -> float:
    """Lower bound of a stage's hours: no recomputation, the whole batch at once, whatever memory that needs."""
    at_once = _with_batch(config, name, max(1, config.stages[name].global_batch // machine.world))
    zero = zero_of(config, config.stages[name], machine.world)
    return plan_stage(at_once, name, facts, zero, machine, num_samples).hours


def _with_batch(config: Config, name: str, size: int) -> Config:
    stages = {**config.stages, name: replace(config.stages[name], micro_batch=size)}
    return replace(config, stages=stages)


def _with_batches(config: Config, plans: list[StagePlan]) -> Config:
    for plan in plans:
        config = _with_batch(config, plan.stage, plan.micro_batch)
    return config
