"""Header of a training run: what will be trained, on what and for how long. It comes before anything that is slow.

Facts that take no time come first, those that need the data opened follow, and the planner's estimates are last.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import gcd
from time import perf_counter
from typing import NamedTuple

import psutil
import torch

from hive_scale import device
from hive_scale.checkpoint.format import step_of, steps_in
from hive_scale.checkpoint.run_claims import Overwrite
from hive_scale.checkpoint.stage_files import is_stage_done
from hive_scale.config import Config
from hive_scale.data.loader import Loader
from hive_scale.distributed import World
from hive_scale.engine.compilation import is_compiled
from hive_scale.launcher_env import launcher_of
from hive_scale.model import build
from hive_scale.observability.console import clock
from hive_scale.observability.logging_setup import show_and_log
from hive_scale.phase_timer import tick
from hive_scale.plan.choose import Chosen, told
from hive_scale.plan.devices import this_gpu, usable
from hive_scale.plan.fit import too_large
from hive_scale.plan.memory import Memory, StageProfile, examine, measure
from hive_scale.plan.run import Machine, plan_stage, zero_of
from hive_scale.preflight import Data
from hive_scale.rundir import look
from hive_scale.strangers import printable, some

ENOUGH = 10.0  # seconds after which no further stage is planned: a start must not wait long for estimates
NAMED = 3  # most shard patterns, and reasons for unusable samples, to name
logger = logging.getLogger(__name__)


class _View(NamedTuple):
    """What one rank sees. Bytes of memory are the device's, or on a CPU the host's."""

    host: str
    device: str
    free: int
    total: int
    visible: int  # number of devices that the rank could use


_calls = count()  # each exchange between ranks needs a name of its own


def show_run(config: Config, left: Sequence[str], world: World, overwrite: Overwrite = False) -> None:
    """Show the run, its stages, the devices, the processes and the engine. `left`: stages to train. A collective."""
    views = [_View(*one) for one in world.exchange(f"header/{next(_calls)}", _look(world.device))]
    if not world.is_main:
        return
    hosts = Counter(view.host for view in views)
    lines = {
        "run": config.name,
        "output": f"{config.run_dir}{_replaced(config, overwrite)}",
        "stages": ", ".join(_state(config, name, left, bool(overwrite)) for name in config.stages),
        "device": _devices(world.device, views, hosts[views[0].host]),
        "processes": _processes(world.size, len(hosts)),
        "engine": _engine(config, world.size, world.device.type, len(hosts) > 1 and device.pins_memory(world.device)),
    }
    _show(lines)


def show_data(config: Config, data: Mapping[str, Data], left: Sequence[str], world: World) -> None:
    """Show the data sets, and each stage's steps, batches and parameters. `left`: stages to train."""
    if not world.is_main:
        return
    sets = _sets(data, left)
    for names in sets:
        of, one, patterns = f" of {', '.join(names)}" * (len(sets) > 1), data[names[0]], config.data_of(names[0])
        train, heldout = (f"{some(each, NAMED)}: " for each in (patterns.train, patterns.heldout))
        _show(
            {
                "data": f"training{of}, {train}{_samples(one.train)}",
                "": f"held-out{of}, {heldout if one.heldout else ''}{_samples(one.heldout)}",
                "tokenizer": f"{patterns.tokenizer.path}{of}, {one.tokenizer.vocab_size:,} tokens",
            }
        )
    for name in left:
        length, optimizer = _length(config, name, data, world), config.stages[name].optimizer
        _show({"stage": f"{name}: {length}; {optimizer}; {_parts(config, name)}"})


def show_plan(
    config: Config, data: Mapping[str, Data], left: Sequence[str], world: World, chosen: Mapping[str, Chosen]
) -> None:
    """Show the planned memory of each stage in `left`, and its time if the device is in the planner's table.

    What the plan has `chosen` of a stage's engine follows. Warns of stages that do not fit. Nothing for devices without
    memory of their own (a CPU, a Mac), of which the planner knows neither.
    """
    if not world.is_main or not device.pins_memory(world.device):
        return
    began = perf_counter()
    for name in left:
        engine, facts = chosen[name]
        if facts is None and perf_counter() - began > ENOUGH:
            _show({"plan": f"{name}: not made here, since it takes long: see python -m hive_scale plan"})
            continue
        tick()
        try:
            planned = _plan(replace(config, engine=engine), name, data[name].train.num_samples, world, facts)
            _show({"plan": "; ".join(filter(None, (f"{name}: {planned}", told(config.engine, engine, world.size))))})
        except Exception as error:  # a registered model may raise anything here, and training needs no estimate
            logger.warning("stage %s cannot be planned: %s: %s", name, type(error).__name__, error)


def _show(lines: Mapping[str, str]) -> None:
    show_and_log("\n".join(f"{label:<10} {printable(text)}" for label, text in lines.items()))


# -- the run ----------------------------------------------------------------------------------------------------


def _replaced(config: Config, overwrite: Overwrite) -> str:
    if not overwrite or look(config.run_dir) != "ours":
        return ""
    return f", where a run is {'deleted' if overwrite == 'delete' else 'moved aside'} first"


def _state(config: Config, name: str, left: Sequence[str], anew: bool) -> str:
    stage_dir = config.run_dir / name
    if name not in left:
        return f"{name} ({'done' if is_stage_done(stage_dir) else 'not now'})"
    steps = [] if anew else steps_in(stage_dir)
    return f"{name} (goes on from step {step_of(steps[-1])})" if steps else name


def _look(own: torch.device) -> _View:
    host = socket.gethostname()
    if device.is_accelerator(own):
        name = device.name_of(own) or own.type
        return _View(host, name, *_memory_of(own), torch.accelerator.device_count())
    return _View(host, "CPU", *_memory_of(own), 0)


def _memory_of(own: torch.device) -> tuple[int, int]:
    """(free, total) bytes that the device has; a CPU and a Mac have the host's."""
    if device.pins_memory(own):
        return device.memory_of(own)
    host = psutil.virtual_memory()
    return host.available, host.total


def _devices(own: torch.device, views: Sequence[_View], on_this_node: int) -> str:
    """The devices of all ranks; `on_this_node` is the number of ranks beside this one, with it."""
    if not device.is_accelerator(own):
        threads = torch.get_num_threads()
        why = "torch finds none" if torch.version.cuda or torch.version.hip else "this torch is built for CPUs alone"
        return (
            f"CPU, {threads} thread{'s' * (threads != 1)} per process, {_gb(views[0].total)} of memory; no GPU was "
            f"found ({why}), so training runs on the CPU"
        )
    kinds = Counter((view.device, view.total) for view in views)
    told = ", ".join(f"{number} x {name}, {_gb(total)} each" for (name, total), number in kinds.items())
    seen = views[0].visible
    idle = f"; {seen} are visible: torchrun --nproc_per_node {seen} uses all" if seen > on_this_node else ""
    return f"{told}; at least {_gb(min(view.free for view in views))} free{idle}"


def _processes(size: int, nodes: int) -> str:
    launcher = launcher_of(os.environ)
    return (
        f"{size}{f' on {nodes} nodes' if nodes > 1 else ''}, {f'started by {launcher}' if launcher else 'no launcher'}"
    )


def _engine(config: Config, size: int, kind: str, chooses: bool = False) -> str:
    """The engine in words. `chooses`: there are several nodes, and the plan decides what is left open."""
    engine = config.engine
    shard = engine.shard_size or size
    if engine.ds_config:
        name = f"DeepSpeed, {engine.ds_config}"
    elif size == 1:
        name = "native engine in one process, nothing is sharded"
    elif chooses and not engine.shard_size and not engine.cpu_offload:
        name = f"FSDP2, sharded inside each node or over all {size} processes, as the plan below says"
    elif shard == 1:
        name = f"DDP: {size} replicas"
    else:
        name = f"FSDP2, sharded over {shard} processes" + (f", {size // shard} replicas" if shard < size else "")
    recomputed = [f"{part} {how}" for part, how in vars(engine.checkpointing).items() if how != "none"]
    more = {
        "optimizer in host memory": engine.cpu_offload,
        "compiled": is_compiled(engine, kind),
        f"activation checkpointing: {', '.join(recomputed)}": bool(recomputed),
    }
    return "; ".join([f"{name}; {engine.precision}", *(text for text, on in more.items() if on)])


# -- data and stages --------------------------------------------------------------------------------------------


def _sets(data: Mapping[str, Data], left: Sequence[str]) -> list[list[str]]:
    """The names of the stages in `left`, grouped by the set of data that they share."""
    users: dict[int, list[str]] = {}
    for name in left:
        users.setdefault(id(data[name]), []).append(name)
    return list(users.values())


def _samples(loader: Loader | None) -> str:
    if loader is None:
        return "nothing"
    served, faults = len(loader.numbers), loader.index.faults
    shards = len(loader.index.shards)
    told = f"{served:,} samples in {shards:,} shard{'s' * (shards != 1)}"
    if loader.num_samples != served:
        told += f", {loader.num_samples:,} per epoch of the mixture"
    if not faults:
        return told
    reasons = Counter(fault.reason for fault in faults)
    named = ", ".join(f"{number:,} x {reason}" for reason, number in reasons.most_common(NAMED))
    others = len(reasons) - NAMED
    return (
        f"{told}; {len(faults):,} unusable ({len(faults) / (len(loader.index) + len(faults)):.1%}): {named}"
        f"{f', and {others} other reasons' if others > 0 else ''}"
    )


def _length(config: Config, name: str, data: Mapping[str, Data], world: World) -> str:
    stage = config.stages[name]
    steps, accumulation = stage.num_steps(data[name].train.num_samples), stage.accumulation(world.size)
    micro = stage.global_batch // world.size // accumulation
    parts = [f"micro-batch {micro}", *([f"x {accumulation} accumulated"] if accumulation > 1 else [])]
    parts += [f"x {world.size} processes"] if world.size > 1 else []
    return f"{steps:,} step{'s' * (steps != 1)} of {stage.global_batch:,} samples ({' '.join(parts)})"


def _parts(config: Config, name: str) -> str:
    """The parameters of each part of the model: trained, and frozen."""
    model, _ = build.for_stage(config.model, config.stages[name])
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for parameter, tensor in model.named_parameters():
        counts[tensor.requires_grad][parameter.split(".")[0]] += tensor.numel()
    trained, frozen = (
        ", ".join(f"{part} {_count(number)}" for part, number in counts[is_trained].items())
        for is_trained in (True, False)
    )
    return f"trained: {trained}; frozen: {frozen or 'nothing'}"


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e5 else f"{number:,}"


# -- the plan ---------------------------------------------------------------------------------------------------


def _plan(config: Config, name: str, num_samples: int, world: World, facts: StageProfile | None) -> str:
    stage = config.stages[name]
    zero = zero_of(config, stage, world.size)
    if facts is None:
        compiled = is_compiled(config.engine, world.device.type)
        facts = examine(config, stage, config.data_of(name).max_tokens, zero.get("stage") == 3, compiled)
    capacity = device.memory_of(world.device)[1]
    if warning := too_large(config, name, facts, zero, world.size, capacity):
        logger.warning("%s", warning)
    if gpu := this_gpu(world.device):
        # the table's nodes may be larger than this one
        per_node = gpu.per_node if world.size <= gpu.per_node else gcd(world.size, gpu.per_node)
        plan = plan_stage(config, name, facts, zero, Machine(replace(gpu, per_node=per_node), world.size), num_samples)
        return f"{_memory(plan.memory, capacity)}; takes about {clock(plan.hours * 3600)}"
    accumulation = stage.accumulation(world.size)
    micro_batch = stage.global_batch // world.size // accumulation
    memory = measure(facts, config.engine, zero, world.size, micro_batch, accumulation)
    return f"{_memory(memory, capacity)}; the planner does not know this device's speed"


def _memory(memory: Memory, capacity: float) -> str:
    return f"{_gb(memory.peak)} of {_gb(usable(capacity))} per device at the peak"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
