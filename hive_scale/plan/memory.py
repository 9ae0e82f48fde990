"""Peak memory of one process in one stage: states by arithmetic, activations from a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch

from hive_scale.config import Config, EngineConfig, StageConfig
from hive_scale.device import pinned_bytes
from hive_scale.engine.optimizer import Shape, numels, optimizer_kind, refusal
from hive_scale.model import build
from hive_scale.param_groups import ParamGroup
from hive_scale.plan.compiled import spare
from hive_scale.plan.flops import encoder_flops
from hive_scale.plan.fsdp_memory import MASTER, Fsdp, Param, Pass, Units, Unsharded
from hive_scale.plan.timeline import MemoryPeak
from hive_scale.plan.trace import Trace, trace
from hive_scale.plan.zero_memory import Zero3, Zero12, second_copy
from hive_scale.precision import DTYPES


@dataclass(frozen=True)
class StageProfile:
    """Facts about a stage's model that do not depend on the engine."""

    params: list[Param]
    units: Units
    modules: dict[str, list[str]]  # names of the parameters that each module owns directly
    trace: Trace
    features: int = 0  # elements of a frozen encoder's features per image; 0 if it trains
    groups: Sequence[ParamGroup] = ()  # as the optimizer has them
    kept: Mapping[str, Sequence[Shape]] = field(default_factory=dict)  # of the optimizer, by trained parameter
    update_flops: float = 0.0  # of the optimizer's matrix products in a step, in bf16
    seeing: float = 0.0  # FLOPs per image to fill `feature_cache`; 0 without it

    def numel(self, trained: bool | None = None) -> int:
        """Number of elements: all, only the trained (True) or only the frozen (False)."""
        return sum(param.numel for param in self.params if trained is None or param.trained == trained)

    def refusal(self, stage: StageConfig, engine: EngineConfig, world: int) -> str:
        """Why the stage's optimizer cannot run sharded as `engine` says, with the remedy; "" if it can."""
        return refusal(stage, self.groups, {param.name: param.shape for param in self.params}, engine, world)

    @property
    def states(self) -> float:
        """Elements that the optimizer keeps of each trained element besides its master, on average."""
        return sum(numels(self.kept).values()) / max(1, self.numel(True))

    def components(self) -> dict[str, tuple[int, int]]:
        """Return {component: (trained, frozen) elements}."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for param in self.params:
            counts[param.name.split(".")[0]][not param.trained] += param.numel
        return {name: (trained, frozen) for name, (trained, frozen) in counts.items()}


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in bytes. `moment` is the peak within a step; host memory is not part of `peak`.

    Host memory holds offloaded states, and pinned buffers into which each checkpoint is copied.
    """

    parameters: float
    masters: float
    moments: float
    batch: float
    moment: MemoryPeak
    host: float  # offloaded states
    staging: float = 0.0

    @property
    def on_host(self) -> float:
        """Bytes in host memory."""
        return self.host + self.staging

    @property
    def peak(self) -> float:
        """Bytes on the device at the peak moment."""
        return self.parameters + self.masters + self.moments + self.batch + self.moment.total


def examine(
    config: Config, stage: StageConfig, num_tokens: int, saves_inputs: bool = False, compiled: bool = False
) -> StageProfile:
    """Build the stage's model on the meta device and trace it. `saves_inputs`: linear layers save inputs, as in ZeRO-3.

    With `compiled`, blocks are compiled, and hold less for their backward.
    Raises ValueError for settings that training would refuse as well.
    """
    model, groups = build.for_stage(config.model, stage)
    params = [Param(name, tuple(one.shape), one.requires_grad) for name, one in model.named_parameters()]
    names = {one: name for name, one in model.named_parameters()}
    modules = {
        name: [names[one] for one in module.parameters(recurse=False)]
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    units = _units(model, params)
    dtype = DTYPES[config.engine.precision]
    frozen = not any(param.trained for param in params if param.name.startswith("vision."))
    cached = frozen and config.feature_cache and not config.data.blank_images
    seeing = encoder_flops(build.for_stage(config.model, stage)[0]) if cached else 0.0
    size = build.image_size(config.model)
    image = (model.features_shape, dtype) if cached else ((3, size, size), torch.uint8)
    traced = trace(model, dtype, num_tokens, image, config.engine.checkpointing, saves_inputs)
    if compiled:
        spare(traced, build.for_stage(config.model, stage)[0], dtype, config.engine.checkpointing)
    kind, shapes = optimizer_kind(stage), {param.name: param.shape for param in params}
    groups = kind.divide(groups, model.matrices())
    return StageProfile(
        params,
        units,
        modules,
        traced,
        features=frozen * prod(model.features_shape),
        groups=groups,
        kept=kind.kept_shapes(groups, shapes),
        update_flops=sum(
            kind.update_flops(shapes[one], group.matrices) for group in groups for one in group.parameters
        ),
        seeing=seeing,
    )


def _units(model: Any, params: list[Param]) -> Units:
    """Group parameters into units as the native engine shards them: each block, and the rest as one."""
    places = {id(module): name for name, module in model.named_modules()}
    blocks = [places[id(block)] for part in model.blocks().values() for block in part]
    members: dict[str, list[Param]] = {"": [], **{block: [] for block in blocks}}
    for param in params:
        owner = next((block for block in blocks if param.name.startswith(f"{block}.")), "")
        members[owner].append(param)
    return Units(members)


def measure(
    facts: StageProfile, engine: EngineConfig, zero: Mapping[str, Any], world: int, micro_batch: int, accumulation: int
) -> Memory:
    """Return the memory of one of `world` processes.

    `zero` is the resolved ``zero_optimization`` section, empty for FSDP2.
    """
    itemsize = DTYPES[engine.precision].itemsize
    if zero:
        memory = _deepspeed(facts, zero, world, itemsize, micro_batch, accumulation > 1)
    else:
        memory = _native(facts, engine, world, itemsize, micro_batch, accumulation > 1)
    saved = MASTER * (1 + facts.states) * facts.numel(True) // world
    return replace(memory, staging=float(pinned_bytes(int(saved))))


def _native(
    facts: StageProfile, engine: EngineConfig, world: int, itemsize: int, micro_batch: int, waiting: bool
) -> Memory:
    shard = engine.shard_size or world
    if shard == 1 and not engine.cpu_offload:
        return _unsharded(facts, world, itemsize, micro_batch, waiting)
    apart = float(itemsize * facts.numel(False)) if engine.frozen == "replicate" else 0.0
    units = facts.units.trained_alone() if apart else facts.units
    sharded = [param for members in units.members.values() for param in members]
    masters = float(MASTER * sum(param.padded(shard) for param in sharded) / shard)
    states = [Param(name, shape, True) for name, shapes in facts.kept.items() for shape in shapes]
    moments = float(MASTER * sum(state.padded(shard) for state in states) / shard)
    keeps = waiting and not engine.reshard_after_backward
    waits: Literal["cut", "whole"] = "cut" if engine.sync_each_micro_batch else "whole"
    # the first micro-batch holds no earlier gradients, the last one reduces
    passes = [Pass(keeps=keeps), Pass(waits, begins_gathered=keeps)] if waiting else [Pass()]
    passes += [Pass(waits, begins_gathered=True, keeps=True)] if keeps else []
    reshard = engine.reshard_after_forward
    lines = [Fsdp(facts.trace, units, shard, itemsize, reshard, one).line for one in passes]
    moment = max((line.worst(micro_batch) for line in lines), key=lambda one: one.total)
    batch = _inputs(facts, micro_batch, waiting)
    if engine.cpu_offload:
        return Memory(apart, 0.0, 0.0, batch, moment, masters + 1.5 * moments)  # masters, moments and reduced gradients
    return Memory(apart + masters, 0.0, moments, batch, moment, 0.0)


def _inputs(facts: StageProfile, micro_batch: int, waiting: bool) -> float:
    """Bytes of a micro-batch, and, under accumulation, of the next one, whose copy has begun."""
    return facts.trace.input_bytes * micro_batch * (1 + waiting)


def _unsharded(facts: StageProfile, world: int, itemsize: int, micro_batch: int, waiting: bool) -> Memory:
    trained = float(facts.numel(True))
    moment = Unsharded(facts.trace, facts.units, world, itemsize, waiting).line.worst(micro_batch)
    masters = MASTER * trained if itemsize != MASTER else 0.0  # in fp32 the parameters are the masters
    moments, batch = MASTER * facts.states * trained, _inputs(facts, micro_batch, waiting)
    return Memory(float(itemsize * facts.numel()), masters, moments, batch, moment, 0.0)


def _deepspeed(
    facts: StageProfile, zero: Mapping[str, Any], world: int, itemsize: int, micro_batch: int, waiting: bool
) -> Memory:
    trained, every = facts.numel(True), facts.numel()
    masters, moments = float(MASTER * trained / world), float(MASTER * facts.states * trained / world)
    if zero["stage"] < 3:
        parameters, fixed = float(itemsize * every), 0.0
        line = Zero12(facts.trace, facts.params, world, itemsize, zero, waiting).line
    else:
        threshold = int(zero["stage3_param_persistence_threshold"])
        small = sum(param.numel for param in facts.params if param.numel <= threshold)
        parameters = float(itemsize * (every / world + small))
        if int(zero.get("zero_hpz_partition_size", 1)) > 1:
            parameters += itemsize * (every - small) / second_copy(zero, world)
        line = Zero3(facts.trace, facts.params, facts.modules, world, itemsize, zero).line
        fixed = float(MASTER * int(zero["reduce_bucket_size"]) + masters)  # the bucket, and the sharded gradients
    moment = line.worst(micro_batch)
    held = {**moment.held, "gradients": moment.held.get("gradients", 0.0) + fixed}
    moment, batch = MemoryPeak(moment.where, moment.activations, held), _inputs(facts, micro_batch, waiting)
    host = 0.0
    if offloaded(zero, "offload_optimizer"):
        host, masters, moments = masters + moments + masters, 0.0, 0.0  # masters, moments and gradients
    if offloaded(zero, "offload_param"):
        host, parameters = host + itemsize * every / world, parameters - itemsize * every / world
    return Memory(parameters, masters, moments, batch, moment, host)


def offloaded(zero: Mapping[str, Any], what: str) -> bool:
    """True if a ``zero_optimization`` section keeps `what` off the device."""
    return bool((zero.get(what) or {}).get("device", "none") != "none")
