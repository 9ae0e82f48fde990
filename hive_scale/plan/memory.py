"""Bytes that one process needs for one stage, and when: states by arithmetic, the rest from a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch

from hive_scale.config import Config, EngineConfig, StageConfig
from hive_scale.device import pinned_bytes
from hive_scale.model import build
from hive_scale.plan.flops import count
from hive_scale.plan.fsdp_memory import MASTER, Fsdp, Param, Pass, Units, Unsharded
from hive_scale.plan.timeline import MemoryPeak
from hive_scale.plan.trace import Trace, trace
from hive_scale.plan.zero_memory import Zero3, Zero12
from hive_scale.precision import DTYPES
from hive_scale.registry import OPTIMIZERS


@dataclass(frozen=True)
class StageProfile:
    """What a stage of a model is, whatever engine runs it."""

    params: list[Param]
    units: Units
    modules: dict[str, list[str]]  # parameters that a module has itself
    trace: Trace
    features: int = 0  # numbers that a frozen encoder makes of an image; 0 if it is not frozen
    states: int = 2  # that the optimizer keeps of a number
    seeing: float = 0.0  # FLOPs of making them beforehand, for `feature_cache`

    def numel(self, trained: bool | None = None) -> int:
        """How many numbers there are: all, the trained or the frozen ones."""
        return sum(param.numel for param in self.params if trained is None or param.trained == trained)

    def components(self) -> dict[str, tuple[int, int]]:
        """By component: numbers trained and frozen."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for param in self.params:
            counts[param.name.split(".")[0]][not param.trained] += param.numel
        return {name: (trained, frozen) for name, (trained, frozen) in counts.items()}


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes. `moment` is the worst of a step; what is on the host is not in `peak`.

    On the host are states that are offloaded, and the pinned memory into which each checkpoint is copied.
    """

    parameters: float
    masters: float
    moments: float
    batch: float
    moment: MemoryPeak
    host: float  # states
    staging: float = 0.0

    @property
    def on_host(self) -> float:
        """Bytes in host memory."""
        return self.host + self.staging

    @property
    def peak(self) -> float:
        """Bytes on the device at the worst moment."""
        return self.parameters + self.masters + self.moments + self.batch + self.moment.total


def examine(config: Config, stage: StageConfig, num_tokens: int, saves_inputs: bool = False) -> StageProfile:
    """Build the stage's model on the meta device and trace it; `saves_inputs` as ZeRO-3's linear layers do.

    Raises ValueError as training would.
    """
    model, _ = build.for_stage(config.model, stage)
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
    seeing = count(build.for_stage(config.model, stage)[0]).components(1, 0, 0)["vision"].forward if cached else 0.0
    size = build.image_size(config.model)
    image = (model.features_shape, dtype) if cached else ((3, size, size), torch.uint8)
    traced = trace(model, dtype, num_tokens, image, config.engine.checkpointing, saves_inputs)
    states = len(OPTIMIZERS[stage.optimizer].states)
    return StageProfile(params, units, modules, traced, frozen * prod(model.features_shape), states, seeing)


def _units(model: Any, params: list[Param]) -> Units:
    """Blocks, and all the rest as one, as the native engine shards them."""
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
    """What one of `world` processes needs; `zero` is the resolved ``zero_optimization``, empty for FSDP2."""
    itemsize = DTYPES[engine.precision].itemsize
    if zero:
        memory = _deepspeed(facts, zero, world, itemsize, micro_batch, accumulation > 1)
    else:
        memory = _native(facts, engine, world, itemsize, micro_batch, accumulation > 1)
    saved = MASTER * (1 + facts.states) * facts.numel(True) // world
    return replace(memory, staging=float(pinned_bytes(saved)))


def _native(
    facts: StageProfile, engine: EngineConfig, world: int, itemsize: int, micro_batch: int, waiting: bool
) -> Memory:
    shard = engine.shard_size or world
    masters = float(MASTER * sum(param.padded(shard) for param in facts.params) / shard)
    moments = float(MASTER * facts.states * sum(param.padded(shard) for param in facts.params if param.trained) / shard)
    if shard == 1 and itemsize == MASTER and not engine.cpu_offload:
        lines = [Unsharded(facts.trace, facts.units, world, waiting).line]
    else:
        keeps = waiting and not engine.reshard_after_backward
        waits: Literal["cut", "whole"] = "cut" if engine.sync_each_micro_batch else "whole"
        # the first micro-batch has nothing waiting, the last one reduces
        passes = [Pass(keeps=keeps), Pass(waits, begins_gathered=keeps)] if waiting else [Pass()]
        passes += [Pass(waits, begins_gathered=True, keeps=True)] if keeps else []
        reshard = engine.reshard_after_forward
        lines = [Fsdp(facts.trace, facts.units, shard, itemsize, reshard, one).line for one in passes]
    moment = max((line.worst(micro_batch) for line in lines), key=lambda one: one.total)
    batch = facts.trace.input_bytes * micro_batch
    if engine.cpu_offload:
        return Memory(0.0, 0.0, 0.0, batch, moment, masters + 1.5 * moments)  # and reduced gradients
    return Memory(masters, 0.0, moments, batch, moment, 0.0)


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
        line = Zero3(facts.trace, facts.params, facts.modules, world, itemsize, zero).line
        fixed = float(MASTER * int(zero["reduce_bucket_size"]) + masters)  # the bucket, and gradients as cut
    moment = line.worst(micro_batch)
    held = {**moment.held, "gradients": moment.held.get("gradients", 0.0) + fixed}
    moment, batch = MemoryPeak(moment.where, moment.activations, held), facts.trace.input_bytes * micro_batch
    host = 0.0
    if offloaded(zero, "offload_optimizer"):
        host, masters, moments = masters + moments + masters, 0.0, 0.0  # and gradients
    if offloaded(zero, "offload_param"):
        host, parameters = host + itemsize * every / world, parameters - itemsize * every / world
    return Memory(parameters, masters, moments, batch, moment, host)


def offloaded(zero: Mapping[str, Any], what: str) -> bool:
    """Whether a ``zero_optimization`` section keeps `what` off the device."""
    return bool((zero.get(what) or {}).get("device", "none") != "none")
